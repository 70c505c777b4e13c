"""What only a CUDA device can show; skipped elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import numpy as np
import pytest

from canny2image_TRT import hackathon
from cldm.config import ModelConfig
from cldm.request import Request
from cldm.result import Result
from cldm.weights import Weights
from deploy.spec import GraphSpec
from ldm.plans import SamplingPlan, linear_plan, subset_plan
from ldm.schedule import ScheduleConfig
from scoring.pictures import OWN_FOLDER

pytestmark = pytest.mark.gpu

REQUEST = Request("a bird", "best quality", "lowres", ddim_steps=20, seed=2946901, eta=0.3, num_samples=2)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """A photograph, as the score has them."""
    import cv2

    return cv2.imread(str(OWN_FOLDER / "eagle.jpg"))


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def make_engine(**options: Any) -> hackathon:
    hk = hackathon()
    hk.initialize(**{"model": "tiny", **options})
    return hk


@pytest.fixture(scope="module", autouse=True)
def _with_trained_weights(tiny_weights: Weights) -> None:
    """Errors of the tiny model are those of the weights that ship."""


def test_cuda_is_chosen_by_itself(picture: np.ndarray) -> None:
    hk = make_engine()
    assert "backend torch on cuda in fp16" in hk.summary
    receipt = hk.run(picture, REQUEST).receipt
    assert (receipt.backend, receipt.device, receipt.precision) == ("torch", "cuda", "fp16")
    assert receipt.milliseconds["total"] > 0
    assert "tensorrt" in receipt.backend_reason
    hk.close()


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 5e-5), ("fp16", 2e-2), ("bf16", 2e-1)])
def test_tiny_on_cuda_against_its_reference(picture: np.ndarray, precision: str, bound: float) -> None:
    hk = make_engine(precision=precision)
    found, wanted = hk.run(picture, REQUEST), hk.reference(picture, REQUEST)
    error = relative(found.latent, wanted.latent)
    print(f"tiny {precision}: latent error {error:.2e} after 20 steps at guidance scale {REQUEST.guidance_scale:g}")
    assert error < bound
    assert np.array_equal(hk.run(picture, REQUEST).images, found.images), "a second run gave other bits"
    hk.close()


def test_noise_on_cuda_is_that_of_the_original() -> None:
    import torch

    from cldm.noise import draw_noise

    shape = (2, 4, 32, 48)
    initial, noise = draw_noise(7, shape, 3, 0.5, "cuda")
    torch.manual_seed(7)
    assert torch.equal(initial, torch.randn(shape, device="cuda"))
    assert noise is not None and all(torch.equal(n, torch.randn(shape, device="cuda")) for n in noise)


def test_reference_on_cuda_is_that_of_the_cpu(picture: np.ndarray) -> None:
    """From the same initial latent: the devices draw different noise."""
    import torch

    noise = torch.randn((1, 4, 32, 48), generator=torch.Generator().manual_seed(1))
    request = Request("a bird", ddim_steps=20, seed=1)
    latents = []
    for device in ("cuda", "cpu"):
        hk = make_engine(backend="torch", device=device, precision="fp32")
        latents.append(hk.reference(picture, request, latents=noise).latent)
        hk.close()
    error = relative(latents[0], latents[1])
    print(f"tiny's reference on CUDA and on the CPU: latent error {error:.2e}")
    assert error < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("fp16", 5e-2)])
def test_sd15_size_on_cuda(picture: np.ndarray, precision: str, bound: float) -> None:
    request = Request("a bird", ddim_steps=20, seed=1)
    hk = make_engine(model="sd15", random_weights=1, precision=precision)
    found, wanted = hk.run(picture, request), hk.reference(picture, request)
    print(f"sd15 {precision}: latent error {relative(found.latent, wanted.latent):.2e} after 20 steps")
    print({stage: round(ms, 1) for stage, ms in hk.run(picture, request).receipt.milliseconds.items()})
    assert relative(found.latent, wanted.latent) < bound
    hk.close()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_export_traced_on_cuda(precision: str, tiny_config: ModelConfig, tiny_weights: Weights, tmp_path: Path) -> None:
    """Its check against ONNX Runtime on the CPU is part of the export."""
    pytest.importorskip("polygraphy")
    from cldm.checkpoint import load_model
    from deploy.export import export_all
    from deploy.spec import Build

    build = Build(tiny_config, 256, 384, 1, precision)
    rows = export_all(build, tiny_weights, lambda: load_model(tiny_config, tiny_weights), tmp_path, report=print)
    errors: Dict[str, Any] = {row.graph: row.error for row in rows}
    print(precision, errors)
    assert set(errors) == {"text", "hint", "time", "step", "decode"}


# -- one CUDA graph an image -------------------------------------------------------------------------------------------

SCHEDULE = ScheduleConfig()
# In this order on one pipeline: most of them run on a graph that was captured for another.
CASES: Dict[str, Tuple[Dict[str, Any], Optional[SamplingPlan]]] = {
    "first": ({}, None),
    "again": ({}, None),
    "seed": ({"seed": 4}, None),
    "prompt": ({"prompt": "a red house", "negative_prompt": ""}, None),
    "strength": ({"strength": 0.3}, None),
    "no control": ({"strength": 0}, None),
    "guess mode": ({"guess_mode": True}, None),
    "guidance": ({"guidance_scale": 3}, None),
    "one step": ({"ddim_steps": 1}, None),
    "twenty steps": ({"ddim_steps": 20}, None),
    "subset of twenty": ({"ddim_steps": 20}, subset_plan(SCHEDULE, 20, (19, 13, 6, 0))),
    "line through two": ({"ddim_steps": 20}, linear_plan(SCHEDULE, 20, (19, 13, 6, 0))),
    "other edges": ({"low_threshold": 1, "high_threshold": 20}, None),
    "fresh noise": ({"eta": 0.5}, None),
    "fresh noise, other seed": ({"eta": 1.0, "seed": 9}, None),
    "three samples": ({"num_samples": 3, "seed": 5}, None),
    "three samples, fresh noise": ({"num_samples": 3, "eta": 0.5}, None),
    "last": ({}, None),
}
SHORT = Request("a bird", "best quality", "lowres", ddim_steps=4, seed=3)


def assert_same(found: Result, wanted: Result) -> None:
    assert np.array_equal(found.latent, wanted.latent)
    assert len(found.images) == len(wanted.images)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found.images, wanted.images))


def pipeline_of(hk: hackathon) -> Any:
    (pipeline,) = hk._pipelines.values()
    return pipeline


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_replayed_images_are_those_of_no_graph(samples: int, precision: str, picture: np.ndarray) -> None:
    captured = make_engine(backend="torch", precision=precision, samples=samples)
    plain = make_engine(backend="torch", precision=precision, samples=samples, cuda_graph=False)
    launched = []
    for name, (changes, plan) in CASES.items():
        request = replace(SHORT, **changes)
        found, wanted = (engine.run(picture, request, plan=plan) for engine in (captured, plain))
        assert not found.receipt.warnings, name
        assert_same(found, wanted)
        assert "device" not in wanted.receipt.milliseconds
        launched.append("capture" not in found.receipt.milliseconds)
        shown = {stage: round(took, 2) for stage, took in found.receipt.milliseconds.items()}
        print(f"{name}: {shown}, without a graph {wanted.receipt.milliseconds['total']:.2f} ms")
    # 4 evaluations, 1, and 4 with noise of their own; the graph of 20 is there since initialize().
    assert launched.count(False) == 3
    nodes = {key: schedule.graph.nodes for key, schedule in pipeline_of(captured)._schedules.items()}
    print(f"nodes of the graphs by evaluations and fresh noise: {nodes}")
    for engine in (captured, plain):
        engine.close()


def test_the_contest_call_is_launched_from_the_first_image_on(picture: np.ndarray) -> None:
    hk = make_engine()
    for _ in range(3):
        milliseconds = hk.run(picture, Request("a bird", ddim_steps=20, seed=1)).receipt.milliseconds
        assert set(milliseconds) == {"host", "schedule", "device", "total"}
        assert milliseconds["device"] > 0
        print({stage: round(took, 2) for stage, took in milliseconds.items()})
    hk.close()


def test_progress_does_without_a_graph(picture: np.ndarray) -> None:
    hk, seen = make_engine(), []
    shown = hk.run(picture, SHORT, progress=lambda done, total: seen.append((done, total)))
    assert "steps" in shown.receipt.milliseconds
    assert seen == [(i, 4) for i in range(1, 5)]
    assert_same(hk.run(picture, SHORT), shown)
    assert_same(hk.run(picture, SHORT), shown)
    hk.close()


def test_images_in_a_row_take_no_memory(picture: np.ndarray) -> None:
    """1,000 images: the device's memory is the same after them, and the first and the last image are."""
    import torch

    hk = make_engine()
    request = replace(SHORT, seed=1)
    first = hk.run(picture, request)
    hk.run(picture, replace(request, eta=0.5))
    for seed in range(20):
        hk.run(picture, replace(request, seed=seed, num_samples=1 + seed % 2, eta=0.5 * (seed % 3 == 0)))
    torch.cuda.synchronize()

    def used() -> Tuple[int, int, int]:
        free, _ = torch.cuda.mem_get_info()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), free

    before = used()
    for seed in range(1000):
        hk.run(picture, replace(request, seed=seed, num_samples=1 + seed % 2, eta=0.5 * (seed % 3 == 0)))
        if seed % 100 == 99:
            torch.cuda.synchronize()
            assert used() == before, f"after {seed + 1} images"
    assert_same(hk.run(picture, request), first)
    hk.close()


