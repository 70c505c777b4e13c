"""A pipeline's sessions on buffers of their own, so that each can be run and timed alone."""

from __future__ import annotations

from typing import Any, Callable, Dict, Mapping

import numpy as np

from cldm.request import Request
from deploy.spec import STEPS, Build
from ldm.plans import exact_plan
from runtime.session import Bound, Session
from runtime.workspace import aligned_rows

# Tensors of the step that differ from one step to the next; `decode` shares the latent's name.
PER_STEP = ("latent", "latent_next", "noise_last", "noise", "time_bias", "coefficients")


class Chain:
    """All graphs of an image, bound once for a number of steps.

    Parameters
    ----------
    sessions : mapping of str to Session
        text, hint, time, step and decode.
    build : Build
        What they are for.
    request : Request
        Whose prompt has been turned into `ids`; its steps are taken by plain DDIM without fresh noise.
    ids : (2, 77) int array
    canny : (H, W) uint8 array
    initial : (N, 4, H/8, W/8) float tensor
    device : str
        Where the sessions run.
    """

    def __init__(
        self,
        sessions: Mapping[str, Session],
        build: Build,
        request: Request,
        ids: np.ndarray,
        canny: np.ndarray,
        initial: Any,
        device: str,
    ) -> None:
        import torch

        self.steps = request.ddim_steps
        self._sessions = sessions
        self._device = device
        plan = exact_plan(build.config.schedule, request.ddim_steps, 0.0)
        self._tensors = tensors = self._allocate(build)
        scales = request.control_scales(build.config.num_controls)
        self._write("control_scales", np.asarray(scales, np.float32))
        self._write("guidance_scale", np.asarray([request.guidance_scale], np.float32))
        self._write("timesteps", plan.timesteps.astype(np.int32))
        self._bound: Dict[str, Bound] = {name: self._bind(name) for name in ("text", "hint", "time")}
        biases = aligned_rows(*tensors["time_biases"].shape, sessions["time"].spec.outputs["time_biases"].dtype, device)
        rows = aligned_rows(self.steps + 1, 3, "float32", device)
        rows[: self.steps].copy_(torch.as_tensor(np.asarray(plan.rows, np.float32)))
        self._steps = [self._bind_step(i, biases[i : i + 1], rows[i : i + 1]) for i in range(self.steps)]
        # Timed over and over the sampler's own rows would drive the latent to infinity; this one keeps what it is.
        rows[-1].copy_(torch.tensor([1.0, 0.0, 0.0]))
        self._steady = [self._bind_step(i, biases[:1], rows[-1:]) for i in (0, 1)]
        self._bound["decode"] = self._bind("decode", latent=self._tensors[f"latent_{self.steps % 2}"])
        self.load(ids, canny, initial)
        self._bound["time"].enqueue()
        biases.copy_(tensors["time_biases"])

    def _allocate(self, build: Build) -> Dict[str, Any]:
        import torch

        shapes: Dict[str, Any] = {}
        for session in self._sessions.values():
            shapes.update(
                (name, (t.shape, t.dtype)) for name, t in session.spec.tensors.items() if name not in PER_STEP
            )
        for name in ("initial", "latent_0", "latent_1", "noise_0", "noise_1"):
            shapes[name] = (build.latent_shape, "float32")
        return {
            name: torch.zeros(
                [self.steps if dim == STEPS else dim for dim in shape], dtype=getattr(torch, dtype), device=self._device
            )
            for name, (shape, dtype) in shapes.items()
        }

    def _write(self, name: str, value: Any) -> None:
        import torch

        self._tensors[name].copy_(torch.as_tensor(value))

    def _bind(self, graph: str, **instead: Any) -> Bound:
        session = self._sessions[graph]
        return session.bind({**{n: self._tensors[n] for n in session.spec.tensors if n not in instead}, **instead})

    def _bind_step(self, i: int, time_bias: Any, coefficients: Any) -> Bound:
        tensors, now, after = self._tensors, i % 2, (i + 1) % 2
        return self._bind(
            "step",
            latent=tensors[f"latent_{now}"],
            latent_next=tensors[f"latent_{after}"],
            noise_last=tensors[f"noise_{now}"],
            noise=tensors[f"noise_{after}"],
            time_bias=time_bias,
            coefficients=coefficients,
        )

    def load(self, ids: np.ndarray, canny: np.ndarray, initial: Any) -> None:
        """Write the inputs of an image."""
        self._write("token_ids", ids)
        self._write("canny", canny)
        self._write("initial", initial)

    def stages(self) -> Dict[str, Callable[[int], None]]:
        """Each graph as a call that enqueues it; of the step, repetitions take the two ways of its buffers in turn."""
        calls: Dict[str, Callable[[int], None]] = {
            name: (lambda i, bound=bound: bound.enqueue()) for name, bound in self._bound.items()
        }
        self._tensors["latent_0"].copy_(self._tensors["initial"])
        calls["step"] = lambda i: self._steady[i % 2].enqueue()
        return calls

    def enqueue(self, mark: Callable[[str], None] = lambda stage: None) -> None:
        """The image: text, hint, steps, decode; the time graph has run. `mark` is called after each stage."""
        for name in ("text", "hint"):
            self._bound[name].enqueue()
            mark(name)
        self._tensors["latent_0"].copy_(self._tensors["initial"])
        for step in self._steps:
            step.enqueue()
        mark("steps")
        self._bound["decode"].enqueue()
        mark("decode")

    def images(self) -> np.ndarray:
        """(N, H, W, 3) uint8, once what is enqueued has run."""
        return self._tensors["image"].cpu().numpy()

    def latent(self) -> np.ndarray:
        """(N, 4, H/8, W/8) float32, once what is enqueued has run."""
        return self._tensors[f"latent_{self.steps % 2}"].cpu().numpy()
