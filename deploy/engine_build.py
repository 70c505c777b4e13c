"""From an ONNX file to an installed plan, one graph at a time: surgery, operator check, TensorRT, check, rename.

TensorRT's own interface is used and not polygraphy's: polygraphy drops an option that a version does not take with a
warning, and here each one that was asked for is set or refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import signal
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

from cldm.files import atomic_path, locked, require_room
from cldm.weights import Weights
from deploy.build_progress import INTERVAL_SECONDS, BuildProgress, heartbeat
from deploy.engine_options import MIB, EngineOptions
from deploy.manifest import (
    ArtefactError,
    check_artefact,
    export_command,
    identity,
    manifest_path,
    read_manifest,
    write_manifest,
)
from deploy.plan_manifest import Machine, plan_fields, plan_path
from deploy.spec import STEPS, Build, GraphSpec
from deploy.tensorrt_versions import TensorRTVersion, load_plugin, make_logger, said
from deploy.toolchain import Toolchain, free_memory

if TYPE_CHECKING:
    import tensorrt

# Schedule lengths of the one graph with a free axis: the least, and the one that its kernels are chosen for. The most
# is the number of steps that the model was trained on.
FEWEST_STEPS, COMMON_STEPS = 1, 20
# Of the GPU's free memory, what a kernel's scratch memory may take; the rest is for weights and activations.
WORKSPACE_SHARE = 0.8
# A plan holds the weights, some of them in several layouts.
PLAN_TO_ONNX = 1.5
TYPE_NAMES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "UINT8": "uint8"}

Report = Callable[[str], None]
# Tries a plan that is not installed yet; raises where it is wrong, and gives what its manifest is to say of the check.
Check = Callable[[Path], Dict[str, Any]]


class BuildError(RuntimeError):
    """TensorRT did not build a plan; the message has its own words and what to do."""


@dataclass(frozen=True)
class PlanJob:
    """One plan to build: of which graph, of which weights, how, and under which folder of all builds."""

    build: Build
    spec: GraphSpec
    weights: Weights
    options: EngineOptions
    folder: Path

    @property
    def target(self) -> Path:
        """The build's own folder."""
        return self.folder / self.build.folder_name

    @property
    def onnx(self) -> Path:
        return self.target / self.spec.file

    @property
    def plan(self) -> Path:
        return plan_path(self.target, self.spec)

    @property
    def hashes(self) -> Path:
        """Where hashes of files are remembered."""
        return self.folder / ".hashes.json"


@dataclass(frozen=True)
class BuiltPlan:
    """One line of the build's table; `error` is the check's worst relative norm, and None where there was none."""

    graph: str
    file: Path
    num_bytes: int
    seconds: float
    error: Optional[float]


# -- before TensorRT --------------------------------------------------------------------------------------------------


def check_onnx(job: PlanJob) -> str:
    """Hash of a job's ONNX file and what belongs to it, once it is seen to be there, whole and the one wanted.

    Raises
    ------
    ArtefactError
        It is not; the message has the command that exports it.
    """
    try:
        manifest = check_artefact(job.onnx, identity(job.build, job.spec, job.weights), job.hashes)
    except ArtefactError as reason:
        command = export_command(job.build, job.weights, job.folder)
        raise ArtefactError(f"{reason}; export it with: {command}") from reason
    files = sorted((name, entry["sha256"]) for name, entry in manifest["files"].items())
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


def existing_plan(job: PlanJob, machine: Machine) -> BuiltPlan:
    """The plan that is there, if it is what would be built now.

    Raises
    ------
    ArtefactError
        It is missing, damaged, or was built otherwise; the message says how.
    """
    wanted = plan_fields(job.build, job.spec, job.weights, machine, job.options, check_onnx(job))
    manifest = check_artefact(job.plan, wanted, job.hashes)
    return BuiltPlan(job.spec.name, job.plan, job.plan.stat().st_size, 0.0, _worst(manifest.get("check")))


def _worst(check: Any) -> Optional[float]:
    outputs = check.get("outputs") if isinstance(check, dict) else None
    return max((float(values["norm"]) for values in outputs.values()), default=None) if outputs else None


def seconds_before(job: PlanJob) -> Optional[float]:
    """What the plan that is there took to build; None where there is none."""
    try:
        return float(read_manifest(job.plan)["seconds"])
    except (ArtefactError, KeyError, TypeError, ValueError):
        return None


