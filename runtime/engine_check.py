"""The check of an engine that was just built, and the search for its first wrong layer, by running it.

What they compare with is a run of the FP32 graphs on ONNX Runtime, recorded once a build. `deploy.gate` and
`deploy.bisect` do the comparing and know nothing of sessions; this gives them what they run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from cldm.weights import Weights
from deploy.bisect import comparable_tensors, first_divergence, makers_of, mark_outputs
from deploy.build_progress import BuildProgress
from deploy.engine_build import PlanJob, graph_for_tensorrt, serialise
from deploy.gate import (
    TOLERANCES,
    Arrays,
    GateError,
    Recorded,
    Recorder,
    check_engine,
    load_recording,
    recording_path,
    save_recording,
)
from deploy.manifest import ROOT, ArtefactError
from deploy.spec import Build, GraphSpec, graph_specs
from deploy.toolchain import Toolchain

# Of the recorded run; its first, middle and last step are kept.
RECORDED_STEPS = 20
KEPT_STEPS = (0, RECORDED_STEPS // 2, RECORDED_STEPS - 1)
PICTURE = ROOT / "pictures" / "eagle.jpg"

Report = Callable[[str], None]


@dataclass(frozen=True)
class Reference:
    """The FP32 run that engines of a build are compared with: made on first use, and kept on the disk.

    Attributes
    ----------
    build : Build
        Of the engines.
    folder : Path
        Of all builds.
    report : callable
        Takes a line of progress.
    """

    build: Build
    weights: Weights
    folder: Path
    report: Report

    @property
    def fp32(self) -> Build:
        return dataclasses.replace(self.build, precision="fp32")

    def spec(self, graph: str) -> GraphSpec:
        return graph_specs(self.fp32)[graph]

    def onnx(self, graph: str) -> Path:
        return self.folder / self.fp32.folder_name / self.spec(graph).file

    def load(self, graph: str) -> List[Recorded]:
        """The recorded calls of a graph; raises `ArtefactError` where they are not there."""
        file = recording_path(self.folder / self.fp32.folder_name, self.spec(graph))
        return load_recording(file, self.fp32, self.spec(graph), self.weights, self.folder / ".hashes.json")

    def make(self) -> None:
        """Run the FP32 graphs once on ONNX Runtime and keep what they read and wrote, unless it is kept already."""
        try:
            for graph in graph_specs(self.fp32):
                self.load(graph)
            return
        except ArtefactError as reason:
            self.report(f"running the FP32 graphs on ONNX Runtime, to compare the engines with: {reason}")
        hashes = self.folder / ".hashes.json"
        for graph, recorder in self._run().items():
            file = recording_path(self.folder / self.fp32.folder_name, self.spec(graph))
            save_recording(file, self.fp32, self.spec(graph), self.weights, recorder.kept, hashes)

    def _run(self) -> Dict[str, Recorder]:
        from cldm.checkpoint import load_model
        from cldm.request import Request
        from cldm.tokenizer import find_tokenizer
        from runtime.backends import OnnxRuntimeBackend
        from runtime.pipeline import About, Pipeline

        picture = _picture(self.fp32)
        tokenizer = find_tokenizer(self.build.config, self.weights, self.report)
        config = self.fp32.config
        backend = OnnxRuntimeBackend(
            self.weights, lambda: load_model(config, self.weights), self.folder, True, self.report
        )
        sessions = backend.sessions(self.fp32)
        recorders = {name: Recorder(one, KEPT_STEPS if name == "step" else (0,)) for name, one in sessions.items()}
        about = About(str(self.weights), backend.name, "to compare engines with")
        pipeline = Pipeline(self.fp32, recorders, tokenizer, about)
        with contextlib.closing(pipeline):
            shorter = min(self.fp32.height, self.fp32.width)
            samples = self.fp32.samples
            request = Request(
                "a bird", num_samples=samples, image_resolution=shorter, ddim_steps=RECORDED_STEPS, seed=1
            )
            pipeline.generate(picture, request)
        return recorders


def _picture(build: Build) -> np.ndarray:
    import cv2

    picture = cv2.imread(str(PICTURE))
    if picture is None:
        raise FileNotFoundError(f"{PICTURE}, which the check runs on, cannot be read; get it back with git checkout")
    return cv2.resize(picture, (build.width, build.height), interpolation=cv2.INTER_AREA)


class EngineRun:
    """A plan as a function of NumPy arrays.

    Parameters
    ----------
    plugin : Path or None
        The plugin library, for a plan that needs it.
    device : str
        "cuda", or "cpu" for a test double.
    """

    def __init__(self, plan: Path, spec: GraphSpec, plugin: Optional[Path], device: str = "cuda") -> None:
        from runtime.stream import make_stream
        from runtime.tensorrt_session import TensorRTRuntime, TensorRTSession

        self._spec = spec
        self._device = device
        self._stream = make_stream(device)
        self._runtime = TensorRTRuntime(device)
        try:
            if plugin is not None:
                self._runtime.load_plugin(plugin)
            self._session = TensorRTSession(plan, spec, self._runtime)
        except BaseException:
            self._runtime.close()
            raise

    def __call__(self, inputs: Arrays) -> Arrays:
        """Outputs by name of inputs by name, of the types and shapes of the graph."""
        import torch

        with self._stream.entered():
            buffers = {name: torch.from_numpy(value).to(self._device) for name, value in inputs.items()}
            for name, shape in self._output_shapes(inputs).items():
                dtype = self._spec.outputs[name].dtype
                # What an engine leaves unwritten shows: as NaN, and in a picture as levels that are not there.
                poison = float("nan") if dtype.startswith("float") else 255
                buffers[name] = torch.full(shape, poison, dtype=getattr(torch, dtype), device=self._device)
            self._session.bind(buffers).enqueue()
            self._stream.wait()
            return {name: buffers[name].cpu().numpy() for name in self._spec.outputs}

    def _output_shapes(self, inputs: Arrays) -> Dict[str, Tuple[int, ...]]:
        """Shapes of the outputs; a free axis is as long as that of an input."""
        free = {
            dim: inputs[name].shape[axis]
            for name, tensor in self._spec.inputs.items()
            for axis, dim in enumerate(tensor.shape)
            if isinstance(dim, str)
        }
        return {
            name: tuple(free[dim] if isinstance(dim, str) else dim for dim in tensor.shape)
            for name, tensor in self._spec.outputs.items()
        }

    def close(self) -> None:
        self._session.close()
        self._runtime.close()


def _plugin_of(job: PlanJob, tools: Toolchain) -> Optional[Path]:
    """The plugin library if the plan of a job needs it."""
    return tools.plugin_file() if job.options.needs_plugin(job.spec.name) else None


def check_plan_runs(plan: Path, job: PlanJob, tools: Toolchain, reference: Reference, device: str = "cuda") -> Any:
    """Compare a plan that is not installed yet with the recorded run; what its manifest is to say of that.

    Raises
    ------
    GateError
        An output is not what it should be; the message has the option that looks for the layer.
    """
    recorded = reference.load(job.spec.name)
    with contextlib.closing(EngineRun(plan, job.spec, _plugin_of(job, tools), device)) as engine:
        try:
            found = check_engine(job.spec, engine, recorded, job.build.precision)
        except GateError as error:
            raise GateError(
                f"{error}. The engine was not installed; find its first wrong layer with --bisect {job.spec.name}"
            ) from error
    for line in found.lines():
        reference.report(line)
    return found.to_json()


def bisect(job: PlanJob, tools: Toolchain, reference: Reference, device: str = "cuda") -> str:
    """Find the first layer of a graph's engine that diverges on the first recorded call; what was found, in words."""
    reference.make()
    call = reference.load(job.spec.name)[0]
    with graph_for_tensorrt(job, tools.version.major) as graph:
        names = comparable_tensors(graph, reference.onnx(job.spec.name))
        found = first_divergence(
            names,
            lambda marked: _run_marked(job, tools, graph, call.inputs, marked, reference.report, device),
            lambda marked: _run_reference(reference.onnx(job.spec.name), call.inputs, marked),
            TOLERANCES[job.build.precision],
            makers_of(graph),
            reference.report,
        )
    if found is None:
        return f"{job.spec.name}: no marked tensor diverges; without marks TensorRT may fuse otherwise"
    return f"{job.spec.name}: {found}"


