"""The whole run on prepared graphs: text, hint, S steps, decode.

The host resizes, finds edges, tokenises and draws noise; everything else happens inside the graphs, which hand tensors
to each other in the workspace. The latent and the predicted noise alternate between two buffers each, so that a step
never writes what it reads.

On a GPU all of that, with the copies to and from the host, is captured as one CUDA graph on the first image of a number
of evaluations and launched for every later one. Nothing in it depends on a request: what a request changes is written
into buffers before the launch.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple, TypeVar

import numpy as np

from cldm.image import canny_map, target_size
from cldm.request import Request
from cldm.result import Receipt, Result
from deploy.spec import Build, graph_specs
from ldm.plans import SamplingPlan, exact_plan
from runtime.cuda_graph import CapturedGraph, GraphCapture
from runtime.session import Bound, Session
from runtime.stream import HostStream, StageClock, Stream, make_stream
from runtime.workspace import Workspace, aligned_rows

# Of each kind this many are kept, and beyond that the least recently used goes: schedule lengths with their bindings
# and CUDA graphs, lists of timesteps with their time biases, pairs of texts with their token ids.
KEPT_SCHEDULES = 8
KEPT_TIMES = 8
KEPT_TEXTS = 64
# What the host writes for each image.
INPUTS = ("token_ids", "canny", "control_scales", "guidance_scale")

Progress = Callable[[int, int], None]
Mark = Callable[[str], None]
Key = TypeVar("Key")
Value = TypeVar("Value")


class BrokenOutput(RuntimeError):
    """A stage gave NaN, infinity, or a picture of one colour."""


@dataclass(frozen=True)
class About:
    """The fields of a receipt that a pipeline does not know by itself."""

    weights: str
    backend: str
    backend_reason: str


class _Schedule:
    """What a number of evaluations needs: fixed buffers, the steps bound to them, and their CUDA graph.

    Parameters
    ----------
    steps : list of Bound
    time_biases : (E, total) tensor
    coefficients : (E, 3) float32 tensor
    fresh_noise : (E, N, 4, h, w) float32 tensor or None
        For schedules that add noise of their own to each step.
    """

    def __init__(self, steps: List[Bound], time_biases: Any, coefficients: Any, fresh_noise: Any) -> None:
        self.steps = steps
        self.time_biases = time_biases
        self.coefficients = coefficients
        self.fresh_noise = fresh_noise
        self.graph: Optional[CapturedGraph] = None
        self._holds: Optional[SamplingPlan] = None

    @property
    def last(self) -> int:
        """Which of the two latents the last step writes."""
        return len(self.steps) % 2

    @property
    def outputs(self) -> Tuple[str, str]:
        """Names of the final latent and the images."""
        return f"latent_{self.last}", "image"

    def load(self, plan: SamplingPlan, time_biases: Any) -> None:
        """Write a plan's rows and time biases, unless they are what was written last."""
        held = self._holds
        if held is None or not np.array_equal(held.timesteps, plan.timesteps):
            self.time_biases.copy_(time_biases)
        if held is None or not np.array_equal(held.rows, plan.rows):
            self.coefficients.copy_(_as_float32(plan.rows))
        self._holds = plan

    def close(self) -> None:
        graph, self.graph = self.graph, None
        if graph is not None:
            graph.close()