@contextlib.contextmanager
def graph_for_tensorrt(job: PlanJob, major: int) -> Iterator[Path]:
    """The ONNX file that is parsed: the exported one, or for the block one whose GroupNorms are plugin nodes.

    Raises
    ------
    OperatorError
        The parser would not take it.
    SurgeryError
        A GroupNorm was not recognised.
    """
    from deploy.operators import require_operators

    if not job.options.needs_plugin(job.spec.name):
        require_operators(job.onnx, major, plugin=False)
        yield job.onnx
        return
    from deploy.surgery import fuse_file, network_of

    # In the same folder, where both share the external weights.
    fused = job.onnx.with_name(f".{job.onnx.stem}.fused.onnx")
    config = job.build.config
    try:
        fuse_file(job.onnx, fused, network_of(job.onnx, str(Path(config.folder) / f"{config.name}.yaml")))
        require_operators(fused, major, plugin=True)
        yield fused
    finally:
        with contextlib.suppress(FileNotFoundError):
            fused.unlink()


def tensor_types(onnx_file: Path) -> Dict[str, str]:
    """The types of a graph's tensors by name, in NumPy's words; of those whose type is told or can be inferred."""
    import onnx

    from deploy.onnx_files import ONNX_TYPES, load_graph

    names = {number: name for name, number in ONNX_TYPES.items()}
    graph = onnx.shape_inference.infer_shapes(load_graph(onnx_file)).graph
    values = [*graph.input, *graph.output, *graph.value_info]
    types = {value.name: names.get(value.type.tensor_type.elem_type) for value in values}
    return {name: kind for name, kind in types.items() if kind is not None}


# -- TensorRT ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What the builder's configuration is made of beside the options: bytes of workspace, and the timing cache."""

    workspace: int
    cache: Path


def make_setting(job: PlanJob, tools: Toolchain) -> Setting:
    given = job.options.workspace_mib
    workspace = given * MIB if given is not None else int(WORKSPACE_SHARE * free_memory())
    return Setting(workspace, timing_cache_path(job.folder, tools.machine))


def timing_cache_path(folder: Path, machine: Machine) -> Path:
    """Where the timings of one TensorRT on one GPU are kept, for all graphs and all builds."""
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", machine.gpu).strip("-").lower()
    return folder / "timing" / f"{machine.tensorrt}-{gpu}-{machine.compute_capability}.cache"


def serialise(
    job: PlanJob,
    onnx_file: Path,
    tools: Toolchain,
    progress: BuildProgress,
    report: Report,
) -> Any:
    """Build the plan of an ONNX file, in TensorRT's own memory.

    Raises
    ------
    BuildError, TensorRTError
        A call failed; the message has TensorRT's words.
    """
    import tensorrt

    version, setting = tools.version, make_setting(job, tools)
    logger = make_logger()
    try:
        builder = tensorrt.Builder(logger)
    except TypeError as error:  # what its bindings make of a null pointer
        raise BuildError(
            f"TensorRT {version.version} cannot start{said(logger)}: it found no GPU, or the driver is too old for it;"
            " nvidia-smi shows both"
        ) from error
    if job.options.needs_plugin(job.spec.name):
        load_plugin(version, logger, tools.plugin_file())
    network = _made(builder.create_network(version.network_flags()), "a network", version, logger)
    # The parser owns the weights that the network points to: it has to live until the plan is built.
    parser = tensorrt.OnnxParser(network, logger)
    _parse(parser, onnx_file, version, logger)
    config = _made(builder.create_builder_config(), "a configuration", version, logger)
    _configure(job, builder, config, version, setting, logger)
    version.set_precision(network, config, tensor_types(onnx_file))
    _check_ends(network, job)
    cache = _set_timing_cache(config, setting.cache, report)
    monitor = version.watch(config, progress)
    with heartbeat(progress, report, INTERVAL_SECONDS), _interruptible(progress, version.has_monitor):
        try:
            plan = builder.build_serialized_network(network, config)
        except MemoryError as error:
            raise BuildError(_why_not_built(job, setting, "out of memory on the host")) from error
    del monitor, parser
    if progress.cancelled:
        raise KeyboardInterrupt
    if plan is None:
        raise BuildError(_why_not_built(job, setting, " | ".join(logger.errors)))
    _keep_timing_cache(config, cache, setting.cache, report)
    return plan


