"""The whole run on prepared graphs: text, hint, S steps, decode.

The host resizes, finds edges, tokenises and draws noise; everything else happens inside the graphs, which hand tensors
to each other in the workspace. The latent and the predicted noise alternate between two buffers each, so that a step
never writes what it reads.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import numpy as np

from cldm.image import canny_map
from cldm.request import Request
from cldm.result import Receipt, Result
from deploy.spec import Build, graph_specs
from ldm.plans import SamplingPlan, exact_plan
from runtime.session import Bound, Session
from runtime.workspace import Workspace

# Schedules whose bindings and time biases are kept; beyond that the least recently used goes.
KEPT_SCHEDULES = 8

Progress = Callable[[int, int], None]


class BrokenOutput(RuntimeError):
    """A stage gave NaN, infinity, or a picture of one colour."""


@dataclass(frozen=True)
class About:
    """The fields of a receipt that a pipeline does not know by itself."""

    weights: str
    backend: str
    backend_reason: str


class _Schedule:
    """What the evaluations at one list of timesteps need, bound once."""

    def __init__(self, steps: List[Bound], time_biases: Any, coefficients: Any) -> None:
        self.steps = steps
        self.time_biases = time_biases
        self.coefficients = coefficients


class Pipeline:
    """Makes images of one size.

    Parameters
    ----------
    build : Build
        Size, samples a run and precision that the sessions are for.
    sessions : mapping of str to Session
        text, hint, time, step and decode.
    tokenizer : callable
        Texts to ((B, 77) int32 ids, warnings).
    about : About
        For the receipts.
    device : str
        Where the sessions run; the noise is drawn there.
    """

    def __init__(
        self, build: Build, sessions: Mapping[str, Session], tokenizer: Any, about: About, device: str = "cpu"
    ) -> None:
        self.build = build
        self.sessions = dict(sessions)
        self.tokenizer = tokenizer
        self.about = about
        self.device = device
        self.workspace = Workspace(device)
        self._schedules: OrderedDict[Tuple[int, ...], _Schedule] = OrderedDict()
        self._allocate()

    def _allocate(self) -> None:
        specs = graph_specs(self.build)
        latent = specs["step"].inputs["latent"]
        shape = tuple(int(dim) for dim in latent.shape)
        for name in ("latent_0", "latent_1", "noise_0", "noise_1"):
            self.workspace.add(name, shape, latent.dtype)
        alternating = ("latent", "latent_next", "noise_last", "noise", "coefficients", "time_bias")
        for spec in specs.values():
            self.workspace.add_graph(spec, skip=alternating)
        self._bound = {name: self._bind(name) for name in ("text", "hint")}
        for i in (0, 1):
            self._bound[f"decode_{i}"] = self._bind("decode", latent=f"latent_{i}")

    def _bind(self, graph: str, **renamed: Any) -> Bound:
        """Bind a graph to the workspace's tensors of its names; `renamed` gives other names, or tensors themselves."""
        session = self.sessions[graph]
        buffers = {}
        for name in session.spec.tensors:
            place = renamed.get(name, name)
            buffers[name] = self.workspace[place] if isinstance(place, str) else place
        return session.bind(buffers)

    def _schedule(self, plan: SamplingPlan) -> _Schedule:
        """Bindings and time biases of a plan's timesteps, made on their first use."""
        key = tuple(plan.timesteps.tolist())
        found = self._schedules.pop(key, None)
        if found is None:
            found = self._make_schedule(plan.timesteps)
        self._schedules[key] = found
        while len(self._schedules) > KEPT_SCHEDULES:
            self._schedules.popitem(last=False)
        return found

    def _make_schedule(self, timesteps: np.ndarray) -> _Schedule:
        import torch

        num_steps = len(timesteps)
        spec = self.sessions["time"].spec
        output = spec.outputs["time_biases"]
        biases = torch.zeros((num_steps, int(output.shape[1])), dtype=getattr(torch, output.dtype), device=self.device)
        steps_in = torch.from_numpy(timesteps.astype(np.int32)).to(self.device)
        self._bind("time", timesteps=steps_in, time_biases=biases).enqueue()
        coefficients = torch.zeros((num_steps, 3), dtype=torch.float32, device=self.device)
        steps = [
            self._bind(
                "step",
                latent=f"latent_{i % 2}",
                latent_next=f"latent_{(i + 1) % 2}",
                noise_last=f"noise_{i % 2}",
                noise=f"noise_{(i + 1) % 2}",
                time_bias=biases[i : i + 1],
                coefficients=coefficients[i : i + 1],
            )
            for i in range(num_steps)
        ]
        return _Schedule(steps, biases, coefficients)

    def generate(
        self,
        image: Any,
        request: Request,
        latents: Optional[Any] = None,
        progress: Optional[Progress] = None,
        plan: Optional[SamplingPlan] = None,
    ) -> Result:
        """Make `request.num_samples` images; more than the build's samples take several runs over one noise tensor.

        Parameters
        ----------
        image : H x W x {1, 3, 4} uint8 array
            Resizes to the build's size at the request's resolution.
        latents : (N, 4, H/8, W/8) array, optional
            Initial noise to use in place of the seed's.
        progress : callable, optional
            Called with (evaluations done, evaluations) after each.
        plan : SamplingPlan, optional
            Which of the request's steps are evaluated; all by default.

        Raises
        ------
        TypeError, ValueError
            The image or the latents are not usable, the picture resizes to another size than the build's, or the plan
            is for another schedule than the request's.
        BrokenOutput
            NaN or a flat image; the message names the stage.
        """
        from cldm.noise import choose_seed, draw_noise

        clock = _StageClock(self.device)
        request = replace(request, seed=choose_seed(request.seed))
        plan = self._check_plan(request, plan)
        canny = canny_map(image, request.image_resolution, request.low_threshold, request.high_threshold)
        if canny.shape != (self.build.height, self.build.width):
            raise ValueError(
                f"the picture resizes to {canny.shape[0]} x {canny.shape[1]}, but these graphs are for"
                f" {self.build.height} x {self.build.width}"
            )
        ids, warnings = self.tokenizer([request.conditional_text, request.negative_prompt])
        shape = (request.num_samples, *self.build.latent_shape[1:])
        initial, noise = draw_noise(request.seed, shape, request.ddim_steps, request.eta, self.device, latents)
        clock.mark("host")
        self._condition(request, canny, ids, clock)
        schedule = self._schedule(plan)
        schedule.coefficients.copy_(_as_float32(plan.rows))
        clock.mark("schedule")
        images, finals = self._run(schedule, initial, noise, clock, progress)
        receipt = Receipt(
            model=self.build.config.name,
            weights=self.about.weights,
            backend=self.about.backend,
            backend_reason=self.about.backend_reason,
            precision=self.build.precision,
            device=self.device,
            height=self.build.height,
            width=self.build.width,
            num_samples=request.num_samples,
            seed=request.seed,
            evaluations=len(plan.indices),
            sampling=str(plan),
            milliseconds=clock.milliseconds(),
            warnings=tuple(warnings),
        )
        return Result(images, canny, finals, receipt)

    def _check_plan(self, request: Request, plan: Optional[SamplingPlan]) -> SamplingPlan:
        """The plan asked for, or plain DDIM."""
        if plan is None:
            return exact_plan(self.build.config.schedule, request.ddim_steps, request.eta)
        if plan.num_steps != request.ddim_steps:
            raise ValueError(f"the plan is for {plan.num_steps} steps, the request for {request.ddim_steps}")
        if plan.fresh_noise != (request.eta > 0):
            raise ValueError(
                f"eta is {request.eta}, and the plan '{plan}' is for {'above 0' if plan.fresh_noise else 0}"
            )
        return plan

    def _condition(self, request: Request, canny: np.ndarray, ids: np.ndarray, clock: _StageClock) -> None:
        """Write what stays the same in all steps, and run the text and hint graphs."""
        self.workspace.write("token_ids", ids)
        self.workspace.write("canny", canny)
        scales = request.control_scales(self.build.config.num_controls)
        self.workspace.write("control_scales", np.asarray(scales, np.float32))
        self.workspace.write("guidance_scale", np.asarray([request.guidance_scale], np.float32))
        self._bound["text"].enqueue()
        clock.mark("text")
        self._bound["hint"].enqueue()
        clock.mark("hint")

    def _run(
        self, schedule: _Schedule, initial: Any, noise: Any, clock: _StageClock, progress: Optional[Progress]
    ) -> Tuple[List[np.ndarray], np.ndarray]:
        """Sample and decode all images, as many at a time as the graphs take."""
        total, size = initial.shape[0], self.build.samples
        images: List[np.ndarray] = []
        finals: List[np.ndarray] = []
        runs = -(-total // size)
        for run in range(runs):
            part = slice(run * size, min((run + 1) * size, total))
            count = part.stop - part.start
            self._sample(schedule, initial[part], None if noise is None else noise[:, part], progress, (run, runs))
            clock.mark("steps")
            last = len(schedule.steps) % 2
            self._bound[f"decode_{last}"].enqueue()
            final, decoded = self.workspace.read(f"latent_{last}"), self.workspace.read("image")
            clock.mark("decode")
            self._check(schedule, final[:count], decoded[:count])
            finals.append(final[:count])
            images.extend(decoded[:count])
        return images, np.concatenate(finals)

    def _sample(
        self, schedule: _Schedule, initial: Any, noise: Any, progress: Optional[Progress], run: Tuple[int, int]
    ) -> None:
        """The S steps. An incomplete last run repeats its first sample in the places that nobody reads."""
        count, steps = initial.shape[0], len(schedule.steps)
        self.workspace["latent_0"][:count].copy_(initial)
        self.workspace["latent_0"][count:].copy_(initial[:1])
        for i, step in enumerate(schedule.steps):
            if noise is None and i == 0:
                # Its coefficient is 0, but 0 times what an earlier run may have left (NaN) is not.
                self.workspace["noise_0"].zero_()
            elif noise is not None:
                self.workspace[f"noise_{i % 2}"][:count].copy_(noise[i])
            step.enqueue()
            if progress is not None:
                progress(run[0] * steps + i + 1, run[1] * steps)

    def _check(self, schedule: _Schedule, latent: np.ndarray, images: np.ndarray) -> None:
        """Raise `BrokenOutput` where a run went wrong; only then look for the stage at which it began."""
        flat = [image.min() == image.max() for image in images]
        if np.isfinite(latent).all() and not any(flat):
            return
        earlier = {
            "text": self.workspace["keys_values"],
            "hint": self.workspace["hint_features"],
            "time": schedule.time_biases,
        }
        for stage, tensor in earlier.items():
            if not bool(tensor.isfinite().all()):
                raise BrokenOutput(self._describe(stage, "its output holds NaN or infinity"))
        if not np.isfinite(latent).all():
            raise BrokenOutput(self._describe("step", "the latent holds NaN or infinity"))
        raise BrokenOutput(self._describe("decode", f"the image is flat: every pixel is {images.flat[0]}"))

    def _describe(self, stage: str, what: str) -> str:
        advice = "the checkpoint may be damaged" if self.build.precision == "fp32" else "try precision fp32"
        return (
            f"stage {stage}: {what} ({self.build.config.name}, {self.about.backend}, {self.build.precision},"
            f" {self.about.weights}); {advice}"
        )

    def close(self) -> None:
        """Free the sessions and the workspace."""
        self._schedules.clear()
        self._bound.clear()
        for session in self.sessions.values():
            session.close()
        self.workspace.clear()


def _as_float32(value: Any) -> Any:
    import torch

    return torch.as_tensor(value).to(torch.float32)


class _StageClock:
    """Wall time between marks. On a GPU events are put into the stream, and only the end waits for them."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._device = device
        self._start = time.perf_counter()
        self._marks: List[Tuple[str, Any]] = []
        self._first = self._now()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        import torch

        with torch.cuda.device(self._device):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return event

    def mark(self, stage: str) -> None:
        """The time since the last mark belongs to `stage`."""
        self._marks.append((stage, self._now()))

    def milliseconds(self) -> Dict[str, float]:
        """Time of each stage, and of all from the start until now. On a GPU this waits for the last mark."""
        if self._cuda:
            self._marks[-1][1].synchronize()
        total = 1e3 * (time.perf_counter() - self._start)
        spent: Dict[str, float] = {}
        before = self._first
        for stage, now in self._marks:
            took = before.elapsed_time(now) if self._cuda else 1e3 * (now - before)
            spent[stage] = spent.get(stage, 0.0) + took
            before = now
        spent["total"] = total
        return spent
