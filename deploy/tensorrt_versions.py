"""TensorRT 8.6, 10 (from 10.1) and 11: which of them is here, and everything in which building differs between them.

==================  ============================  ================================  ==============================
\\                   8.6                           10                                11
==================  ============================  ================================  ==============================
network             explicit batch                strongly typed                    strongly typed, has no other
half precision      flag, layers held to FP32     types of the graph                types of the graph
progress            none: a heartbeat             monitor                           monitor
plugin creators     get_plugin_creator            get_creator                       get_creator
hardware levels     none, Ampere and later        and the same compute capability   and the same compute capability
GroupNorm           plugin                        plugin or native                  plugin or native
==================  ============================  ================================  ==============================

What differs lies in `deploy.tensorrt_8` and `deploy.tensorrt_10` behind one interface, so that no other file asks for
the version. `tensorrt` is imported where it is used.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Any, List, Mapping, Optional, Protocol

from cldm.machine import OTHER_TENSORRT, tensorrt_command

if TYPE_CHECKING:
    import tensorrt

    from deploy.build_progress import BuildProgress

# Of each major version the first that has every call made here: 10.0 cannot tell an engine's memory as later ones do.
OLDEST = {8: (8, 6), 10: (10, 1), 11: (11, 0)}
SUPPORTED = "8.6, 10.1 or a later 10, or 11"
# Name, version and namespace of the plugin, as in `deploy.surgery`, which needs packages that running does not.
PLUGIN = ("GroupNormSiLU", "1", "canny2image")


class TensorRTError(RuntimeError):
    """TensorRT is missing, of a version that is not supported, or refused a call; the message says what to do."""


class TensorRTVersion(Protocol):
    """What building asks of one major version.

    Attributes
    ----------
    version : str
        Such as "10.13.3.9".
    major : int
    has_native_group_norm : bool
        Whether its parser takes a GroupNorm as the exporter writes it.
    has_monitor : bool
        Whether the builder tells how far it is.
    """

    version: str
    major: int
    has_native_group_norm: bool
    has_monitor: bool

    def network_flags(self) -> int:
        """What `Builder.create_network` takes."""

    def configure(self, config: tensorrt.IBuilderConfig) -> None:
        """Set what no option asks for.

        Raises
        ------
        TensorRTError
            TensorRT refused it.
        """

    def set_precision(
        self, network: tensorrt.INetworkDefinition, config: tensorrt.IBuilderConfig, types: Mapping[str, str]
    ) -> None:
        """Let the plan compute in the types of the graph: `types`, by the name of the tensor, in NumPy's words."""

    def find_creator(self, registry: tensorrt.IPluginRegistry, name: str, version: str, namespace: str) -> Any:
        """The creator of a plugin, or None."""

    def hardware_level(self, name: str) -> Optional[tensorrt.HardwareCompatibilityLevel]:
        """The level of one of `engine_options.HARDWARE_COMPATIBILITY`; None where the version has none of that name."""

    def watch(self, config: tensorrt.IBuilderConfig, progress: BuildProgress) -> Any:
        """Let the builder tell `progress` how far it is, where it can; what is returned has to live as long."""


def find_version() -> TensorRTVersion:
    """The TensorRT that `import tensorrt` gives.

    Raises
    ------
    TensorRTError
        There is none, it does not load, or its version is not supported.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise TensorRTError(
            f"Python's package tensorrt cannot be imported ({error}); install TensorRT {SUPPORTED}:"
            f" {tensorrt_command()} ({OTHER_TENSORRT})"
        ) from error
    except OSError as error:  # of a library that the package loads
        raise TensorRTError(
            f"TensorRT's libraries cannot be loaded ({error}); add their folder to LD_LIBRARY_PATH"
        ) from error
    version = str(tensorrt.__version__)
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < OLDEST.get(major, (major + 1, 0)):
        raise TensorRTError(f"TensorRT {version} is not supported; install {SUPPORTED}")
    if major == 8:
        from deploy.tensorrt_8 import TensorRT8

        return TensorRT8(version)
    from deploy.tensorrt_10 import TensorRT10, TensorRT11

    return TensorRT10(version) if major == 10 else TensorRT11(version)


def make_logger() -> Any:
    """A logger that keeps the errors, `errors`, and says nothing: a failed call is raised with what was kept.

    Its callback is called from TensorRT's C++, through which no exception may pass.
    """
    import tensorrt

    class Logger(tensorrt.ILogger):
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.errors: List[str] = []

        def log(self, severity: tensorrt.ILogger.Severity, msg: str) -> None:
            if severity in (tensorrt.ILogger.Severity.INTERNAL_ERROR, tensorrt.ILogger.Severity.ERROR):
                self.errors.append(msg)

    return Logger()


def load_plugin(version: TensorRTVersion, logger: Any, library: Path) -> None:
    """Load the plugin library into this process and see that its creator is registered; again is no fault.

    Raises
    ------
    TensorRTError
        TensorRT does not take it.
    """
    import tensorrt

    registry = tensorrt.get_plugin_registry()
    if version.find_creator(registry, *PLUGIN) is not None:
        return
    registry.load_library(str(library))  # its handle, None after a failure, tells less than the creator does
    if version.find_creator(registry, *PLUGIN) is not None:
        return
    problem = _register(library)
    if version.find_creator(registry, *PLUGIN) is None:
        raise TensorRTError(
            f"TensorRT {version.version} did not load the plugin {library}{said(logger)}: {problem}; build it anew with"
            " bash plugins/build.sh --force"
        )


def _register(library: Path) -> str:
    """Let the library register its creator itself, under the namespace that is looked up; what came of it."""
    try:
        status = ctypes.CDLL(str(library)).canny2imageRegister()
    except (OSError, AttributeError) as error:  # it does not load, or has no such function
        return str(error)
    return f"registering it answers {status}"


def said(logger: Any, last: int = 3) -> str:
    """The last errors that a logger kept, to go into a message."""
    return f" ({' | '.join(text.strip() for text in logger.errors[-last:])})" if logger.errors else ""
