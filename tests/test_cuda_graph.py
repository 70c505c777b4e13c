"""Capture and replay: the pipeline's part on a CPU with recorded operations, CUDA's on a fake of its API."""

from __future__ import annotations

import contextlib
import copy
import enum
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

import numpy as np
import pytest
import torch

from cldm.checkpoint import load_model
from cldm.model import ControlLDM
from cldm.request import Request
from cldm.result import Result
from cldm.tokenizer import Tokenizer
from cldm.weights import find_weights
from deploy.graphs import build_graph
from deploy.spec import Build, graph_specs
from ldm.plans import SamplingPlan, exact_plan, linear_plan, subset_plan
from runtime import cuda_runtime, pipeline
from runtime import stream as runtime_stream
from runtime.cuda_graph import CudaRuntimeGraphs, TorchGraphs
from runtime.cuda_runtime import CudaError, CudaRuntime
from runtime.pipeline import About, BrokenOutput, Pipeline
from runtime.torch_session import BoundModule, TorchSession
from tests.small_model import small_config
from tests.tape import Op, TapeGraphs

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 64
REQUEST = Request("a bird", "best quality", "lowres", image_resolution=SIZE, ddim_steps=4, seed=3)


@pytest.fixture(scope="module")
def model() -> ControlLDM:
    config = small_config()
    return load_model(config, find_weights(config))


@pytest.fixture(scope="module")
def tokenizer(model: ControlLDM) -> Tokenizer:
    return Tokenizer(model.config)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """Blocks with clear edges."""
    coarse = np.random.default_rng(3).integers(0, 2, (SIZE // 16, SIZE // 16, 3), dtype=np.uint8) * 200
    return coarse.repeat(16, axis=0).repeat(16, axis=1)


def make_pipeline(model: ControlLDM, tokenizer: Any, graphs: Optional[TapeGraphs] = None, samples: int = 1) -> Pipeline:
    build = Build(model.config, SIZE, SIZE, samples)
    sessions = {
        name: TorchSession(build_graph(name, model, "fp32", samples), spec) for name, spec in graph_specs(build).items()
    }
    return Pipeline(build, sessions, tokenizer, About("seeded", "torch", "test"), graphs=graphs)


def assert_same(found: Result, wanted: Result) -> None:
    assert np.array_equal(found.latent, wanted.latent)
    assert len(found.images) == len(wanted.images)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found.images, wanted.images))


SCHEDULE = small_config().schedule
# In this order on one pipeline: most of them run on a graph that was captured for another.
CASES: Dict[str, Tuple[Dict[str, Any], Optional[SamplingPlan]]] = {
    "first": ({}, None),
    "again": ({}, None),
    "seed": ({"seed": 4}, None),
    "prompt": ({"prompt": "a red house", "negative_prompt": ""}, None),
    "strength": ({"strength": 0.3}, None),
    "strength 0": ({"strength": 0}, None),
    "guess mode": ({"guess_mode": True}, None),
    "guidance": ({"guidance_scale": 3}, None),
    "one step": ({"ddim_steps": 1}, None),
    "thresholds": ({"low_threshold": 1, "high_threshold": 20}, None),
    "other timesteps, as many": ({"ddim_steps": 9}, subset_plan(SCHEDULE, 9, (8, 5, 2, 0))),
    "two predictions, as many": ({"ddim_steps": 9}, linear_plan(SCHEDULE, 9, (8, 5, 2, 0))),
    "back": ({}, exact_plan(SCHEDULE, 4)),
    "five steps": ({"ddim_steps": 5}, None),
    "fresh noise": ({"eta": 0.5}, None),
    "fresh noise, other seed": ({"eta": 1.0, "seed": 9}, None),
    "three samples": ({"num_samples": 3, "seed": 5}, None),
    "three samples, fresh noise": ({"num_samples": 3, "eta": 0.5}, None),
    "last": ({}, None),
}