def _made(value: Any, what: str, version: TensorRTVersion, logger: Any) -> Any:
    if value is None:
        raise BuildError(f"TensorRT {version.version} did not make {what}{said(logger)}")
    return value


def _parse(parser: tensorrt.OnnxParser, onnx_file: Path, version: TensorRTVersion, logger: Any) -> None:
    import tensorrt

    if version.has_native_group_norm:
        # Of InstanceNormalization, TensorRT's own layer and not its plugin, which another library holds.
        parser.set_flag(tensorrt.OnnxParserFlag.NATIVE_INSTANCENORM)
    if not parser.parse_from_file(str(onnx_file)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        found = [f"node {error.node()}: {error.desc()}" for error in errors if error is not None]
        words = f" ({' | '.join(found)})" if found else said(logger)
        raise BuildError(f"TensorRT {version.version} cannot parse {onnx_file}{words}")


def _check_ends(network: tensorrt.INetworkDefinition, job: PlanJob) -> None:
    """The network's inputs and outputs are those that the engine's buffers will be made for."""
    ends = [network.get_input(index) for index in range(network.num_inputs)]
    ends += [network.get_output(index) for index in range(network.num_outputs)]
    found = {end.name: (tuple(end.shape), TYPE_NAMES.get(end.dtype.name, end.dtype.name)) for end in ends}
    wanted = {
        name: (tuple(-1 if isinstance(dim, str) else dim for dim in tensor.shape), tensor.dtype)
        for name, tensor in job.spec.tensors.items()
    }
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise BuildError(
                f"{job.spec.name}: TensorRT read {name} as {found.get(name, 'absent')}, and it is"
                f" {wanted.get(name, 'absent')}; export the graph again with --force"
            )


def _configure(
    job: PlanJob,
    builder: tensorrt.Builder,
    config: tensorrt.IBuilderConfig,
    version: TensorRTVersion,
    setting: Setting,
    logger: Any,
) -> None:
    import tensorrt

    options = job.options
    config.builder_optimization_level = options.opt_level
    config.max_aux_streams = options.aux_streams
    config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, setting.workspace)
    config.profiling_verbosity = _verbosity(options.profiling_verbosity)
    level = version.hardware_level(options.hardware_compatibility)
    if level is None:
        raise BuildError(
            f"TensorRT {version.version} has no hardware compatibility {options.hardware_compatibility}; take another"
            " --hardware-compatibility"
        )
    config.hardware_compatibility_level = level
    version.configure(config)
    if job.spec.name in options.tf32:
        config.set_flag(tensorrt.BuilderFlag.TF32)
    else:
        config.clear_flag(tensorrt.BuilderFlag.TF32)  # TensorRT itself sets it
    ranges = _ranges(job)
    if ranges:
        profile = _made(builder.create_optimization_profile(), "an optimisation profile", version, logger)
        for name, shapes in ranges.items():
            profile.set_shape(name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"TensorRT {version.version} refused the shapes {ranges} of {job.spec.name}{said(logger)}")


def _verbosity(name: str) -> tensorrt.ProfilingVerbosity:
    import tensorrt

    kinds = tensorrt.ProfilingVerbosity
    return {"names": kinds.LAYER_NAMES_ONLY, "detailed": kinds.DETAILED, "none": kinds.NONE}[name]


def _ranges(job: PlanJob) -> Dict[str, Tuple[Tuple[int, ...], ...]]:
    """Least, commonest and largest shape of each input with a free axis."""
    most = job.build.config.schedule.train_steps
    return {
        name: tuple(
            tuple(steps if dim == STEPS else int(dim) for dim in tensor.shape)
            for steps in (FEWEST_STEPS, min(COMMON_STEPS, most), most)
        )
        for name, tensor in job.spec.inputs.items()
        if STEPS in tensor.shape
    }


