"""The network alone, on a backend's sessions: guided noise of any latent at any timestep.

A pipeline runs whole images. Calibrating a sampler asks the deployed graphs other questions: the noise at a latent that
a trial plan has led to, for many cases in turn. This owns a workspace of its own, so a pipeline on the same sessions is
not disturbed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Mapping

import numpy as np

from cldm.image import canny_map
from cldm.request import Request
from deploy.spec import Build, graph_specs
from runtime.session import Bound, Session
from runtime.workspace import Workspace

# What the text and hint graphs make of a case, and what of its request the step graph reads.
_KEPT = ("keys_values", "hint_features", "control_scales", "guidance_scale")


@dataclass(frozen=True)
class Conditions:
    """What one case hands to every step, on the sessions' device; made by `StepEvaluator.prepare`."""

    tensors: Mapping[str, Any]


class StepEvaluator:
    """Evaluates the guided noise of prepared cases.

    Parameters
    ----------
    build : Build
        What the sessions are for; of one sample a run.
    sessions : mapping of str to Session
        text, hint, time, step and decode; they stay the caller's, who closes them.
    tokenizer : callable
        Texts to ((B, 77) int32 ids, warnings).
    device : str
        Where the sessions run.

    Raises
    ------
    ValueError
        The build makes several samples a run.
    """

    def __init__(self, build: Build, sessions: Mapping[str, Session], tokenizer: Any, device: str = "cpu") -> None:
        if build.samples != 1:
            raise ValueError(f"the evaluator takes one sample a run, and these graphs make {build.samples}")
        self.build = build
        self.device = device
        self._tokenizer = tokenizer
        self._sessions = dict(sessions)
        self._workspace = Workspace(device)
        specs = graph_specs(build)
        for name in ("text", "hint", "step", "decode"):
            self._workspace.add_graph(specs[name])
        self._bound = {name: self._bind(name) for name in ("text", "hint", "step", "decode")}
        self._biases: Dict[int, Any] = {}
        self._at: Any = None

    def _bind(self, graph: str, **own: Any) -> Bound:
        session = self._sessions[graph]
        return session.bind(
            {name: own[name] if name in own else self._workspace[name] for name in session.spec.tensors}
        )

    def _time_bias(self, timestep: int) -> Any:
        """The time biases of a timestep, (1, total); made on first use."""
        import torch

        if timestep not in self._biases:
            output = self._sessions["time"].spec.outputs["time_biases"]
            told = torch.tensor([timestep], dtype=torch.int32, device=self.device)
            bias = torch.zeros((1, int(output.shape[1])), dtype=getattr(torch, output.dtype), device=self.device)
            self._bind("time", timesteps=told, time_biases=bias).enqueue()
            self._biases[timestep] = bias
        return self._biases[timestep]

    def prepare(self, image: Any, request: Request) -> Conditions:
        """Run the text and hint graphs once for a case.

        Parameters
        ----------
        image : H x W x {1, 3, 4} uint8 array
            Resizes to the build's size at the request's resolution.

        Raises
        ------
        TypeError, ValueError
            The image is not usable, or resizes to another size.
        """
        canny = canny_map(image, request.image_resolution, request.low_threshold, request.high_threshold)
        if canny.shape != (self.build.height, self.build.width):
            raise ValueError(
                f"the picture resizes to {canny.shape[0]} x {canny.shape[1]}, but these graphs are for"
                f" {self.build.height} x {self.build.width}"
            )
        ids, _ = self._tokenizer([request.conditional_text, request.negative_prompt])
        space = self._workspace
        space.write("token_ids", ids)
        space.write("canny", canny)
        space.write("control_scales", np.asarray(request.control_scales(self.build.config.num_controls), np.float32))
        space.write("guidance_scale", np.asarray([request.guidance_scale], np.float32))
        self._bound["text"].enqueue()
        self._bound["hint"].enqueue()
        self._at = None
        return Conditions({name: space[name].clone() for name in _KEPT})

    def noise(self, conditions: Conditions, timestep: int, latent: np.ndarray) -> np.ndarray:
        """The guided noise, (4, h, w) float32.

        Parameters
        ----------
        conditions : Conditions
            Of the case, from `prepare`.
        timestep : int
            What the network is told, 0 .. train_steps - 1.
        latent : (4, h, w) array
        """
        space = self._workspace
        if self._at is not conditions:
            for name, tensor in conditions.tensors.items():
                space[name].copy_(tensor)
            self._at = conditions
        space["time_bias"].copy_(self._time_bias(timestep))
        space.write("latent", np.asarray(latent, np.float32)[None])
        self._bound["step"].enqueue()
        return space.read("noise")[0]

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """The (H, W, 3) uint8 image of a (4, h, w) latent."""
        self._workspace.write("latent", np.asarray(latent, np.float32)[None])
        self._bound["decode"].enqueue()
        images = self._workspace.read("image")
        return np.asarray(images[0])

    def close(self) -> None:
        """Free the workspace; the sessions are the caller's."""
        self._bound.clear()
        self._at = None
        self._biases.clear()
        self._workspace.clear()
