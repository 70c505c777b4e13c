"""Export of the deployable graphs to ONNX: traced, simplified, checked against PyTorch, and only then put in place."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import inspect
import logging
import os
import shutil
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import nn

from cldm.files import locked, naming_full_disk, require_room
from cldm.model import ControlLDM
from cldm.weights import Weights
from deploy.graphs import build_graph
from deploy.manifest import ArtefactError, check_artefact, identity, manifest_path, write_manifest
from deploy.spec import Build, GraphSpec, TensorSpec, graph_specs
from deploy.tracing import fast_half_convolution
from ldm.exact import exact_fp32

OPSET = 17
# Relative error ||onnx - torch|| / ||torch|| beyond which an exported graph is refused. In FP16 the two round at
# different places, and the bound only catches what is broken.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
TRACE_STEPS = 20

log = logging.getLogger(__name__)


class ExportError(RuntimeError):
    """An exported graph does not compute what PyTorch does."""


@dataclass(frozen=True)
class Exported:
    """One line of the export's table.

    Attributes
    ----------
    seconds : float
        What making it took now; 0 where the file was there already.
    error : float or None
        ONNX Runtime's relative error as measured when the file was made; None where it was made without the check.
    skipped : bool
        Whether the file was there already.
    """

    graph: str
    file: Path
    num_bytes: int
    nodes: int
    seconds: float
    error: Optional[float]
    skipped: bool


def export_all(
    build: Build,
    weights: Weights,
    load: Callable[[], ControlLDM],
    folder: Path,
    force: bool = False,
    check: bool = True,
    report: Callable[[str], None] = log.info,
    names: Optional[Sequence[str]] = None,
) -> List[Exported]:
    """Make the ONNX files of a build that are not there yet.

    Parameters
    ----------
    load : callable
        Gives the model; called only if something must be made.
    folder : Path
        Where the build's own folder is made.
    force : bool
        Make all files anew.
    check : bool
        Compare each with PyTorch before it is put in place.
    report : callable
        Takes a line of progress.
    names : sequence of str, optional
        Only these graphs.

    Raises
    ------
    ExportError
        A graph's output is further from PyTorch's than `TOLERANCE`.
    OSError
        The folder cannot be written or its disk is too full.
    """
    specs = [spec for spec in graph_specs(build).values() if names is None or spec.name in names]
    target = folder / build.folder_name
    cache = folder / ".hashes.json"

    def look(say: Callable[[str], None]) -> Dict[str, Optional[Exported]]:
        return {spec.name: None if force else _existing(build, spec, weights, target, cache, say) for spec in specs}

    results = look(report)
    if None in results.values():
        # Two runs must not delete each other's scratch folders; the second finds the work done.
        with locked(target, lambda: report(f"another process is exporting to {target}; waiting for it")):
            results = look(lambda line: None)
            stale = [spec for spec in specs if results[spec.name] is None]
            results.update(_export_stale(build, stale, weights, load, target, cache, check, report))
    return [row for row in results.values() if row is not None]


def _export_stale(
    build: Build,
    stale: List[GraphSpec],
    weights: Weights,
    load: Callable[[], ControlLDM],
    target: Path,
    cache: Path,
    check: bool,
    report: Callable[[str], None],
) -> Dict[str, Exported]:
    if not stale:
        return {}
    _make_room(build, stale, target)
    if check and importlib.util.find_spec("onnxruntime") is None:
        report("onnxruntime is not installed: the graphs will not be compared with PyTorch")
        check = False
    report(f"loading {build.config.name}: {weights}")
    # Tracing runs the network once, which a GPU does in no time.
    model = load().to("cuda" if torch.cuda.is_available() else "cpu")
    results = {}
    for i, spec in enumerate(stale):
        report(f"[{i + 1}/{len(stale)}] {spec.name}: exporting {target / spec.file}")
        with naming_full_disk(target / spec.file):
            results[spec.name] = _export_one(build, spec, weights, model, target, cache, check)
        gc.collect()
    return results


def _existing(
    build: Build, spec: GraphSpec, weights: Weights, target: Path, cache: Path, report: Callable[[str], None]
) -> Optional[Exported]:
    file = target / spec.file
    if not manifest_path(file).exists():
        return None
    try:
        manifest = check_artefact(file, identity(build, spec, weights), cache)
    except ArtefactError as reason:
        report(f"{spec.name}: {reason}")
        return None
    size = sum(int(entry["bytes"]) for entry in manifest["files"].values())
    return Exported(spec.name, file, size, int(manifest.get("nodes", 0)), 0.0, manifest.get("error"), True)


def _make_room(build: Build, stale: List[GraphSpec], target: Path) -> None:
    """Before an hour of work, see that its result can be written; rubbish of a killed run goes first."""
    for rubbish in target.glob(".export-*"):
        shutil.rmtree(str(rubbish), ignore_errors=True)
    with torch.device("meta"):
        model = ControlLDM(build.config)
        graphs = [build_graph(spec.name, model, build.precision, build.samples) for spec in stale]
    sizes = [sum(p.numel() * p.element_size() for p in graph.parameters()) for graph in graphs]
    # All files, and the weights of one graph more in the exporter's own; a tenth for what is not weights.
    require_room(target, int(1.1 * (sum(sizes) + max(sizes))))


def _export_one(
    build: Build, spec: GraphSpec, weights: Weights, model: ControlLDM, target: Path, cache: Path, check: bool
) -> Exported:
    import onnx

    from deploy.onnx_files import check_tensors, gather_external, has_external, simplify

    start = time.perf_counter()
    module = build_graph(spec.name, model, build.precision, build.samples)
    file = target / spec.file
    scratch = Path(tempfile.mkdtemp(prefix=".export-", dir=str(target)))
    try:
        proto = _trace(module, spec, build, scratch)
        proto = simplify(proto)
        check_tensors(proto, spec)
        members = [scratch / spec.file]
        if has_external(proto):
            members.append(scratch / f"{spec.file}.data")
            gather_external(proto, scratch / "traced", members[1])
        shutil.rmtree(str(scratch / "traced"))
        onnx.save(proto, str(members[0]))
        nodes = len(proto.graph.node)
        del proto
        onnx.checker.check_model(str(members[0]))
        error = compare(members[0], module, spec, build) if check else None
        placed = _put_in_place(file, members)
    finally:
        shutil.rmtree(str(scratch), ignore_errors=True)
    versions = {"torch": torch.__version__, "onnx": onnx.__version__, "opset": OPSET}
    seconds = time.perf_counter() - start
    extra = {"weights_source": str(weights), "nodes": nodes, "error": error, "seconds": seconds, "made_with": versions}
    write_manifest(file, {**identity(build, spec, weights), **extra}, placed, cache)
    return Exported(spec.name, file, sum(m.stat().st_size for m in placed), nodes, seconds, error, False)


def _put_in_place(file: Path, members: List[Path]) -> List[Path]:
    """Rename finished files into the build's folder; without a manifest, which comes last, they do not count."""
    with contextlib.suppress(FileNotFoundError):
        manifest_path(file).unlink()
    with contextlib.suppress(FileNotFoundError):
        file.with_name(file.name + ".data").unlink()
    placed = []
    for member in reversed(members):
        os.replace(str(member), str(file.with_name(member.name)))
        placed.append(file.with_name(member.name))
    return placed


