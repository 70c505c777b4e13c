"""What engines are built with on this machine: TensorRT, GPU, plugin. Found once, before anything is built."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Optional

from deploy.plan_manifest import Machine
from deploy.plugin_library import PluginError, PluginLibrary, ensure_plugin
from deploy.tensorrt_versions import TensorRTError, TensorRTVersion, find_version


@dataclass(frozen=True)
class Gpu:
    """The GPU that is built for: CUDA's name of it, its compute capability such as "9.0", and CUDA's index."""

    name: str
    compute_capability: str
    index: int = 0


@dataclass(frozen=True)
class Toolchain:
    """TensorRT, the GPU, and the plugin library where there is one, or why there is none."""

    version: TensorRTVersion
    gpu: Gpu
    plugin: Optional[PluginLibrary] = None
    plugin_problem: Optional[str] = None

    @property
    def machine(self) -> Machine:
        """What plans that are built here are tied to."""
        source = None if self.plugin is None else self.plugin.source
        gpu = self.gpu
        version = self.version.version
        return Machine(version, gpu.name, gpu.compute_capability, source, self.plugin_problem, gpu.index)

    def plugin_file(self) -> Path:
        """The plugin library, for a graph that needs it.

        Raises
        ------
        TensorRTError
            There is none.
        """
        if self.plugin is None:
            raise TensorRTError("the graph needs the plugin library, and there is none; run bash plugins/build.sh")
        return self.plugin.file


def find_gpu() -> Gpu:
    """The current CUDA device.

    Raises
    ------
    TensorRTError
        There is none, or the driver is too old for torch's CUDA.
    """
    import torch

    with _naming_no_gpu():
        index = torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(index)
    return Gpu(properties.name, f"{properties.major}.{properties.minor}", index)


def select_gpu(index: int) -> None:
    """Make a GPU the current CUDA device of this thread: the one that is built for and run on.

    Raises
    ------
    TensorRTError
        There is no GPU of that index.
    """
    import torch

    count = torch.cuda.device_count()
    if not 0 <= index < count:
        known = f"0 to {count - 1}" if count else "none"
        raise TensorRTError(f"there is no GPU {index}; torch sees {known}, and nvidia-smi lists those of the machine")
    with _naming_no_gpu():
        torch.cuda.set_device(index)


def free_memory() -> int:
    """Bytes that the current CUDA device has free; asking takes some for the process itself.

    Raises
    ------
    TensorRTError
        As `find_gpu`.
    """
    import torch

    with _naming_no_gpu():
        free, _ = torch.cuda.mem_get_info()
    return int(free)


@contextlib.contextmanager
def _naming_no_gpu() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, AssertionError) as error:  # the latter of a torch that was built without CUDA
        raise TensorRTError(
            f"there is no CUDA device for TensorRT: {str(error).splitlines()[0]}; nvidia-smi shows whether"
            " there is a GPU, and a driver that is new enough"
        ) from error


def find_toolchain(folder: Path, groupnorm: str, report: Callable[[str], None]) -> Toolchain:
    """All of it; the plugin library is built first where it is wanted and none is there that fits.

    Parameters
    ----------
    folder : Path
        Of all builds.
    groupnorm : {"auto", "plugin", "native"}
        What is to normalise: "auto" is the plugin where it can be had, and TensorRT's own layers elsewhere.

    Raises
    ------
    TensorRTError
        TensorRT or the GPU cannot be used, or this TensorRT has no layers of its own that normalise.
    PluginError
        The plugin cannot be built, and nothing else will do.
    """
    tools = Toolchain(find_version(), find_gpu())
    native = tools.version.has_native_group_norm
    if groupnorm == "native":
        if not native:
            raise TensorRTError(
                f"TensorRT {tools.version.version} has no layer for the GroupNorms; build with --groupnorm plugin"
            )
        return tools
    try:
        plugin = ensure_plugin(folder, tools.version.major, tools.gpu.compute_capability, report)
    except PluginError as error:
        if groupnorm == "plugin" or not native:
            raise
        report(f"no plugin, so TensorRT's own layers normalise: {error}")
        return tools
    return dataclasses.replace(tools, plugin=plugin)
