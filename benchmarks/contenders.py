"""Our pipeline as contenders of the benchmark: as a user has it, and its graphs run plainly by PyTorch.

A contender is made of options (a JSON object, see `Job`) inside a worker process. Each has `prepare`, which must come
first, `images`, which times whole calls, `parts`, which times the stages of an image, and `memory`.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from benchmarks.chain import Chain
from benchmarks.device import busy_microseconds, kind_of, process_mebibytes, torch_settings, used_mebibytes
from benchmarks.tile_sizes import ScaledTables
from cldm.config import load_config
from cldm.image import canny_map, resize_image, target_size, to_three_channels
from cldm.request import Request

ROOT = Path(__file__).resolve().parent.parent
PROMPT = ("a bird", "best quality, extremely detailed", "longbody, lowres, bad anatomy, bad hands, missing fingers")
SEED = 2946901
MEBIBYTE = 1 << 20
# Runs of a graph in the CUDA graph that is timed, so that the launch of the latter does not count.
CALLS = {"hint": 10, "step": 2}


@dataclasses.dataclass(frozen=True)
class Job:
    """What a contender is to paint, and how it is to be set up.

    Attributes
    ----------
    samples : int
        Images a call.
    backend, precision, device, build_dir : str, optional
        As `hackathon.initialize` takes them.
    scaled_from : str, optional
        Of ours: the build folder whose tile sizes, scaled to the images a call, stand in for a tuning of its own.
    compiled : str, optional
        Of a diffusers pipeline: the mode of torch.compile for its networks, which else run eagerly.
    """

    model: str
    picture: str
    random_weights: Optional[int] = None
    steps: int = 20
    resolution: int = 256
    samples: int = 1
    backend: Optional[str] = None
    precision: Optional[str] = None
    device: Optional[str] = None
    build_dir: Optional[str] = None
    scaled_from: Optional[str] = None
    compiled: Optional[str] = None

    @property
    def request(self) -> Request:
        return Request(
            *PROMPT, num_samples=self.samples, image_resolution=self.resolution, ddim_steps=self.steps, seed=SEED
        )

    def fixed_place(self) -> Tuple[str, str]:
        """Device and precision; raises ValueError where the job leaves one of them open."""
        if self.device is None or self.precision is None:
            raise ValueError("this contender needs a device and a precision: those of ours")
        return self.device, self.precision

    def load_picture(self) -> Tuple[Any, int, int]:
        """The picture, and the height and width of the images made of it.

        Raises
        ------
        ValueError
            It cannot be read.
        """
        import cv2

        image = cv2.imread(self.picture)
        if image is None:
            raise ValueError(f"cannot read the picture {self.picture}")
        return (image, *target_size(*image.shape[:2], self.resolution))


def synchronise(device: str) -> None:
    """Wait for the device; a CPU has nothing to wait for."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def time_calls(call: Callable[[], Any], count: int, device: str = "cpu") -> List[float]:
    """Wall milliseconds of each call; on a GPU until it is done there too."""
    spent = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        synchronise(device)
        spent.append(1e3 * (time.perf_counter() - start))
    return spent


def time_replays(graph: Any, calls: int, rounds: int) -> List[float]:
    """Milliseconds a call on the device, of replays of a CUDA graph of so many calls; two replays come before."""
    import torch

    spent = []
    for turn in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if turn >= 2:
            spent.append(start.elapsed_time(end) / calls)
    return spent


