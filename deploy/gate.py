"""Whether an engine computes what ONNX Runtime does in FP32, on the inputs of a real run. No torch, no TensorRT here.

A run of the FP32 graphs is recorded once: inputs and outputs of each graph, of the step at several places of the
schedule. Each engine then gets those inputs in its own types, and one whose outputs are too far off, not finite, or
flat where they should not be is not installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from cldm.files import atomic_path
from cldm.weights import Weights
from deploy.manifest import ArtefactError, check_artefact, identity, write_manifest
from deploy.spec import Build, GraphSpec, TensorSpec

Arrays = Dict[str, np.ndarray]
# Runs an engine once: arrays of its inputs by name to arrays of its outputs by name.
Run = Callable[[Arrays], Arrays]

# Relative errors have the reference's magnitude below them, and no less than this part of its root mean square: near
# zero any error is a large part of nothing.
RELATIVE_FLOOR = 0.1
# An output is flat where it spreads less than this part of what the reference does.
FLAT = 1e-3


class GateError(RuntimeError):
    """An engine's outputs are not those of the graph."""


@dataclass(frozen=True)
class Tolerance:
    """How far an engine's output may be off.

    Attributes
    ----------
    norm : float
        L2 norm of the difference over the L2 norm of the reference.
    peak : float
        Largest difference over the root mean square of the reference: one wrong element among thousands hardly shows
        in the norm.
    levels : float
        Of an image: largest difference in levels of 255; the other two are not asked of one.
    """

    norm: float
    peak: float
    levels: float


# In FP16 ONNX Runtime itself is off by 9e-3 of the norm and 0.03 of the peak in the noise of the trained tiny model,
# where a guidance scale of 9 multiplies what the halves differ by; by 2e-4 and 4e-3 elsewhere, and by one level of 255.
TOLERANCES = {"fp32": Tolerance(1e-3, 1e-2, 2.0), "fp16": Tolerance(3e-2, 0.25, 8.0)}


@dataclass(frozen=True)
class Errors:
    """How far one output of one call is off.

    Attributes
    ----------
    absolute, relative : tuple of float
        Largest, mean and median of the differences of the elements, and of those over the reference's magnitudes.
    norm, peak : float
        As in `Tolerance`.
    """

    absolute: Tuple[float, float, float]
    relative: Tuple[float, float, float]
    norm: float
    peak: float


@dataclass(frozen=True)
class Recorded:
    """One call of a graph in the recorded run."""

    inputs: Arrays
    outputs: Arrays


@dataclass(frozen=True)
class GateReport:
    """The worst of each output over the recorded calls."""

    graph: str
    calls: int
    outputs: Dict[str, Errors]

    @property
    def worst(self) -> float:
        """The largest relative norm."""
        return max(errors.norm for errors in self.outputs.values())

    def to_json(self) -> Dict[str, Any]:
        return {
            "calls": self.calls,
            "outputs": {
                name: {
                    **dict(zip(("absolute_max", "absolute_mean", "absolute_median"), errors.absolute)),
                    **dict(zip(("relative_max", "relative_mean", "relative_median"), errors.relative)),
                    **{"norm": errors.norm, "peak": errors.peak},
                }
                for name, errors in self.outputs.items()
            },
        }

    def lines(self) -> List[str]:
        """For people: one line an output."""
        return [
            f"{self.graph}.{name}: absolute error {_three(errors.absolute)}, relative {_three(errors.relative)}"
            f" (max, mean, median), of the norm {errors.norm:.1e}"
            for name, errors in self.outputs.items()
        ]


def _three(values: Tuple[float, float, float]) -> str:
    return " ".join(f"{value:.1e}" for value in values)


# -- comparing -------------------------------------------------------------------------------------------------------


