"""What a TensorRT plan was built from and for: written after it, and checked before any of it is deserialised.

A plan is machine code for one TensorRT and one GPU. TensorRT itself finds some mismatches when it deserialises; here
all of them are found before, each is named, and the message has the command that rebuilds. No torch here.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

from cldm.files import source_digest
from cldm.weights import Weights
from deploy.engine_options import EngineOptions
from deploy.manifest import ROOT, ArtefactError, build_words, check_artefact, identity, read_manifest
from deploy.spec import Build, GraphSpec

AMPERE = (8, 0)


@dataclass(frozen=True)
class Machine:
    """What a plan is tied to beside its build.

    Attributes
    ----------
    tensorrt : str
        The whole version, such as "10.13.3.9".
    gpu : str
        The GPU's name, as CUDA gives it.
    compute_capability : str
        Such as "9.0".
    plugin : str or None
        `source` in the manifest of the plugin library that is at hand; None where there is none.
    plugin_problem : str or None
        Why there is none.
    device : int
        Which CUDA device the GPU is.
    """

    tensorrt: str
    gpu: str
    compute_capability: str
    plugin: Optional[str] = None
    plugin_problem: Optional[str] = None
    device: int = 0


def plan_path(folder: Path, spec: GraphSpec) -> Path:
    """Where the plan of a graph lies in a build's own folder."""
    return folder / Path(spec.file).with_suffix(".plan").name


def builder_digest() -> str:
    """Hash of the sources that, beside those of the exported graph, decide what a plan computes."""
    names = ("surgery.py", "engine_build.py", "tensorrt_versions.py", "tensorrt_8.py", "tensorrt_10.py")
    return source_digest([ROOT / "deploy" / name for name in names])


def plan_fields(
    build: Build, spec: GraphSpec, weights: Weights, machine: Machine, options: EngineOptions, onnx: str
) -> Dict[str, Any]:
    """All that decides what the plan of a graph is; one that differs in any of it is built again.

    Parameters
    ----------
    onnx : str
        SHA-256 of the graph's ONNX file, from the manifest beside that.
    """
    return {
        **identity(build, spec, weights, "plan"),
        "tensorrt": machine.tensorrt,
        "gpu": machine.gpu,
        "compute_capability": machine.compute_capability,
        "plugin": machine.plugin if options.needs_plugin(spec.name) else None,
        "options": options.of_graph(spec.name),
        "onnx": onnx,
        "builder": builder_digest(),
    }


def check_plan(
    file: Path, build: Build, spec: GraphSpec, weights: Weights, machine: Machine, cache: Optional[Path] = None
) -> Dict[str, Any]:
    """The manifest of a plan that is whole and may be deserialised on this machine for this build.

    How it was built (options, ONNX file, builder's sources) is not asked: any way will do to run it.

    Parameters
    ----------
    file : Path
        In the build's own folder, which lies in the folder of all builds.
    cache : Path, optional
        JSON file in which hashes are remembered.

    Raises
    ------
    ArtefactError
        It was not built, is damaged, or was built for something else; the message names each difference and the
        command that builds it.
    """
    try:
        found = read_manifest(file)
        wanted = {**identity(build, spec, weights, "plan"), "tensorrt": machine.tensorrt}
        wanted.update(_wanted_gpu(file, found, machine))
        if found.get("plugin") is not None:
            _check_plugin(file, found["plugin"], machine)
        return check_artefact(file, wanted, cache)
    except ArtefactError as reason:
        command = engine_command(build, weights, file.parent.parent, device=machine.device)
        raise ArtefactError(f"{reason}; build it with: {command}") from reason


def _wanted_gpu(file: Path, found: Dict[str, Any], machine: Machine) -> Dict[str, Any]:
    """The manifest's fields that must be those of this machine's GPU."""
    options = found.get("options")
    level = options.get("hardware_compatibility") if isinstance(options, dict) else "none"
    if level == "same-compute-capability":
        return {"compute_capability": machine.compute_capability}
    if level == "ampere-plus":
        if tuple(int(part) for part in machine.compute_capability.split(".")) < AMPERE:
            raise ArtefactError(
                f"{file} runs on GPUs of compute capability 8.0 or later, and {machine.gpu} has"
                f" {machine.compute_capability}"
            )
        return {}
    return {"gpu": machine.gpu, "compute_capability": machine.compute_capability}


def _check_plugin(file: Path, wanted: Any, machine: Machine) -> None:
    if machine.plugin is None:
        why = "" if machine.plugin_problem is None else f" ({machine.plugin_problem})"
        raise ArtefactError(f"{file} needs the plugin library, which is not built for TensorRT {machine.tensorrt}{why}")
    if machine.plugin != wanted:
        raise ArtefactError(
            f"{file} was built with another plugin: its sources' hash is {wanted}, that of the library at hand"
            f" {machine.plugin}"
        )


def engine_command(
    build: Build, weights: Weights, folder: Path, options: Optional[EngineOptions] = None, device: int = 0
) -> str:
    """The command that builds the plans of a build under `folder`, to be given in the repository's own folder."""
    words = ["python3", "build_engines.py", *engine_words(build, weights, folder, options, device)]
    return " ".join(shlex.quote(word) for word in words)


def engine_words(
    build: Build, weights: Weights, folder: Path, options: Optional[EngineOptions] = None, device: int = 0
) -> List[str]:
    """The options of build_engines.py that name a build, its weights, its folder, how and for which GPU it is built."""
    words = [*build_words(build, weights), *(options.words() if options is not None else [])]
    words += [] if folder.resolve() == ROOT / "build" else ["--build-dir", str(folder.resolve())]
    return [*words, "--device", str(device)] if device else words
