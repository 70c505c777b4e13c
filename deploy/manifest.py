"""What a made file is: a JSON manifest beside it, written last, so that a file without one counts as not made.

No torch here: the runtime checks manifests before it loads anything.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, Dict, List, Optional

from cldm.files import cached_sha256, source_digest, write_json
from cldm.weights import Weights
from deploy.spec import Build, GraphSpec

FORMAT = 1


class ArtefactError(RuntimeError):
    """A made file is missing, damaged, or was made for something else; the message has the command that makes it."""


ROOT = Path(__file__).resolve().parent.parent


def code_files() -> List[Path]:
    """The sources that decide what an exported graph computes."""
    files = sorted((ROOT / "ldm").glob("*.py"))
    files += [ROOT / "cldm" / name for name in ("checkpoint.py", "controlnet.py", "model.py")]
    return files + [
        ROOT / "deploy" / name for name in ("export.py", "graphs.py", "onnx_files.py", "spec.py", "tracing.py")
    ]


def code_digest() -> str:
    """Hash of `code_files`; a change there makes every exported file stale."""
    return source_digest(code_files())


def identity(build: Build, graph: GraphSpec, weights: Weights, kind: str = "onnx") -> Dict[str, Any]:
    """The fields that the manifest of a graph's file must have: those that decide whether it is the one wanted."""
    return {
        "format": FORMAT,
        "kind": kind,
        "graph": graph.name,
        "model": build.config.name,
        "weights": weights.digest,
        "code": code_digest(),
        "precision": build.precision,
        "samples": build.samples,
        "height": build.height,
        "width": build.width,
        "tensors": {name: tensor.to_json() for name, tensor in graph.tensors.items()},
    }


def export_command(build: Build, weights: Weights, folder: Path) -> str:
    """The command that makes the files of a build under `folder`, to be given in the repository's own folder."""
    words = ["python3", "export_onnx.py", *build_words(build, weights)]
    if folder.resolve() != ROOT / "build":
        words += ["--output", str(folder.resolve())]
    return " ".join(shlex.quote(word) for word in words)


def build_words(build: Build, weights: Weights) -> List[str]:
    """The options by which the commands of this repository name a build and its weights."""
    config = build.config
    file = Path(config.folder).resolve() / f"{config.name}.yaml"
    words = ["--model", config.name if file.parent == ROOT / "models" else str(file)]
    words += ["--precision", build.precision, "--samples", str(build.samples)]
    words += ["--height", str(build.height), "--width", str(build.width)]
    own = config.checkpoint_path()
    if weights.path is None and (own is not None or weights.seed != config.seed):
        words += ["--random-weights", str(weights.seed)]
    elif weights.path is not None and weights.path != own:
        words += ["--checkpoint", str(weights.path.resolve())]
    return words


def manifest_path(file: Path) -> Path:
    return file.with_name(file.name + ".json")


def write_manifest(file: Path, fields: Dict[str, Any], members: List[Path], cache: Optional[Path]) -> None:
    """Write the manifest of `file`; `members` are all files that belong to it, with their sizes and hashes."""
    files = {m.name: {"bytes": m.stat().st_size, "sha256": cached_sha256(m, cache)} for m in members}
    write_json(manifest_path(file), {**fields, "files": files})


def read_manifest(file: Path) -> Dict[str, Any]:
    """The manifest of a made file.

    Raises
    ------
    ArtefactError
        There is none, or it is damaged.
    """
    path = manifest_path(file)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"{file} was not made, or not to its end") from None
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} is damaged ({error})") from error
    files = value.get("files") if isinstance(value, dict) else None
    if not isinstance(files, dict) or file.name not in files or any(Path(name).name != name for name in files):
        raise ArtefactError(f"{path} is not a manifest of {file.name}")
    return value


def check_artefact(file: Path, wanted: Dict[str, Any], cache: Optional[Path] = None) -> Dict[str, Any]:
    """The manifest of `file` if it is whole and is what is wanted.

    Parameters
    ----------
    wanted : dict
        Fields that the manifest must have, from `identity`.
    cache : Path, optional
        JSON file in which hashes are remembered.

    Raises
    ------
    ArtefactError
        It is missing, damaged, or differs; the message names each difference.
    """
    found = read_manifest(file)
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing:
        details = "; ".join(f"{key} is {_short(found.get(key))}, wanted {_short(wanted[key])}" for key in differing)
        raise ArtefactError(f"{file} was made for something else: {details}")
    for name, entry in found["files"].items():
        member = file.with_name(name)
        if not member.is_file():
            raise ArtefactError(f"{member} is missing")
        if not isinstance(entry, dict) or member.stat().st_size != entry.get("bytes"):
            raise ArtefactError(f"{member} is truncated or was changed: its size is not the manifest's")
        if cached_sha256(member, cache) != entry.get("sha256"):
            raise ArtefactError(f"{member} is corrupt: its content is not what was written")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