def errors_of(found: np.ndarray, reference: np.ndarray) -> Errors:
    """Error statistics of an output against its finite reference of the same shape, in double precision."""
    wanted = reference.astype(np.float64)
    difference = np.abs(found.astype(np.float64) - wanted)
    rms = float(np.sqrt(np.mean(wanted**2)))
    # Of a reference of zeros, such as an untrained ControlNet's hint, errors are told as they are.
    scale = np.maximum(np.abs(wanted), RELATIVE_FLOOR * rms) if rms else np.ones_like(wanted)
    relative = difference / scale
    absolute = (float(difference.max()), float(difference.mean()), float(np.median(difference)))
    error = float(np.sqrt(np.mean(difference**2)))
    return Errors(
        absolute,
        (float(relative.max()), float(relative.mean()), float(np.median(relative))),
        error / (rms or 1.0),
        absolute[0] / (rms or 1.0),
    )


def check_output(name: str, found: np.ndarray, reference: np.ndarray, tolerance: Tolerance) -> Errors:
    """The errors of one output.

    Raises
    ------
    GateError
        It has another shape or type, is not finite or flat, or is further off than is allowed.
    """
    if found.shape != reference.shape:
        raise GateError(f"{name} has the shape {found.shape}, and {reference.shape} in the graph")
    bad = found.size - int(np.isfinite(found).sum())
    if bad:
        kind = "NaN" if np.isnan(found).any() else "infinity"
        raise GateError(f"{name} holds {kind}: {bad} of {found.size} elements are not finite")
    spread, wanted_spread = (float(np.ptp(values.astype(np.float64))) for values in (found, reference))
    if spread < FLAT * wanted_spread:
        raise GateError(f"{name} is flat: it spreads over {spread:.1e}, and over {wanted_spread:.1e} in the graph")
    errors = errors_of(found, reference)
    if reference.dtype == np.uint8:
        if errors.absolute[0] > tolerance.levels:
            raise GateError(f"{name} is off by {errors.absolute[0]:.0f} of 255, allowed are {tolerance.levels:.0f}")
    elif errors.norm > tolerance.norm:
        raise GateError(f"{name} is off by {errors.norm:.1e} of its norm, allowed is {tolerance.norm:.1e}")
    elif errors.peak > tolerance.peak:
        raise GateError(
            f"{name} is off by {errors.peak:.1e} times its root mean square at its worst element, allowed is"
            f" {tolerance.peak:.1e}"
        )
    return errors


def check_engine(
    spec: GraphSpec, run: Run, recorded: Sequence[Recorded], precision: str, tolerance: Optional[Tolerance] = None
) -> GateReport:
    """Run an engine on recorded inputs and compare.

    Parameters
    ----------
    spec : GraphSpec
        Of the engine: the types that its inputs are converted to.
    precision : {"fp32", "fp16"}
        Of the engine; it decides what is allowed where `tolerance` does not.

    Raises
    ------
    GateError
        An output of a call is not what it should be; the message names call and output.
    """
    allowed = tolerance or TOLERANCES[precision]
    worst: Dict[str, Errors] = {}
    for number, call in enumerate(recorded, 1):
        inputs = {name: _as_type(call.inputs[name], tensor) for name, tensor in spec.inputs.items()}
        outputs = run(inputs)
        for name in spec.outputs:
            label = f"{spec.name}, recorded call {number} of {len(recorded)}: {name}"
            errors = check_output(label, outputs[name], call.outputs[name], allowed)
            worst[name] = errors if name not in worst else _worse(worst[name], errors)
    return GateReport(spec.name, len(recorded), worst)


def _as_type(value: np.ndarray, tensor: TensorSpec) -> np.ndarray:
    return np.ascontiguousarray(value, dtype=tensor.dtype)


def _worse(a: Errors, b: Errors) -> Errors:
    def larger(x: Tuple[float, float, float], y: Tuple[float, float, float]) -> Tuple[float, float, float]:
        return (max(x[0], y[0]), max(x[1], y[1]), max(x[2], y[2]))

    absolute, relative = larger(a.absolute, b.absolute), larger(a.relative, b.relative)
    return Errors(absolute, relative, max(a.norm, b.norm), max(a.peak, b.peak))