def test_dropped_graphs_give_their_memory_back(picture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many schedule lengths in turn, far more than are kept, and all of them again."""
    import torch

    monkeypatch.setattr("runtime.pipeline.KEPT_SCHEDULES", 2)
    hk = make_engine()
    wanted, reserved = {}, []
    for _ in range(3):
        for steps in (1, 2, 3, 4, 5):
            found = hk.run(picture, replace(SHORT, ddim_steps=steps))
            assert not found.receipt.warnings
            assert_same(found, wanted.setdefault(steps, found))
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert len(pipeline_of(hk)._schedules) == 2
    assert reserved[2] <= reserved[1], "each round holds more than the one before"
    hk.close()


def test_close_frees_the_device(picture: np.ndarray) -> None:
    import gc

    import torch

    def allocated() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    hk = make_engine()
    hk.run(picture, SHORT)
    hk.close()
    before = allocated()  # what libraries keep for good is there after the first time
    for _ in range(3):
        hk = make_engine()
        hk.run(picture, SHORT)
        hk.close()
        assert allocated() <= before


def test_a_session_that_cannot_be_captured(picture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the device, which breaks a capture: images are as without one, and the stream goes on."""
    import torch

    from runtime.torch_session import BoundModule

    # In half precision the fused sessions run, which have no module to wait in.
    plain = make_engine(precision="fp32", cuda_graph=False)
    wanted = [plain.run(picture, replace(SHORT, seed=seed, num_samples=2)) for seed in range(3)]
    plain.close()
    hk = make_engine(precision="fp32", cuda_graph=True)
    enqueue = BoundModule.enqueue

    def waiting(bound: BoundModule) -> None:
        enqueue(bound)
        torch.cuda.current_stream().synchronize()

    monkeypatch.setattr(BoundModule, "enqueue", waiting)
    for seed in range(3):
        found = hk.run(picture, replace(SHORT, seed=seed, num_samples=2))
        assert_same(found, wanted[seed])
        (warning,) = found.receipt.warnings
        assert "without a CUDA graph" in warning
    print(warning)
    monkeypatch.setattr(BoundModule, "enqueue", enqueue)
    hk.close()
    again = make_engine(precision="fp32")
    found = again.run(picture, replace(SHORT, seed=2, num_samples=2))
    assert_same(found, wanted[2])
    assert not found.receipt.warnings
    again.close()


# -- the CUDA runtime's capture, as TensorRT's sessions use it ---------------------------------------------------------


class Affine:
    """A session that allocates nothing as it runs: each output is a few operations with given outputs on its inputs."""

    def __init__(self, spec: GraphSpec) -> None:
        self.spec = spec
        self.breaks = False

    def bind(self, buffers: Mapping[str, Any]) -> AffineBound:
        return AffineBound(self, buffers)

    def close(self) -> None:
        """It holds nothing."""


class AffineBound:
    def __init__(self, session: Affine, buffers: Mapping[str, Any]) -> None:
        import torch

        self._session = session
        spec = session.spec
        self._inputs = [buffers[name].reshape(-1) for name in spec.inputs]
        self._outputs = [buffers[name].reshape(-1) for name in spec.outputs]
        size = max(tensor.numel() for tensor in self._outputs)
        self._sum, self._term = (torch.zeros(size, device=self._outputs[0].device) for _ in range(2))

    def enqueue(self) -> None:
        import torch

        for number, output in enumerate(self._outputs):
            total, term = self._sum[: output.numel()], self._term[: output.numel()]
            total.fill_(0.1 * number)
            for weight, tensor in enumerate(self._inputs, 1):
                count = min(tensor.numel(), output.numel())
                term[:count].copy_(tensor[:count])
                torch.mul(term[:count], 0.3 / weight, out=term[:count])
                torch.add(total[:count], term[:count], out=total[:count])
            torch.sin(total, out=total)
            if output.dtype == torch.uint8:
                torch.mul(total, 100, out=total)
                torch.abs(total, out=total)
            output.copy_(total)
        if self._session.breaks:
            torch.cuda.current_stream().synchronize()


@pytest.fixture
def affine(tiny_config: ModelConfig) -> Callable[..., Any]:
    """Makes a pipeline of such sessions, with or without graphs of the CUDA runtime."""
    from cldm.tokenizer import Tokenizer
    from deploy.spec import Build, graph_specs
    from runtime.cuda_graph import CudaRuntimeGraphs
    from runtime.cuda_runtime import CudaRuntime, current_stream
    from runtime.pipeline import About, Pipeline

    build = Build(tiny_config, 256, 384, 1, "fp16")

    def make(with_graphs: bool) -> Any:
        pytest.importorskip("cuda")
        graphs = CudaRuntimeGraphs(CudaRuntime(), lambda: current_stream("cuda")) if with_graphs else None
        sessions = {name: Affine(spec) for name, spec in graph_specs(build).items()}
        about = About("none", "test", "test")
        return Pipeline(build, sessions, Tokenizer(tiny_config), about, "cuda", graphs)

    return make


def test_capture_by_the_cuda_runtime(affine: Callable[..., Any], picture: np.ndarray) -> None:
    import torch

    captured, plain = affine(True), affine(False)
    for name, (changes, plan) in CASES.items():
        request = replace(SHORT, **changes)
        found, wanted = (pipeline.generate(picture, request, plan=plan) for pipeline in (captured, plain))
        assert not found.receipt.warnings, name
        assert_same(found, wanted)
    different = {plain.generate(picture, replace(SHORT, seed=seed)).images[0].tobytes() for seed in range(3)}
    assert len(different) == 3, "the sessions do not depend on their inputs, so equality shows nothing"
    for key, schedule in captured._schedules.items():
        print(f"{key}: {schedule.graph.nodes} nodes")
        # Each step is several kernels, and four inputs are uploaded and two outputs downloaded.
        assert schedule.graph.nodes > 10 * key[0] + 6
    captured.generate(picture, SHORT)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    for _ in range(100):
        captured.generate(picture, SHORT)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]) == before
    captured.close()
    plain.close()


def test_a_capture_that_breaks_leaves_the_stream_usable(affine: Callable[..., Any], picture: np.ndarray) -> None:
    broken, plain = affine(True), affine(False)
    broken.sessions["step"].breaks = True
    wanted = plain.generate(picture, SHORT)
    for _ in range(2):
        found = broken.generate(picture, SHORT)
        assert "without a CUDA graph" in found.receipt.warnings[0]
        assert_same(found, wanted)
    print(found.receipt.warnings[0])
    broken.close()
    healthy = affine(True)
    for _ in range(2):
        found = healthy.generate(picture, SHORT)
        assert not found.receipt.warnings
        assert_same(found, wanted)
    healthy.close()
    plain.close()