def _trace(module: nn.Module, spec: GraphSpec, build: Build, scratch: Path) -> Any:
    """The module as an ONNX graph; weights beyond 2 GB stay in files under `scratch`/traced."""
    import onnx

    folder = scratch / "traced"
    folder.mkdir()
    path = folder / spec.file
    options: Dict[str, Any] = {
        "input_names": list(spec.inputs),
        "output_names": list(spec.outputs),
        "opset_version": OPSET,
        "dynamic_axes": {
            name: {axis: dim for axis, dim in enumerate(tensor.shape) if isinstance(dim, str)}
            for name, tensor in spec.tensors.items()
        },
    }
    # The TorchScript exporter: the one that every supported torch has and whose patterns the graph surgery knows.
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        options["dynamo"] = False
    args = _to_device(example_inputs(spec, build), module)
    with torch.no_grad(), fast_half_convolution(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the exporter's age and on shapes, which are constant here
        torch.onnx.export(module, args, str(path), **options)
    return onnx.load(str(path), load_external_data=False)


def example_inputs(spec: GraphSpec, build: Build, seed: int = 0) -> Dict[str, np.ndarray]:
    """Seeded inputs of the kind that a run gives the graph.

    Parameters
    ----------
    spec : GraphSpec
        In FP32 or FP16; NumPy has no bfloat16.
    """
    rng = np.random.default_rng(seed)
    special: Dict[str, Callable[[Tuple[int, ...]], np.ndarray]] = {
        "token_ids": lambda shape: rng.integers(0, build.config.text.vocab_size, shape),
        "timesteps": lambda shape: np.linspace(1, build.config.schedule.train_steps - 1, shape[0]),
        "canny": lambda shape: 255 * (rng.random(shape) < 0.1),
        "control_scales": np.ones,
        "guidance_scale": lambda shape: np.full(shape, 9.0),
        "coefficients": lambda shape: np.array([[1.05, -0.1, 0.01]]),
    }

    def make(name: str, tensor: TensorSpec) -> np.ndarray:
        shape = tuple(TRACE_STEPS if isinstance(dim, str) else dim for dim in tensor.shape)
        value = special[name](shape) if name in special else rng.standard_normal(shape, dtype=np.float32)
        return np.ascontiguousarray(value, dtype=tensor.dtype)

    return {name: make(name, tensor) for name, tensor in spec.inputs.items()}


def _to_device(inputs: Dict[str, np.ndarray], module: nn.Module) -> Tuple[torch.Tensor, ...]:
    device = next(module.parameters()).device
    return tuple(torch.from_numpy(value).to(device) for value in inputs.values())


def compare(file: Path, module: nn.Module, spec: GraphSpec, build: Build) -> float:
    """Largest relative error of ONNX Runtime's outputs against PyTorch's, on inputs that the trace did not see.

    Raises
    ------
    ExportError
        It is beyond `TOLERANCE`, or an output is not finite.
    """
    import onnxruntime

    inputs = example_inputs(spec, build, seed=1)
    with torch.no_grad(), fast_half_convolution(), exact_fp32():
        outputs = module(*_to_device(inputs, module))
    wanted = [t.float().cpu().numpy() for t in (outputs if isinstance(outputs, tuple) else (outputs,))]
    if not all(np.isfinite(w).all() for w in wanted):
        raise ExportError(f"{spec.name}: PyTorch's own output holds NaN or infinity; the weights are broken")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # A second, packed copy of the weights would not pay for one run.
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    found = [value.astype(np.float32) for value in session.run(list(spec.outputs), inputs)]
    errors = [_relative_error(f, w) for f, w in zip(found, wanted)]
    worst = max(errors)
    # One level of 255 apart is rounding, and is more than the bound on a float allows.
    one_level = 1.0 / 32 if any(t.dtype == "uint8" for t in spec.outputs.values()) else 0.0
    if not worst <= max(TOLERANCE[build.precision], one_level):  # NaN fails too
        raise ExportError(f"{spec.name}: ONNX Runtime differs from PyTorch by {worst:.2e} (relative); not installed")
    return worst


def _relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    difference, norm = float(np.linalg.norm(found - wanted)), float(np.linalg.norm(wanted))
    # An output of zeros, such as an untrained ControlNet's hint, has no scale to compare with.
    return difference / norm if norm > 0 else difference