class StageMarks:
    """Wall milliseconds between marks, each of which waits for the device."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.spent: Dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, stage: str) -> None:
        synchronise(self._device)
        now = time.perf_counter()
        self.spent[stage] = self.spent.get(stage, 0.0) + 1e3 * (now - self._last)
        self._last = now


class Memory:
    """What a process takes on the card. Made before the process has touched it."""

    def __init__(self) -> None:
        self._before = used_mebibytes()

    def measure(self, device: str) -> Optional[Dict[str, Any]]:
        """MiB: allocated and reserved by torch, and of the whole process, with how that is known; None on a CPU."""
        if not device.startswith("cuda"):
            return None
        import torch

        whole, source = process_mebibytes(), "the driver's count of this process"
        now = used_mebibytes()
        if whole is None and now is not None and self._before is not None:
            whole, source = now - self._before, "difference of the card's used memory"
        free, total = (value / MEBIBYTE for value in torch.cuda.mem_get_info(device))
        return {
            "allocated": torch.cuda.memory_allocated(device) / MEBIBYTE,
            "reserved": torch.cuda.memory_reserved(device) / MEBIBYTE,
            "process": whole,
            "process_is": source if whole is not None else None,
            "card_used": total - free,
            "card_total": total,
        }


class Ours:
    """`hackathon`, as a user has it."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._memory = Memory()
        self._job = Job(**options)
        self._image, self._height, self._width = self._job.load_picture()
        self._chain: Optional[Chain] = None

    def prepare(self) -> Dict[str, Any]:
        """Import and initialise, both timed in seconds, and say what runs."""
        job, start = self._job, time.perf_counter()
        import torch  # noqa: F401 (its share of the start is told apart)

        from canny2image_TRT import hackathon

        imported = time.perf_counter()
        tables = self._scaled_tables()
        self._hackathon = hackathon()
        self._hackathon.initialize(
            job.model,
            job.backend,
            job.precision,
            device=job.device,
            build_dir=job.build_dir,
            random_weights=job.random_weights,
            samples=job.samples,
            height=self._height,
            width=self._width,
        )
        # The pipeline itself, which has no public name: the sessions behind it are to be timed one by one.
        self._pipeline = self._hackathon._pipeline(self._height, self._width)
        self._device = str(self._pipeline.device)
        synchronise(self._device)
        ready = time.perf_counter()
        return {
            "summary": self._hackathon.summary,
            "backend": self._pipeline.about.backend,
            "precision": self._pipeline.build.precision,
            "device": self._device,
            "height": self._height,
            "width": self._width,
            "import_seconds": imported - start,
            "initialise_seconds": ready - imported,
            "tile_sizes": None if tables is None else tables.describe(),
            **torch_settings(),
        }

    def _scaled_tables(self) -> Optional[ScaledTables]:
        """Where the job wants them and the fused networks, which alone read them, can run."""
        from runtime.fused.build import fused_problem

        job = self._job
        if job.scaled_from is None or job.build_dir is None or fused_problem(*job.fixed_place()) is not None:
            return None
        return ScaledTables(Path(job.scaled_from), Path(job.build_dir), str(job.device), job.samples)

    def images(self, count: int) -> List[float]:
        """Milliseconds of each of `count` calls of `process`, copies and host work included."""
        r = self._job.request
        arguments = (r.prompt, r.added_prompt, r.negative_prompt, r.num_samples, r.image_resolution, r.ddim_steps)
        more = (r.guess_mode, r.strength, r.guidance_scale, r.seed, r.eta, r.low_threshold, r.high_threshold)
        return time_calls(lambda: self._hackathon.process(self._image, *arguments, *more), count)

    def receipts(self, count: int) -> Dict[str, Any]:
        """Milliseconds as the pipeline's own receipts have them, by stage, and their warnings."""
        runs = [self._hackathon.run(self._image, self._job.request).receipt for _ in range(count)]
        names = dict.fromkeys(name for run in runs for name in run.milliseconds)
        spent = {name: [run.milliseconds[name] for run in runs if name in run.milliseconds] for name in names}
        return {"milliseconds": spent, "sampling": runs[-1].sampling, "warnings": list(runs[-1].warnings)}

    def latent(self) -> List[float]:
        """The final latent, flat."""
        return self._hackathon.run(self._image, self._job.request).latent.ravel().tolist()

    def memory(self) -> Optional[Dict[str, Any]]:
        return self._memory.measure(self._device)

    def stages(self) -> List[str]:
        """What `stage` can time; on a GPU also the "chain" of text, hint, steps and decode, on a CPU an image."""
        names = [*self._graphs().stages()]
        return [*names, "chain"] if self._device.startswith("cuda") else names

    def stage(self, name: str, repeats: int) -> List[float]:
        """Milliseconds of one graph alone. On a GPU it is replayed as a CUDA graph of its own and timed by events."""
        call = (lambda i: self._graphs().enqueue()) if name == "chain" else self._graphs().stages()[name]
        if not self._device.startswith("cuda"):
            return time_calls(lambda: call(0), repeats + 1)[1:]
        from benchmarks.group_norm import capture

        calls = CALLS.get(name, 1)
        return time_replays(capture(call, calls), calls, repeats)

    def host(self, repeats: int) -> Dict[str, List[float]]:
        """Milliseconds of what the host does for an image, each thing alone.

        On a GPU also "launch", the host's time to launch the chain as one CUDA graph, and "copy", the way of the
        finished images back.
        """
        import cv2

        from cldm.noise import draw_noise

        request, pipeline = self._job.request, self._pipeline
        colour = to_three_channels(self._image)
        resized = resize_image(colour, request.image_resolution)
        thresholds = (request.low_threshold, request.high_threshold)
        shape = (request.num_samples, *pipeline.build.latent_shape[1:])
        texts = [request.conditional_text, request.negative_prompt]
        calls: Dict[str, Callable[[], Any]] = {
            "resize": lambda: resize_image(colour, request.image_resolution),
            "canny": lambda: cv2.Canny(resized, *thresholds),
            "tokenise": lambda: pipeline.tokenizer(texts),
            "noise": lambda: draw_noise(request.seed, shape, request.ddim_steps, 0.0, self._device),
        }
        spent = {name: time_calls(call, repeats + 1, self._device)[1:] for name, call in calls.items()}
        if self._device.startswith("cuda"):
            spent.update(self._launch_and_copy(repeats))
        return spent

    def _launch_and_copy(self, repeats: int) -> Dict[str, List[float]]:
        from benchmarks.group_norm import capture

        chain = self._graphs()
        graph = capture(lambda i: chain.enqueue(), 1)
        spent: Dict[str, List[float]] = {"launch": [], "copy": []}
        for _ in range(repeats + 1):
            start = time.perf_counter()
            graph.replay()
            spent["launch"].append(1e3 * (time.perf_counter() - start))
            synchronise(self._device)
            spent["copy"] += time_calls(chain.images, 1)
        return {name: samples[1:] for name, samples in spent.items()}

    def kernels(self) -> Dict[str, Any]:
        """Device time by kernel of one guided step, from a profile of one replay of its CUDA graph.

        A kernel that was launched before the one ahead of it ended (programmatic launch) counts from then on, waiting
        included: the sum is more than the step takes, and "busy" is the step.

        Returns
        -------
        dict
            rows: name, kind, launches and microseconds of each kernel, the longest first; launches; microseconds: the
            kernels' sum; busy_microseconds: while at least one ran; span_microseconds: from the first to the last.

        Raises
        ------
        RuntimeError
            The profiler saw no kernel.
        """
        import torch
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        from benchmarks.group_norm import capture

        # The tracer must stay while there are CUDA graphs, and be there before the one that it looks into.
        os.environ.update(TEARDOWN_CUPTI="0", DISABLE_CUPTI_LAZY_REINIT="1")
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profile(activities=activities):
            torch.zeros(1, device=self._device)
            synchronise(self._device)
        graph = capture(self._graphs().stages()["step"], 1)
        for _ in range(2):  # the first also pays for what the tracer sets up for a graph
            graph.replay()
            synchronise(self._device)
            with profile(activities=activities) as profiler:
                graph.replay()
                synchronise(self._device)
        events = [
            (event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.device_type == DeviceType.CUDA
            and event.time_range.end > event.time_range.start
            and not getattr(event, "is_user_annotation", False)
        ]
        return summarise_kernels(events)

    def _graphs(self) -> Chain:
        """The pipeline's sessions, bound to buffers of their own."""
        if self._chain is None:
            self._chain = make_chain(self._job.request, self._image, self._pipeline, self._pipeline.sessions)
        return self._chain


def make_chain(request: Request, image: Any, pipeline: Any, sessions: Any) -> Chain:
    """A chain of sessions with an image's inputs; the pipeline says for what size, by which tokenizer and where."""
    from cldm.noise import draw_noise

    build, device = pipeline.build, str(pipeline.device)
    canny = canny_map(image, request.image_resolution, request.low_threshold, request.high_threshold)
    ids, _ = pipeline.tokenizer([request.conditional_text, request.negative_prompt])
    initial, _ = draw_noise(request.seed, build.latent_shape, request.ddim_steps, 0.0, device)
    return Chain(sessions, build, request, ids, canny, initial, device)


def summarise_kernels(events: List[Tuple[str, float, float]]) -> Dict[str, Any]:
    """`Ours.kernels` of (name, start, end) in microseconds."""
    if not events:
        raise RuntimeError("the profiler saw no kernel; it may lack the permission to trace the device")
    rows: Dict[str, Dict[str, Any]] = {}
    for name, start, end in events:
        row = rows.setdefault(name, {"name": name, "kind": kind_of(name), "launches": 0, "microseconds": 0.0})
        row["launches"] += 1
        row["microseconds"] += end - start
    return {
        "rows": sorted(rows.values(), key=lambda row: -row["microseconds"]),
        "launches": len(events),
        "microseconds": sum(end - start for _, start, end in events),
        "busy_microseconds": busy_microseconds([(start, end) for _, start, end in events]),
        "span_microseconds": max(end for _, _, end in events) - min(start for _, start, _ in events),
    }


class EagerGraphs:
    """The same graphs, run by PyTorch call by call: no compiler, no CUDA graph."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._memory = Memory()
        self._job = Job(**options)
        self._image, self._height, self._width = self._job.load_picture()

    def prepare(self) -> Dict[str, Any]:
        """Load the weights, and say what runs.

        Raises
        ------
        ValueError
            The job leaves device or precision open.
        """
        from cldm.checkpoint import load_model
        from cldm.tokenizer import find_tokenizer
        from cldm.weights import find_weights
        from deploy.graphs import build_graph
        from deploy.spec import Build, graph_specs
        from runtime.torch_session import TorchSession

        job, config = self._job, load_config(self._job.model)
        self.device, precision = job.fixed_place()
        self.build = Build(config, self._height, self._width, job.samples, precision)
        weights = find_weights(config, None, job.random_weights)
        self.tokenizer = find_tokenizer(config, weights)
        model = load_model(config, weights).to(self.device)
        sessions = {
            name: TorchSession(build_graph(name, model, precision, job.samples), spec)
            for name, spec in graph_specs(self.build).items()
        }
        del model  # in half precision the graphs have copies
        self._chain = make_chain(job.request, self._image, self, sessions)
        summary = f"the deployable graphs by PyTorch, eager, on {self.device} in {precision}"
        return {"summary": summary, "device": self.device, "precision": precision, **torch_settings()}

    def _run(self, mark: Callable[[str], None] = lambda stage: None) -> Any:
        from cldm.noise import draw_noise

        request = self._job.request
        canny = canny_map(self._image, request.image_resolution, request.low_threshold, request.high_threshold)
        ids, _ = self.tokenizer([request.conditional_text, request.negative_prompt])
        initial, _ = draw_noise(request.seed, self.build.latent_shape, request.ddim_steps, 0.0, self.device)
        self._chain.load(ids, canny, initial)
        mark("host")
        self._chain.enqueue(mark)
        return self._chain.images()

    def images(self, count: int) -> List[float]:
        """Milliseconds of each of `count` images, host work and copies included."""
        return time_calls(self._run, count)

    def latent(self) -> List[float]:
        """The final latent, flat."""
        self._run()
        return self._chain.latent().ravel().tolist()

    def memory(self) -> Optional[Dict[str, Any]]:
        return self._memory.measure(self.device)

    def parts(self, repeats: int) -> Dict[str, List[float]]:
        """Milliseconds of host, text, hint, steps (all) and decode, with a wait for the device after each."""
        return mark_parts(self._run, repeats, self.device)


def mark_parts(run: Callable[[Callable[[str], None]], Any], repeats: int, device: str) -> Dict[str, List[float]]:
    """Stage times of `repeats` calls of `run`, which is given what it calls at the end of each stage."""
    parts: Dict[str, List[float]] = {}
    for _ in range(repeats):
        marks = StageMarks(device)
        run(marks)
        for stage, spent in marks.spent.items():
            parts.setdefault(stage, []).append(spent)
    return parts
