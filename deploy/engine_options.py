"""What the engine builder can be asked for: checked where it is made, in the manifest of each plan. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

GROUP_NORMS = ("plugin", "native")
HARDWARE_COMPATIBILITY = ("none", "ampere-plus", "same-compute-capability")
PROFILING_VERBOSITY = ("names", "detailed", "none")
OPTIMISATION_LEVELS = range(6)
MIB = 1 << 20
# The graphs that hold GroupNorms; the others are the same whatever makes those.
GRAPHS_WITH_NORMS = ("step", "decode")


@dataclass(frozen=True)
class EngineOptions:
    """Options of a build of engines.

    Attributes
    ----------
    groupnorm : {"plugin", "native"}
        What a GroupNorm becomes: one node of this project's plugin, or TensorRT's own layers (not on 8.6).
    opt_level : int
        0 to 5. The builder looks longer for fast kernels at higher ones.
    aux_streams : int
        Streams beside its own that an engine may run layers on.
    workspace_mib : int or None
        Limit of a kernel's scratch memory in MiB; None takes it from the GPU's free memory.
    hardware_compatibility : {"none", "ampere-plus", "same-compute-capability"}
        The GPUs that a plan runs on: the model that it was built on, or more at some cost in speed.
    profiling_verbosity : {"names", "detailed", "none"}
        What an engine can say of its layers afterwards.
    tf32 : tuple of str
        Graphs whose FP32 matrix work may round its factors to TF32's 10 bits.

    Raises
    ------
    ValueError
        A value is not one of those above.
    """

    groupnorm: str = "plugin"
    opt_level: int = 5
    aux_streams: int = 0
    workspace_mib: Optional[int] = None
    hardware_compatibility: str = "none"
    profiling_verbosity: str = "names"
    tf32: Tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, known in (
            ("groupnorm", GROUP_NORMS),
            ("hardware_compatibility", HARDWARE_COMPATIBILITY),
            ("profiling_verbosity", PROFILING_VERBOSITY),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.opt_level not in OPTIMISATION_LEVELS:
            raise ValueError(f"the optimisation level must be between 0 and 5, got {self.opt_level}")
        if self.aux_streams < 0:
            raise ValueError(f"the number of auxiliary streams must not be negative, got {self.aux_streams}")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise ValueError(f"the workspace must be at least 1 MiB, got {self.workspace_mib}")

    def of_graph(self, graph: str) -> Dict[str, Any]:
        """The options as they bear on one graph, in values that JSON has; for the manifest of its plan."""
        return {
            "groupnorm": self.groupnorm if graph in GRAPHS_WITH_NORMS else None,
            "opt_level": self.opt_level,
            "aux_streams": self.aux_streams,
            "workspace_mib": self.workspace_mib,
            "hardware_compatibility": self.hardware_compatibility,
            "profiling_verbosity": self.profiling_verbosity,
            "tf32": graph in self.tf32,
        }

    def needs_plugin(self, graph: str) -> bool:
        return self.groupnorm == "plugin" and graph in GRAPHS_WITH_NORMS

    def words(self) -> List[str]:
        """The options of build_engines.py that give these; those that are its defaults are left out."""
        default = EngineOptions()
        words: List[str] = []
        for name, option in (
            ("groupnorm", "--groupnorm"),
            ("opt_level", "--opt-level"),
            ("aux_streams", "--aux-streams"),
            ("workspace_mib", "--workspace"),
            ("hardware_compatibility", "--hardware-compatibility"),
            ("profiling_verbosity", "--profiling-verbosity"),
        ):
            value = getattr(self, name)
            # What normalises is always named: left out, the command chooses by what the machine has.
            if name == "groupnorm" or value != getattr(default, name):
                words += [option, str(value)]
        return words + (["--tf32", *self.tf32] if self.tf32 else [])