def _run_marked(
    job: PlanJob,
    tools: Toolchain,
    graph: Path,
    inputs: Arrays,
    marked: Sequence[str],
    report: Report,
    device: str,
) -> Arrays:
    """Build an engine of a graph that gives the marked tensors, and run it."""
    with _marked(graph, marked) as (file, outputs), tempfile.TemporaryDirectory() as folder:
        spec = dataclasses.replace(job.spec, outputs=outputs)
        progress = BuildProgress(job.spec.name, None)
        plan = Path(folder) / "marked.plan"
        plan.write_bytes(serialise(dataclasses.replace(job, spec=spec), file, tools, progress, report))
        with contextlib.closing(EngineRun(plan, spec, _plugin_of(job, tools), device)) as engine:
            return engine({name: np.ascontiguousarray(inputs[name], t.dtype) for name, t in spec.inputs.items()})


def _run_reference(graph: Path, inputs: Arrays, marked: Sequence[str]) -> Arrays:
    """The marked tensors of an FP32 graph by ONNX Runtime."""
    import onnxruntime

    with _marked(graph, marked) as (file, _):
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        wanted = {value.name for value in session.get_inputs()}  # those that the marked tensors depend on
        found = session.run(list(marked), {name: value for name, value in inputs.items() if name in wanted})
    return dict(zip(marked, found))


@contextlib.contextmanager
def _marked(graph: Path, names: Sequence[str]) -> Iterator[Tuple[Path, Dict[str, Any]]]:
    """A graph with these outputs for the block, beside the one that it is made from; and what they are."""
    file = graph.with_name(f".{graph.name.strip('.')}.marked")
    try:
        yield file, mark_outputs(graph, file, names)
    finally:
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