class Pipeline:
    """Makes images of one size.

    Parameters
    ----------
    build : Build
        Size, samples a run and precision that the sessions are for.
    sessions : mapping of str to Session
        text, hint, time, step and decode; the pipeline closes them, also where it cannot be made.
    tokenizer : callable
        Texts to ((B, 77) int32 ids, warnings).
    about : About
        For the receipts.
    device : str
        Where the sessions run; the noise is drawn there.
    graphs : GraphCapture, optional
        Captures CUDA graphs of the sessions' work; without it each image is enqueued anew.
    """

    def __init__(
        self,
        build: Build,
        sessions: Mapping[str, Session],
        tokenizer: Any,
        about: About,
        device: str = "cpu",
        graphs: Optional[GraphCapture] = None,
    ) -> None:
        self.build = build
        self.sessions = dict(sessions)
        self.tokenizer = tokenizer
        self.about = about
        self.device = device
        self.workspace = Workspace(device, staged=graphs is not None or device.startswith("cuda"))
        self._graphs = graphs
        self._graph_problem: Optional[str] = None
        self._schedules: OrderedDict[Tuple[int, bool], _Schedule] = OrderedDict()
        self._times: OrderedDict[Tuple[int, ...], Any] = OrderedDict()
        self._texts: OrderedDict[Tuple[str, str], Tuple[np.ndarray, List[str]]] = OrderedDict()
        self._bound: Dict[str, Bound] = {}
        self._stream: Stream = HostStream()
        try:
            self._stream = make_stream(device)
            with self._stream.entered():
                self._allocate()
        except BaseException:
            self.close()
            raise

    def _allocate(self) -> None:
        specs = graph_specs(self.build)
        latent = specs["step"].inputs["latent"]
        shape = tuple(int(dim) for dim in latent.shape)
        for name in ("latent_0", "latent_1", "noise_0", "noise_1"):
            self.workspace.add(name, shape, latent.dtype)
        alternating = ("latent", "latent_next", "noise_last", "noise", "coefficients", "time_bias")
        for spec in specs.values():
            self.workspace.add_graph(spec, skip=alternating)
        self._bound.update((name, self._bind(name)) for name in ("text", "hint"))
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
        """Buffers and bindings of a plan's number of evaluations, made on their first use, with the plan written."""
        key = (len(plan.indices), plan.fresh_noise)
        schedule = _recent(
            self._schedules, key, lambda: self._make_schedule(*key), KEPT_SCHEDULES, lambda dropped: dropped.close()
        )
        times = tuple(plan.timesteps.tolist())
        schedule.load(plan, _recent(self._times, times, lambda: self._time_biases(plan.timesteps), KEPT_TIMES))
        return schedule

    def _time_biases(self, timesteps: np.ndarray) -> Any:
        import torch

        output = self.sessions["time"].spec.outputs["time_biases"]
        shape = (len(timesteps), int(output.shape[1]))
        biases = torch.zeros(shape, dtype=getattr(torch, output.dtype), device=self.device)
        steps_in = torch.from_numpy(timesteps.astype(np.int32)).to(self.device)
        self._bind("time", timesteps=steps_in, time_biases=biases).enqueue()
        return biases

    def _make_schedule(self, evaluations: int, fresh_noise: bool) -> _Schedule:
        import torch

        output = self.sessions["time"].spec.outputs["time_biases"]
        biases = aligned_rows(evaluations, int(output.shape[1]), output.dtype, self.device)
        coefficients = aligned_rows(evaluations, 3, "float32", self.device)
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
            for i in range(evaluations)
        ]
        shape = (evaluations, *self.build.latent_shape)
        return _Schedule(steps, biases, coefficients, torch.zeros(shape, device=self.device) if fresh_noise else None)

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

        Returns
        -------
        Result
            Its receipt has the milliseconds of "host", "schedule" (time biases of new timesteps), "text", "hint",
            "steps" and "decode". Where a CUDA graph was launched the last four are one, "device": from the launch to
            the last kernel's end, by events before and after it, as events inside a graph cannot be read; "host" is
            then all else. The call that captures adds "capture".

        Raises
        ------
        TypeError, ValueError
            The image or the latents are not usable, the picture resizes to another size than the build's, or the plan
            is for another schedule than the request's.
        BrokenOutput
            NaN or a flat image; the message names the stage.
        """
        with self._stream.entered(), self._waiting_after_errors():
            return self._generate(image, request, latents, progress, plan)

    def _generate(
        self,
        image: Any,
        request: Request,
        latents: Optional[Any],
        progress: Optional[Progress],
        plan: Optional[SamplingPlan],
    ) -> Result:
        from cldm.noise import choose_seed

        clock = StageClock(self._stream)
        request = replace(request, seed=choose_seed(request.seed))
        plan = self._check_plan(request, plan)
        canny, warnings, initial, noise = self._on_host(image, request, latents)
        clock.mark("host")
        schedule = self._schedule(plan)
        clock.mark("schedule")
        images, finals = self._run(schedule, initial, noise, clock, progress)
        told = [] if self._graph_problem is None else [self._graph_problem]
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
            warnings=(*warnings, *told),
        )
        return Result(images, canny, finals, receipt)

    def _on_host(self, image: Any, request: Request, latents: Optional[Any]) -> Tuple[np.ndarray, List[str], Any, Any]:
        """Write a request's inputs; its canny map, the warnings about its texts, and the noise as it is drawn."""
        from cldm.noise import draw_noise

        canny = canny_map(image, request.image_resolution, request.low_threshold, request.high_threshold)
        if canny.shape != (self.build.height, self.build.width):
            raise ValueError(
                f"the picture resizes to {canny.shape[0]} x {canny.shape[1]}, but these graphs are for"
                f" {self.build.height} x {self.build.width}"
            )
        texts = (request.conditional_text, request.negative_prompt)
        ids, warnings = _recent(self._texts, texts, lambda: self.tokenizer(list(texts)), KEPT_TEXTS)
        shape = (request.num_samples, *self.build.latent_shape[1:])
        initial, noise = draw_noise(request.seed, shape, request.ddim_steps, request.eta, self.device, latents)
        self._write_inputs(request, canny, ids)
        return canny, warnings, initial, noise

    def prepare(self, plan: SamplingPlan) -> None:
        """Do on blank pictures what an image of this plan takes, so that the first is made as fast as the later ones.

        Where graphs are captured these are two whole images: one that captures and one that launches. Without graphs
        the networks do not run, as on a CPU an image may take minutes; but all before them does.
        """
        height, width = self.build.height, self.build.width
        if not _is_resized_to(height, width):
            return
        request = Request(
            "",
            image_resolution=min(height, width),
            ddim_steps=plan.num_steps,
            seed=0,
            eta=float(plan.fresh_noise),
        )
        # One is enlarged and one reduced: OpenCV has other code and tables for each.
        small, large = (np.zeros((height * n // 2, width * n // 2, 3), np.uint8) for n in (1, 3))
        with self._stream.entered(), self._waiting_after_errors():
            self._on_host(small, request, None)
            if self._graphs is None:
                self._on_host(large, request, None)
                self._schedule(plan)
                return
            # What these weights make of nothing is not what they are judged by: every image is looked at anew.
            with contextlib.suppress(BrokenOutput):
                for _ in ("captures", "launches"):
                    self._generate(large, request, None, None, plan)

    @contextlib.contextmanager
    def _waiting_after_errors(self) -> Iterator[None]:
        """Let an error out only once all that was enqueued is done: a pipeline of another size, which runs on another
        stream, may be asked next, and its engines may work in the same memory."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):
                self._stream.wait()
            raise

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

    def _write_inputs(self, request: Request, canny: np.ndarray, ids: np.ndarray) -> None:
        """Write what stays the same in all steps."""
        self.workspace.write("token_ids", ids)
        self.workspace.write("canny", canny)
        scales = request.control_scales(self.build.config.num_controls)
        self.workspace.write("control_scales", np.asarray(scales, np.float32))
        self.workspace.write("guidance_scale", np.asarray([request.guidance_scale], np.float32))

    def _write_noise(self, schedule: _Schedule, initial: Any, noise: Any) -> None:
        """Write a run's noise. An incomplete last run repeats its first sample in the places that nobody reads."""
        count = initial.shape[0]
        self.workspace["latent_0"][:count].copy_(initial)
        self.workspace["latent_0"][count:].copy_(initial[:1])
        if noise is not None:
            schedule.fresh_noise[:, :count].copy_(noise)

    def _run(
        self, schedule: _Schedule, initial: Any, noise: Any, clock: StageClock, progress: Optional[Progress]
    ) -> Tuple[List[np.ndarray], np.ndarray]:
        """Sample and decode all images, as many at a time as the graphs take."""
        total, size = initial.shape[0], self.build.samples
        images: List[np.ndarray] = []
        finals: List[np.ndarray] = []
        runs = -(-total // size)
        conditioned = False
        for run in range(runs):
            part = slice(run * size, min((run + 1) * size, total))
            noises = initial[part], None if noise is None else noise[:, part]
            self._write_noise(schedule, *noises)
            with_graph = self._graphs is not None and self._graph_problem is None and progress is None
            if with_graph and schedule.graph is not None:
                schedule.graph.launch()
                clock.mark("device")
            else:
                counted = _counted(progress, run, runs, len(schedule.steps))
                self._enqueue(schedule, clock.mark, counted, with_conditions=not conditioned)
                conditioned = True
            final, decoded = self._read(schedule, part.stop - part.start)
            finals.append(final)
            images.extend(decoded)
            if with_graph and schedule.graph is not None:
                clock.mark("host")
            elif with_graph:
                self._capture(schedule, *noises)
                conditioned = False  # the memory was poisoned
                clock.mark("capture")
        return images, np.concatenate(finals)

    def _enqueue(
        self,
        schedule: _Schedule,
        mark: Mark = lambda stage: None,
        counted: Callable[[int], None] = lambda done: None,
        with_conditions: bool = True,
    ) -> None:
        """All the work of a run, from the host's inputs to its outputs; the text and the hint are not to be repeated
        in further runs of the same request."""
        if with_conditions:
            for name in INPUTS:
                self.workspace.upload(name)
            for stage in ("text", "hint"):
                self._bound[stage].enqueue()
                mark(stage)
        if schedule.fresh_noise is None:
            # Its coefficient is 0, but 0 times what an earlier run may have left (NaN) is not.
            self.workspace["noise_0"].zero_()
        for i, step in enumerate(schedule.steps):
            if schedule.fresh_noise is not None:
                self.workspace[f"noise_{i % 2}"].copy_(schedule.fresh_noise[i])
            step.enqueue()
            counted(i + 1)
        mark("steps")
        self._bound[f"decode_{schedule.last}"].enqueue()
        for name in schedule.outputs:
            self.workspace.download(name)
        mark("decode")

    def _capture(self, schedule: _Schedule, initial: Any, noise: Any) -> None:
        """Make the graph of a run that has just been done; where that fails, do without, and let receipts say so."""
        wanted = [self.workspace.host(name).clone() for name in schedule.outputs]
        try:
            schedule.graph = self._graphs.capture(lambda: self._enqueue(schedule))
            if not self._gives(schedule, initial, noise, wanted):
                raise RuntimeError("its first launch gave something else than the run that it was captured from")
        except Exception as error:
            self._graph_problem = f"runs without a CUDA graph, slower, as making one failed: {_in_words(error)}"
            with contextlib.suppress(Exception):  # the failure is told; what it left is freed as far as it goes
                schedule.close()

    def _gives(self, schedule: _Schedule, initial: Any, noise: Any, wanted: List[Any]) -> bool:
        """Whether a launch of the graph gives these outputs, bit by bit.

        It begins with all memory but the inputs poisoned, so that nothing of an earlier run can pass for its own.
        """
        self.workspace.poison(harmless=INPUTS)
        self._write_noise(schedule, initial, noise)
        schedule.graph.launch()
        self._stream.wait()
        return all(_same_bits(self.workspace.host(name), value) for name, value in zip(schedule.outputs, wanted))

    def _read(self, schedule: _Schedule, count: int) -> Tuple[np.ndarray, np.ndarray]:
        """Final latents and images of a run once it is done; raises `BrokenOutput` where it went wrong."""
        self._stream.wait()
        final, decoded = (self.workspace.read(name)[:count] for name in schedule.outputs)
        self._check(schedule, final, decoded)
        return final, decoded

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
        """Free the graphs, the sessions and the workspace, each also where freeing another fails."""
        stream, self._stream = self._stream, HostStream()
        with contextlib.ExitStack() as stack:  # the last goes first
            stack.callback(stream.close)
            stack.callback(self.workspace.clear)
            for session in self.sessions.values():
                stack.callback(session.close)
            for schedule in self._schedules.values():
                stack.callback(schedule.close)
            stack.callback(stream.wait)
            self._schedules.clear()
            self._times.clear()
            self._bound.clear()


def _is_resized_to(height: int, width: int) -> bool:
    """Whether pictures can become that large; builds of small models may have other sizes too."""
    try:
        return target_size(height, width, min(height, width)) == (height, width)
    except ValueError:
        return False


def _as_float32(value: Any) -> Any:
    import torch

    return torch.as_tensor(value).to(torch.float32)


def _counted(progress: Optional[Progress], run: int, runs: int, steps: int) -> Callable[[int], None]:
    """Progress of one run as progress of all of them."""
    if progress is None:
        return lambda done: None
    report = progress
    return lambda done: report(run * steps + done, runs * steps)


def _recent(
    kept: OrderedDict[Key, Value],
    key: Key,
    make: Callable[[], Value],
    most: int,
    drop: Callable[[Value], None] = lambda dropped: None,
) -> Value:
    """The value of a key, made where there is none; the least recently used goes where there are more than `most`."""
    found = kept.pop(key) if key in kept else make()
    kept[key] = found
    while len(kept) > most:
        drop(kept.popitem(last=False)[1])
    return found


def _same_bits(one: Any, other: Any) -> bool:
    import torch

    return bool(torch.equal(one.view(torch.uint8), other.view(torch.uint8)))


def _in_words(error: Optional[BaseException]) -> str:
    """The first lines of an error and of those it came after: ending a broken capture raises one of its own."""
    lines = []
    while error is not None:
        lines.append((str(error) or type(error).__name__).splitlines()[0])
        error = error.__context__
    return "; then ".join(reversed(lines))