@pytest.mark.parametrize("samples", [1, 2])
def test_replayed_images_are_those_of_no_graph(
    samples: int, model: ControlLDM, tokenizer: Tokenizer, picture: np.ndarray
) -> None:
    graphs = TapeGraphs()
    captured, plain = (make_pipeline(model, tokenizer, g, samples) for g in (graphs, None))
    for name, (changes, plan) in CASES.items():
        request = replace(REQUEST, **changes)
        found = captured.generate(picture, request, plan=plan)
        # A pipeline of its own for each: what one keeps from request to request is under test as well.
        alone = Pipeline(plain.build, plain.sessions, tokenizer, plain.about)
        assert_same(found, alone.generate(picture, request, plan=plan))
        assert not found.receipt.warnings, name
    # 1, 4 and 5 evaluations, and 4 with noise of their own: nothing else makes another graph.
    assert graphs.attempts == 4


def test_latents_given_are_replayed(model: ControlLDM, tokenizer: Tokenizer, picture: np.ndarray) -> None:
    made = make_pipeline(model, tokenizer, TapeGraphs())
    drawn = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    wanted = made.generate(picture, REQUEST)
    assert_same(made.generate(picture, replace(REQUEST, seed=9), latents=drawn.numpy()), wanted)


def test_a_later_image_is_one_launch(
    model: ControlLDM, tokenizer: Tokenizer, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No session is asked and no text is tokenised again; three samples are three launches."""
    graphs, texts, enqueued = TapeGraphs(), [], []

    def counting(words: List[str]) -> Any:
        texts.append(words)
        return tokenizer(words)

    made = make_pipeline(model, counting, graphs)
    first = made.generate(picture, REQUEST)
    stages = {"host", "schedule", "text", "hint", "steps", "decode", "capture", "total"}
    assert set(first.receipt.milliseconds) == stages
    monkeypatch.setattr(BoundModule, "enqueue", lambda bound: enqueued.append(bound))
    before = graphs.launches
    again = made.generate(picture, REQUEST)
    assert graphs.launches == before + 1
    assert set(again.receipt.milliseconds) == {"host", "schedule", "device", "total"}
    made.generate(picture, replace(REQUEST, num_samples=3, strength=0.1))
    assert graphs.launches == before + 4
    assert not enqueued
    assert len(texts) == 1
    assert_same(again, first)


def test_prepared_before_the_first_image(
    model: ControlLDM, tokenizer: Tokenizer, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = TapeGraphs()
    made, plain = make_pipeline(model, tokenizer, graphs), make_pipeline(model, tokenizer)
    made.prepare(exact_plan(SCHEDULE, 4))
    plain.prepare(exact_plan(SCHEDULE, 4))
    assert graphs.attempts == 1
    made.prepare(exact_plan(SCHEDULE, 4))
    wanted = plain.generate(picture, REQUEST)
    found = made.generate(picture, REQUEST)
    assert graphs.attempts == 1
    assert "device" in found.receipt.milliseconds
    assert_same(found, wanted)


ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def noting_calls() -> Iterator[Set[str]]:
    """Functions of the repository, and of the libraries in C what they and others call, while it is entered."""
    seen: Set[str] = set()

    def note(frame: Any, event: str, called: Any) -> None:
        if event == "call" and str(ROOT) in frame.f_code.co_filename and ".venv" not in frame.f_code.co_filename:
            seen.add(f"{Path(frame.f_code.co_filename).relative_to(ROOT)}: {frame.f_code.co_name}")
        elif event == "c_call" and str(getattr(called, "__module__", None)).startswith(("cv2", "torch", "tokenizers")):
            seen.add(f"{called.__module__}: {called.__qualname__}")

    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(None)
        seen.discard(f"tests/{Path(__file__).name}: {noting_calls.__name__}")


@pytest.mark.parametrize("changes", [{}, {"eta": 0.5}], ids=str)
def test_the_first_image_does_nothing_for_the_first_time(
    changes: Dict[str, Any], model: ControlLDM, tokenizer: Tokenizer, picture: np.ndarray
) -> None:
    """What is set up on first use was used by `prepare`: what `generate` calls it had called, to the last function."""
    request = replace(REQUEST, **changes)
    plan = exact_plan(SCHEDULE, request.ddim_steps, request.eta)
    larger = picture.repeat(2, axis=0).repeat(2, axis=1)
    graphs, noted = TapeGraphs(), set()
    made = make_pipeline(model, tokenizer, graphs)
    with noting_calls() as before:
        made.prepare(plan)
    assert (graphs.attempts, graphs.launches) == (1, 2), "once to be compared with the run, and once as an image"
    # Both ways of resizing were taken, and what was captured was launched and read.
    for image in (picture, larger, larger[:100, :101]):
        with noting_calls() as first:
            found = made.generate(image, request, plan=plan)
        assert "device" in found.receipt.milliseconds and not found.receipt.warnings
        assert first - before == {"runtime/pipeline.py: generate"}
        noted |= first
    wanted = {
        *("cldm/image.py: canny_map", "cldm/tokenizer.py: __call__", "cldm/noise.py: draw_noise"),
        *("runtime/workspace.py: read", "tests/tape.py: launch", "runtime/stream.py: milliseconds"),
    }
    assert wanted <= noted, "nothing was noted"


def test_both_ways_of_resizing_are_prepared(
    model: ControlLDM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cv2

    ways: List[int] = []
    resize = cv2.resize

    def note(image: np.ndarray, size: Tuple[int, int], interpolation: int) -> np.ndarray:
        ways.append(interpolation)
        return resize(image, size, interpolation=interpolation)

    monkeypatch.setattr(cv2, "resize", note)
    for graphs in (None, TapeGraphs()):
        ways.clear()
        make_pipeline(model, tokenizer, graphs).prepare(exact_plan(SCHEDULE, 4))
        assert set(ways) == {cv2.INTER_AREA, cv2.INTER_LANCZOS4}


def test_without_graphs_all_but_the_networks_is_prepared(
    model: ControlLDM, tokenizer: Tokenizer, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, enqueued, enqueue = make_pipeline(model, tokenizer), [], BoundModule.enqueue
    monkeypatch.setattr(BoundModule, "enqueue", lambda bound: enqueued.append(bound) or enqueue(bound))
    with noting_calls() as before:
        made.prepare(exact_plan(SCHEDULE, 4))
    assert len(enqueued) == 1, "the time graph alone"
    with noting_calls() as first:
        made.generate(picture, REQUEST)
    ours = {name for name in first if name.startswith(("cldm/image", "cldm/tok", "cv2", "tokenizers"))}
    ours |= {"cldm/noise.py: draw_noise", "runtime/workspace.py: write"}
    assert len(ours) > 5 and ours <= before
    assert len(enqueued) == 1 + 2 + 4 + 1


def test_no_picture_becomes_as_small_as_the_build(model: ControlLDM, tokenizer: Tokenizer) -> None:
    build, graphs = Build(model.config, 32, 96), TapeGraphs()
    sessions = {
        name: TorchSession(build_graph(name, model, "fp32", 1), spec) for name, spec in graph_specs(build).items()
    }
    Pipeline(build, sessions, tokenizer, About("seeded", "torch", "test"), graphs=graphs).prepare(
        exact_plan(SCHEDULE, 4)
    )
    assert graphs.attempts == 0


@pytest.mark.parametrize("broken", ["NaN", "flat"])
def test_broken_weights_are_told_of_by_images_alone(
    broken: str, model: ControlLDM, tokenizer: Tokenizer, picture: np.ndarray
) -> None:
    """What they make of a blank picture is nobody's; what they make of a picture is an error."""
    damaged, graphs = copy.deepcopy(model), TapeGraphs()
    if broken == "NaN":
        damaged.unet.input_blocks[0][0].weight.fill_(float("nan"))
    else:
        damaged.first_stage_model.decoder.conv_out.weight.zero_()
        damaged.first_stage_model.decoder.conv_out.bias.zero_()
    made = make_pipeline(damaged, tokenizer, graphs)
    made.prepare(exact_plan(SCHEDULE, 4))
    assert graphs.attempts == 0
    with pytest.raises(BrokenOutput, match="step: the latent holds NaN" if broken == "NaN" else "the image is flat"):
        made.generate(picture, REQUEST)


def test_progress_goes_without(model: ControlLDM, tokenizer: Tokenizer, picture: np.ndarray) -> None:
    graphs, seen = TapeGraphs(), []
    made = make_pipeline(model, tokenizer, graphs)
    for _ in range(2):
        result = made.generate(picture, REQUEST, progress=lambda done, total: seen.append((done, total)))
        assert "steps" in result.receipt.milliseconds
        assert not result.receipt.warnings
    assert seen == [(i, 4) for i in range(1, 5)] * 2
    assert graphs.attempts == 0
    assert_same(made.generate(picture, REQUEST), result)
    assert_same(made.generate(picture, REQUEST, progress=lambda done, total: None), result)


def test_a_capture_that_fails(model: ControlLDM, tokenizer: Tokenizer, picture: np.ndarray) -> None:
    """Tried once; images and memory are as without, and every receipt says so."""
    error = CudaError("ending it failed")
    error.__context__ = RuntimeError("operation not permitted when stream is capturing\nmore")
    graphs = TapeGraphs(error)
    made, plain = make_pipeline(model, tokenizer, graphs), make_pipeline(model, tokenizer)
    for request in (replace(REQUEST, num_samples=2), REQUEST, replace(REQUEST, ddim_steps=3, eta=0.5)):
        found = made.generate(picture, request)
        assert_same(found, plain.generate(picture, request))
        (warning,) = found.receipt.warnings
        assert "without a CUDA graph" in warning
        assert "operation not permitted when stream is capturing; then ending it failed" in warning
        assert "more" not in warning
    assert graphs.attempts == 1
    made.prepare(exact_plan(SCHEDULE, 6))
    assert graphs.attempts == 1


def _writes(name: str) -> Any:
    """Whether an operation writes the tensor of a name in the workspace under test."""

    def check(op: Op) -> bool:
        target = op.arguments[0] if op.arguments else None
        in_place = op.function._schema.name in ("aten::copy_", "aten::zero_")
        return in_place and isinstance(target, torch.Tensor) and target.data_ptr() == ADDRESSES[name]

    return check


ADDRESSES: Dict[str, int] = {}
INSIDE = ("token_ids", "canny", "control_scales", "guidance_scale", "keys_values", "hint_features", "noise_0")
OUTSIDE = ("latent_0 on the host", "image on the host")


@pytest.mark.parametrize("name", [*INSIDE, *OUTSIDE])
def test_a_replay_that_is_not_the_run(name: str, model: ControlLDM, tokenizer: Tokenizer, picture: np.ndarray) -> None:
    """A graph without one of the writes would give the captured image for the captured request, from memory."""
    graphs = TapeGraphs(loses=_writes(name))
    made, plain = make_pipeline(model, tokenizer, graphs), make_pipeline(model, tokenizer)
    space = made.workspace
    ADDRESSES.update({key: space[key].data_ptr() for key in INSIDE})
    ADDRESSES.update({key: space.host(key.split()[0]).data_ptr() for key in OUTSIDE})
    request = replace(REQUEST, num_samples=2)
    found = made.generate(picture, request)
    assert len(graphs.tapes) == 1
    assert graphs.tapes[0].ops is None, "the graph was kept"
    assert "something else than the run" in found.receipt.warnings[0]
    # The second sample was made in memory that the attempt had poisoned.
    assert_same(found, plain.generate(picture, request))
    assert_same(made.generate(picture, replace(request, seed=8)), plain.generate(picture, replace(request, seed=8)))


def test_a_launch_that_fails(model: ControlLDM, tokenizer: Tokenizer, picture: np.ndarray) -> None:
    graphs = TapeGraphs()
    made = make_pipeline(model, tokenizer, graphs)
    capture = graphs.capture

    def without_room(enqueue: Any) -> Any:
        tape = capture(enqueue)

        def launch() -> None:
            raise CudaError("cudaGraphLaunch failed: out of memory")

        tape.launch = launch  # type: ignore[method-assign]
        return tape

    graphs.capture = without_room  # type: ignore[method-assign]
    found = made.generate(picture, REQUEST)
    assert "out of memory" in found.receipt.warnings[0]
    assert graphs.tapes[0].ops is None
    assert_same(found, make_pipeline(model, tokenizer).generate(picture, REQUEST))


@pytest.mark.parametrize("during", ["generate", "prepare"])
def test_an_error_comes_out_when_the_stream_is_done(
    during: str, model: ControlLDM, tokenizer: Tokenizer, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pipelines of other sizes work in the same memory on other streams. A wait that fails hides no error."""
    made, events = make_pipeline(model, tokenizer, TapeGraphs()), []

    def wait() -> None:
        events.append("waited")
        raise CudaError("the stream is broken")

    def fail(bound: BoundModule) -> None:
        events.append("enqueued")
        if len(events) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(made._stream, "wait", wait)
    monkeypatch.setattr(BoundModule, "enqueue", fail)
    with pytest.raises(KeyboardInterrupt):
        made.generate(picture, REQUEST) if during == "generate" else made.prepare(exact_plan(SCHEDULE, 4))
    assert events == ["enqueued", "enqueued", "enqueued", "waited"]


def test_few_graphs_are_kept(
    model: ControlLDM, tokenizer: Tokenizer, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that was used least recently goes, with what it holds; its length is captured anew."""
    monkeypatch.setattr(pipeline, "KEPT_SCHEDULES", 2)
    graphs = TapeGraphs()
    made = make_pipeline(model, tokenizer, graphs)
    first = made.generate(picture, replace(REQUEST, ddim_steps=1))
    for steps in (2, 1, 3):
        made.generate(picture, replace(REQUEST, ddim_steps=steps))
    assert [tape.ops is not None for tape in graphs.tapes] == [True, False, True]
    assert_same(made.generate(picture, replace(REQUEST, ddim_steps=1)), first)
    assert graphs.attempts == 3
    made.generate(picture, replace(REQUEST, ddim_steps=2))
    assert graphs.attempts == 4
    made.close()
    assert all(tape.ops is None for tape in graphs.tapes)


def test_close_frees_all_also_after_an_error(model: ControlLDM, tokenizer: Tokenizer, picture: np.ndarray) -> None:
    graphs, order = TapeGraphs(), []
    made = make_pipeline(model, tokenizer, graphs)
    made.generate(picture, REQUEST)
    for name, session in made.sessions.items():
        session.close = lambda name=name: order.append(name)  # type: ignore[method-assign]

    def fail() -> None:
        order.append("graph")
        raise CudaError("cudaGraphExecDestroy failed")

    graphs.tapes[0].close = fail  # type: ignore[method-assign]
    with pytest.raises(CudaError, match="ExecDestroy"):
        made.close()
    assert order[0] == "graph"
    assert set(order[1:]) == {"text", "hint", "time", "step", "decode"}
    with pytest.raises(KeyError):
        made.workspace["image"]


def test_what_cannot_be_made_is_closed(model: ControlLDM, tokenizer: Tokenizer) -> None:
    closed = []

    class Refusing:
        spec = graph_specs(Build(model.config, SIZE, SIZE))["text"]

        def bind(self, buffers: Any) -> Any:
            raise MemoryError("no room")

        def close(self) -> None:
            closed.append(self)

    build = Build(model.config, SIZE, SIZE)
    with pytest.raises(MemoryError, match="no room"):
        Pipeline(build, dict.fromkeys(graph_specs(build), Refusing()), tokenizer, About("", "", ""))
    assert len(closed) == 5


# -- the CUDA runtime --------------------------------------------------------------------------------------------------


class Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorStreamCaptureInvalidated = 901


class FakeRuntime:
    """cuda-python's runtime API with answers that succeed, but for one function."""

    cudaError_t = Status
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread local")

    def __init__(self, failing: str = "") -> None:
        self.calls: List[Tuple[Any, ...]] = []
        self._failing = failing

    def __getattr__(self, name: str) -> Any:
        answers = {
            "cudaStreamEndCapture": ("graph",),
            "cudaGraphInstantiateWithFlags": ("executable",),
            "cudaGraphGetNodes": ([], 42),
            "cudaGetErrorString": (b"its own words",),
        }

        def function(*arguments: Any) -> Tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if name == self._failing:
                return (Status.cudaErrorMemoryAllocation, *(None for _ in answers.get(name, ())))
            return (Status.cudaSuccess, *answers.get(name, ()))

        return function


CAPTURE = [
    ("cudaStreamBeginCapture", 7, "thread local"),
    ("work",),
    ("cudaStreamEndCapture", 7),
    ("cudaGraphGetNodes", "graph"),
    ("cudaGraphInstantiateWithFlags", "graph", 0),
    ("cudaGraphDestroy", "graph"),
]


def capture_on(fake: FakeRuntime) -> Any:
    return CudaRuntimeGraphs(CudaRuntime(fake), lambda: 7).capture(lambda: fake.calls.append(("work",)))


def test_the_calls_of_a_capture() -> None:
    fake = FakeRuntime()
    graph = capture_on(fake)
    assert fake.calls == CAPTURE
    assert graph.nodes == 42
    graph.launch()
    graph.close()
    graph.close()
    assert fake.calls[len(CAPTURE) :] == [("cudaGraphLaunch", "executable", 7), ("cudaGraphExecDestroy", "executable")]


@pytest.mark.parametrize("failing", [call[0] for call in CAPTURE if call[0] != "work"])
def test_a_call_of_a_capture_fails(failing: str) -> None:
    """The message has all that CUDA says, and a graph that was made is destroyed."""
    fake = FakeRuntime(failing)
    with pytest.raises(CudaError, match=rf"{failing} failed: cudaErrorMemoryAllocation \(its own words\)"):
        capture_on(fake)
    names = [call[0] for call in fake.calls]
    assert ("cudaGraphDestroy" in names) == (failing not in ("cudaStreamBeginCapture", "cudaStreamEndCapture"))
    if failing == "cudaStreamEndCapture":
        assert "cudaGetLastError" in names


def test_work_that_fails_under_capture() -> None:
    """The capture is ended, so that the stream runs again, and the work's own error comes through."""
    fake = FakeRuntime()

    def work() -> None:
        raise KeyError("the engine of step does not run")

    with pytest.raises(KeyError, match="the engine of step"):
        CudaRuntimeGraphs(CudaRuntime(fake), lambda: 7).capture(work)
    assert [call[0] for call in fake.calls[1:]] == ["cudaStreamEndCapture", "cudaGraphDestroy", "cudaGetLastError"]


def test_a_launch_that_cuda_refuses() -> None:
    graph = capture_on(FakeRuntime("cudaGraphLaunch"))
    with pytest.raises(CudaError, match="cudaGraphLaunch failed"):
        graph.launch()


def test_calls_against_the_real_module() -> None:
    """Names, numbers of arguments and conversions; without a driver each call gives an error's status, never more."""
    real = pytest.importorskip("cuda.bindings.runtime")
    mode = real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    arguments = {
        "cudaStreamBeginCapture": ("stream", mode),
        "cudaStreamEndCapture": ("stream",),
        "cudaGraphGetNodes": ("graph",),
        "cudaGraphInstantiateWithFlags": ("graph", 0),
        "cudaGraphLaunch": ("graphExec", "stream"),
        "cudaGraphExecDestroy": ("graphExec",),
        "cudaGraphDestroy": ("graph",),
        "cudaGetLastError": (),
    }
    for name, given in arguments.items():
        signature = getattr(real, name).__doc__.splitlines()[0]
        words = [
            word.split(":")[0].split("=")[0].split()[-1] for word in signature.split("(")[1][:-1].split(",") if word
        ]
        named = [word for word in given if isinstance(word, str)]
        assert words[: len(named)] == named, signature
        assert len(given) <= len(words), signature
    if not torch.cuda.is_available():
        with pytest.raises(CudaError, match=r"cudaStreamEndCapture failed: cudaError\w+ \(\w.*\)"):
            CudaRuntime().end_capture(1)


@pytest.mark.parametrize("found", ["cuda.bindings.runtime", "cuda.cudart", None])
def test_where_cuda_python_has_its_runtime(found: Optional[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRuntime()
    tried = []

    def import_module(name: str) -> Any:
        tried.append(name)
        if name != found:
            raise ModuleNotFoundError(name)
        return fake

    monkeypatch.setattr(importlib, "import_module", import_module)
    if found is None:
        with pytest.raises(CudaError, match="pip install cuda-python"):
            CudaRuntime()
    else:
        CudaRuntime().launch("executable", 7)
        assert fake.calls == [("cudaGraphLaunch", "executable", 7)]
        assert tried[-1] == found


@pytest.mark.parametrize(("driver", "problem"), [(11040, True), (12090, False), (13000, False), (0, False)])
def test_a_driver_that_is_too_old(driver: int, problem: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(cudaError_t=Status, cudaDriverGetVersion=lambda: (Status.cudaSuccess, driver))
    monkeypatch.setattr(cuda_runtime, "load_module", lambda: module)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    wanted = "the driver runs CUDA 11.4 at most, and this torch is for CUDA 12.8: update the driver"
    assert cuda_runtime.driver_problem() == (wanted if problem else None)


def test_the_default_stream_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    with pytest.raises(CudaError, match="default stream"):
        cuda_runtime.current_stream("cuda:0")
    stream.cuda_stream = 94
    assert cuda_runtime.current_stream("cuda:0") == 94


class FakeStream:
    """`torch.cuda.Stream`."""

    def __init__(self, device: torch.device) -> None:
        self.waited = 0

    def synchronize(self) -> None:
        self.waited += 1


def test_streams_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS keeps memory for each stream that it has seen."""
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(runtime_stream, "_idle", {})
    one, two = (runtime_stream.make_stream("cuda") for _ in range(2))
    assert isinstance(one, runtime_stream.CudaStream)
    assert isinstance(two, runtime_stream.CudaStream)
    first, second = one._stream, two._stream
    assert first is not second
    one.wait()
    assert (first.waited, second.waited) == (1, 0)
    one.close()
    one.close()
    three, other = runtime_stream.make_stream("cuda"), runtime_stream.make_stream("cuda:1")
    assert three._stream is first  # type: ignore[attr-defined]
    assert other._stream not in (first, second)  # type: ignore[attr-defined]


# -- PyTorch's graphs --------------------------------------------------------------------------------------------------


class FakeTorchGraph:
    """`torch.cuda.CUDAGraph` of a PyTorch that can keep the graph, or of one that cannot."""

    can_keep = True
    made: List[FakeTorchGraph] = []

    def __init__(self, **options: Any) -> None:
        if options and not self.can_keep:
            raise TypeError("unexpected keyword argument 'keep_graph'")
        self.calls: List[str] = []
        self.captured: Dict[str, Any] = {}
        FakeTorchGraph.made.append(self)

    def pool(self) -> str:
        assert "reset" not in self.calls, "the pool of a graph that is gone"
        return f"pool {id(self)}"

    def raw_cuda_graph(self) -> int:
        if not self.can_keep:
            raise AttributeError("raw_cuda_graph")
        return 5

    def __getattr__(self, name: str) -> Any:
        if name not in ("replay", "reset") and not (name == "instantiate" and self.can_keep):
            raise AttributeError(name)
        return lambda: self.calls.append(name)


class FakeCapture:
    """`torch.cuda.graph`."""

    def __init__(self, graph: FakeTorchGraph, **options: Any) -> None:
        graph.captured = options

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        pass


@pytest.mark.parametrize("can_keep", [True, False])
def test_graphs_of_torch_share_a_pool_while_one_lives(can_keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTorchGraph, "can_keep", can_keep)
    monkeypatch.setattr(FakeTorchGraph, "made", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeTorchGraph)
    monkeypatch.setattr(torch.cuda, "graph", FakeCapture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream")
    monkeypatch.setattr(cuda_runtime, "load_module", FakeRuntime)
    graphs, ran = TorchGraphs(), []
    first, second = (graphs.capture(lambda: ran.append(1)) for _ in range(2))
    made = FakeTorchGraph.made
    made[:] = [graph for graph in made if graph.captured]
    assert [graph.captured["pool"] for graph in made] == [None, made[0].pool()]
    assert {(graph.captured["stream"], graph.captured["capture_error_mode"]) for graph in made} == {
        ("stream", "thread_local")
    }
    assert first.nodes == (42 if can_keep else None)
    assert len(ran) == 2
    first.launch()
    first.close()
    first.close()
    assert made[0].calls == [*(["instantiate"] if can_keep else []), "replay", "reset"]
    graphs.capture(lambda: None)
    assert made[-1].captured["pool"] == made[1].pool()
    second.close()