def _why_not_built(job: PlanJob, setting: Setting, words: str) -> str:
    text = f"TensorRT did not build {job.spec.name}: {words or 'it gave no reason'}"
    if "outofmemory" in words.lower().replace(" ", "") or "insufficientworkspace" in words.lower().replace(" ", ""):
        half = max(1, setting.workspace // MIB // 2)
        text += (
            f". End other programs that hold the GPU's memory (nvidia-smi lists them), or build with less of it:"
            f" --workspace {half}, --opt-level {max(0, job.options.opt_level - 2)}"
        )
    return text


@contextlib.contextmanager
def _interruptible(progress: BuildProgress, has_monitor: bool) -> Iterator[None]:
    """Let Ctrl-C end a build. Python's own way, an exception, would have to pass through TensorRT's C++.

    Where the builder asks whether to go on it is told so; elsewhere the process ends, and nothing that it wrote counts.
    """

    def cancel(number: int, frame: Any) -> None:
        progress.cancelled = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, cancel if has_monitor else signal.SIG_DFL)
    try:
        with _told_at_once(progress) if has_monitor else contextlib.nullcontext():
            yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _told_at_once(progress: BuildProgress) -> Iterator[None]:
    """Cancel `progress` at SIGINT from another thread.

    Python runs a handler in the main thread and between two instructions of Python, so not before the builder's call,
    which takes minutes, has returned. The bytes of `signal.set_wakeup_fd` are written when the signal comes.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def watch() -> None:
        for numbers in iter(lambda: receiver.recv(1), b""):
            progress.cancelled = progress.cancelled or numbers[0] == signal.SIGINT

    watcher = threading.Thread(target=watch, name="build interrupt", daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        sender.close()  # which ends the watcher, once it has read what came before
        watcher.join()
        receiver.close()


# -- the timing cache -------------------------------------------------------------------------------------------------


def _set_timing_cache(config: tensorrt.IBuilderConfig, file: Path, report: Report) -> Any:
    """Give the builder what is kept of earlier builds, or an empty cache; None where it takes neither."""
    kept = file.read_bytes() if file.is_file() else b""
    for content in [kept, b""] if kept else [b""]:
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
        report(f"TensorRT refused the timing cache {file}; starting afresh" if content else "building without timings")
    return None


def _keep_timing_cache(config: tensorrt.IBuilderConfig, cache: Any, file: Path, report: Report) -> None:
    """Write the timings for the next build; that they cannot be written costs time then, nothing else."""
    filled = config.get_timing_cache() if cache is not None else None
    content = filled.serialize() if filled is not None else None
    if content is None:
        return
    try:
        with atomic_path(file) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        report(f"the timing cache was not kept: {error}")


# -- installing -------------------------------------------------------------------------------------------------------


def build_plan(job: PlanJob, tools: Toolchain, check: Optional[Check], report: Report) -> BuiltPlan:
    """Build a plan, check it, and only then put it in place, its manifest last.

    Raises
    ------
    BuildError, TensorRTError
        TensorRT did not build it.
    ArtefactError, OperatorError, SurgeryError
        The ONNX file is not there, or not one that can be built.
    OSError
        The disk is too full.
    """
    fields = plan_fields(job.build, job.spec, job.weights, tools.machine, job.options, check_onnx(job))
    with locked(job.target, lambda: report(f"another process is at work in {job.target}; waiting for it")):
        _remove_leftovers(job)
        require_room(job.target, int(PLAN_TO_ONNX * _onnx_bytes(job)))
        progress = BuildProgress(job.spec.name, seconds_before(job))
        with graph_for_tensorrt(job, tools.version.major) as onnx_file:
            plan = serialise(job, onnx_file, tools, progress, report)
        return _install(job, plan, fields, check, progress)


def _install(
    job: PlanJob, plan: Any, fields: Mapping[str, Any], check: Optional[Check], progress: BuildProgress
) -> BuiltPlan:
    seconds = progress.seconds
    with atomic_path(job.plan) as temporary:
        temporary.write_bytes(plan)
        checked = check(temporary) if check is not None else None
        with contextlib.suppress(FileNotFoundError):
            manifest_path(job.plan).unlink()
    write_manifest(job.plan, {**fields, "seconds": seconds, "check": checked}, [job.plan], job.hashes)
    return BuiltPlan(job.spec.name, job.plan, job.plan.stat().st_size, seconds, _worst(checked))


def _remove_leftovers(job: PlanJob) -> None:
    """Delete what a killed build left; called with the folder's lock held, so nobody is at work on it."""
    leftovers: List[Path] = [job.onnx.with_name(f".{job.onnx.stem}.fused.onnx")]
    for path in [*leftovers, *job.target.glob(f".{job.plan.name}.*.tmp")]:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _onnx_bytes(job: PlanJob) -> int:
    return sum(int(entry["bytes"]) for entry in read_manifest(job.onnx)["files"].values())