# -- recording -------------------------------------------------------------------------------------------------------


class Recorder:
    """A session that keeps what some of its calls read and wrote; stands in for the session in a pipeline.

    Parameters
    ----------
    session
        With `spec`, `bind` and `close`; its buffers are torch tensors on the CPU.
    wanted : sequence of int
        The numbers of the calls that are kept, from 0.
    """

    def __init__(self, session: Any, wanted: Sequence[int]) -> None:
        self.spec: GraphSpec = session.spec
        self.kept: List[Recorded] = []
        self._session = session
        self._wanted = frozenset(wanted)
        self._calls = 0

    def bind(self, buffers: Mapping[str, Any]) -> _RecordingBound:
        return _RecordingBound(self, self._session.bind(buffers), buffers)

    def close(self) -> None:
        self._session.close()

    def call(self, bound: Any, buffers: Mapping[str, Any]) -> None:
        """Run once; what was read is copied before, as a graph may write where another call reads."""
        number, self._calls = self._calls, self._calls + 1
        if number not in self._wanted:
            bound.enqueue()
            return
        inputs = {name: buffers[name].numpy().copy() for name in self.spec.inputs}
        bound.enqueue()
        self.kept.append(Recorded(inputs, {name: buffers[name].numpy().copy() for name in self.spec.outputs}))


class _RecordingBound:
    def __init__(self, recorder: Recorder, bound: Any, buffers: Mapping[str, Any]) -> None:
        self._recorder = recorder
        self._bound = bound
        self._buffers = buffers

    def enqueue(self) -> None:
        self._recorder.call(self._bound, self._buffers)


def recording_path(folder: Path, spec: GraphSpec) -> Path:
    """Where the recorded calls of a graph lie in the folder of the FP32 build."""
    return folder / f"{Path(spec.file).stem}.recorded.npz"


def save_recording(
    file: Path, build: Build, spec: GraphSpec, weights: Weights, recorded: Sequence[Recorded], cache: Optional[Path]
) -> None:
    """Write the calls of one graph of the FP32 build, and their manifest."""
    arrays = {
        f"{number} {side} {name}": value
        for number, call in enumerate(recorded)
        for side, values in (("in", call.inputs), ("out", call.outputs))
        for name, value in values.items()
    }
    with atomic_path(file) as temporary, open(temporary, "wb") as out:
        np.savez(out, **arrays)
    write_manifest(file, {**_recording_fields(build, spec, weights), "calls": len(recorded)}, [file], cache)


def load_recording(
    file: Path, build: Build, spec: GraphSpec, weights: Weights, cache: Optional[Path] = None
) -> List[Recorded]:
    """The recorded calls of a graph.

    Raises
    ------
    ArtefactError
        They are missing, damaged, or of another model, size or weights.
    """
    manifest = check_artefact(file, _recording_fields(build, spec, weights), cache)
    calls = int(manifest.get("calls", 0))
    with np.load(file) as arrays:
        wanted = {f"{n} {side} {name}" for n in range(calls) for side, names in _sides(spec) for name in names}
        if not calls or wanted != set(arrays.files):
            raise ArtefactError(f"{file} does not hold the recorded calls of {spec.name}")
        return [
            Recorded(*({name: arrays[f"{n} {side} {name}"] for name in names} for side, names in _sides(spec)))
            for n in range(calls)
        ]


def _sides(spec: GraphSpec) -> Tuple[Tuple[str, Mapping[str, TensorSpec]], ...]:
    return (("in", spec.inputs), ("out", spec.outputs))


def _recording_fields(build: Build, spec: GraphSpec, weights: Weights) -> Dict[str, Any]:
    return identity(build, spec, weights, "recording")
