"""Checkpoints, exports, engines, plugin, weights of metrics and tables: what is there, and whether it fits.

For a machine that has the packages to run; they are imported where they are used.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional

from tools.doctor.rows import DIFFERS, MISSING, OK, Row, first_line

if TYPE_CHECKING:
    from cldm.config import ModelConfig
    from cldm.weights import Weights
    from deploy.plan_manifest import Machine
    from deploy.plugin_library import PluginLibrary
    from deploy.spec import Build
    from deploy.tensorrt_versions import TensorRTVersion
    from deploy.toolchain import Gpu

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER_NAME = re.compile(
    r"(?P<model>.+)-(?P<height>\d+)x(?P<width>\d+)-n(?P<samples>\d+)-(?P<precision>fp32|fp16|bf16)"
)
# SHA-256 of the files that their authors publish, by name.
PUBLISHED = {"control_sd15_canny.pth": "4de384b16bc2d7a1fb258ca0cbd941d7dd0a721ae996aff89f905299d6923f45"}


@dataclass(frozen=True)
class Place:
    """What the files are compared with.

    Attributes
    ----------
    folder : Path
        Of all builds.
    config : ModelConfig
        Of the model that would run.
    checkpoint : str, optional
    random_weights : int, optional
        As the commands take them.
    version, gpu
        TensorRT and the GPU, where there are any.
    """

    folder: Path
    config: ModelConfig
    checkpoint: Optional[str] = None
    random_weights: Optional[int] = None
    version: Optional[TensorRTVersion] = None
    gpu: Optional[Gpu] = None

    def weights(self, config: ModelConfig) -> Weights:
        """Those of a model; the options are for the one that would run. Raises `CheckpointError`."""
        from cldm.weights import find_weights

        own = config.name == self.config.name
        given = (self.checkpoint, self.random_weights) if own else (None, None)
        return find_weights(config, *given, self.folder / ".hashes.json")

    def is_complete(self) -> bool:
        """Whether the model that would run has weights and a vocabulary."""
        from cldm.tokenizer import find_tokenizer

        try:
            find_tokenizer(self.config, self.weights(self.config), lambda line: None)
        except (ValueError, OSError):
            return False
        return True

    def plugin(self) -> PluginLibrary:
        """The library for the TensorRT and the GPU that are here. Raises `ArtefactError`."""
        from deploy.manifest import ArtefactError
        from deploy.plugin_library import find_plugin

        if self.version is None or self.gpu is None:
            raise ArtefactError(f"there is no {'TensorRT' if self.version is None else 'GPU'} to load it")
        return find_plugin(self.folder, self.version.major, self.gpu.compute_capability)

    def machine(self) -> Machine:
        """What plans have to be for. Raises `ArtefactError` where none can run."""
        from deploy.manifest import ArtefactError
        from deploy.plan_manifest import Machine

        if self.version is None or self.gpu is None:
            raise ArtefactError(f"there is no {'TensorRT' if self.version is None else 'GPU'} to run it")
        plugin: Optional[str] = None
        problem: Optional[str] = None
        try:
            plugin = self.plugin().source
        except ArtefactError as error:
            problem = str(error)
        return Machine(self.version.version, self.gpu.name, self.gpu.compute_capability, plugin, plugin_problem=problem)


def check_checkpoint(place: Place, config: ModelConfig) -> Row:
    """The weights of a model, and whether they are the published ones."""
    from cldm.files import cached_sha256
    from cldm.weights import CheckpointError

    what = f"weights of {config.name}"
    try:
        weights = place.weights(config)
    except CheckpointError as error:
        there = config.checkpoint_path() is not None
        reason, _, place_for_it = first_line(error).partition(": put ")
        fix = f"put {place_for_it}" if place_for_it else ""
        return Row(what, DIFFERS if there else MISSING, reason, fix)
    if weights.path is None:
        return Row(what, OK, f"{weights} (no checkpoint)")
    digest = cached_sha256(weights.path, place.folder / ".hashes.json")
    found = f"{weights.path}, SHA-256 {digest[:16]}"
    published = PUBLISHED.get(weights.path.name)
    if published is None:
        return Row(what, OK, f"{found} (no published hash to compare with)" if config.name != "tiny" else found)
    if digest == published:
        return Row(what, OK, f"{found}, as published")
    return Row(
        what, DIFFERS, f"{found}, not the published {published[:16]}: damaged, or other weights", "copy it again"
    )


def check_vocabulary(place: Place) -> Row:
    from cldm.tokenizer import TokenizerNotFound, find_tokenizer

    config = place.config
    told: List[str] = []
    try:
        find_tokenizer(config, place.weights(config), told.append)
    except TokenizerNotFound as error:
        folder = Path(config.folder) / config.tokenizer
        return Row("vocabulary", MISSING, first_line(error), f"copy vocab.json and merges.txt to {folder}")
    except ValueError as error:
        return Row("vocabulary", DIFFERS, first_line(error))
    return Row("vocabulary", OK, told[0] if told else f"of {config.name}")


def check_plugin(place: Place) -> List[Row]:
    """The library for the TensorRT that is here, and what others are built."""
    from deploy.manifest import ArtefactError
    from deploy.plugin_library import library_path

    output = "" if place.folder.resolve() == ROOT / "build" else f" --output {place.folder.resolve() / 'plugins'}"
    others = [major for major in (8, 10, 11) if library_path(place.folder, major).is_file()]
    built = "built: " + "; ".join(_plugin_words(library_path(place.folder, major)) for major in others)
    try:
        place.plugin()
    except ArtefactError as error:
        here = place.version is not None and place.version.major in others
        state = DIFFERS if here else MISSING
        fix = f"bash plugins/build.sh{output}" if place.version is not None else ""
        return [Row("GroupNorm plugin", state, f"{first_line(error)}{'; ' + built if others else ''}", fix)]
    return [Row("GroupNorm plugin", OK, built)]


def _plugin_words(library: Path) -> str:
    from deploy.manifest import ArtefactError, read_manifest

    try:
        found = read_manifest(library)
    except ArtefactError as error:
        return first_line(error)
    codes = " ".join(f"sm_{code}" for code in found.get("architectures") or [])
    return f"{library.name} with TensorRT {found.get('tensorrt')}'s headers for {codes}"


def check_operator(place: Place) -> Row:
    """The torch operator's library for this GPU."""
    from plugins.torch_operator import DEFAULT_ARCHITECTURES, library_path

    if place.gpu is None:
        return Row("torch operator", MISSING, "no GPU to run it; the CPU needs no library")
    own = int(place.gpu.compute_capability.replace(".", ""))
    paths = [library_path(architectures) for architectures in ([own], DEFAULT_ARCHITECTURES)]
    there = [path for path in paths if path.is_file()]
    if there:
        return Row("torch operator", OK, str(there[0]))
    return Row("torch operator", MISSING, "compiled on first use", "python3 -m plugins.torch_operator --build")


def find_builds(place: Place) -> Dict[str, Any]:
    """The builds on the disk, by the names of their folders; a string in place of one says why it is none."""
    from cldm.config import available_models, load_config
    from deploy.spec import Build

    configs = {name: load_config(name) for name in available_models()}
    configs[place.config.name] = place.config
    builds: Dict[str, Any] = {}
    for path in sorted(place.folder.glob("*-n*")):
        match = FOLDER_NAME.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        if match["model"] not in configs:
            builds[path.name] = f"no config of a model {match['model']}; name it with --model"
            continue
        sizes = (int(match[key]) for key in ("height", "width", "samples"))
        try:
            builds[path.name] = Build(configs[match["model"]], *sizes, match["precision"])
        except ValueError as error:
            builds[path.name] = first_line(error)
    return builds


def check_builds(place: Place) -> List[Row]:
    """The exports and the engines of every build."""
    rows: List[Row] = []
    for name, build in find_builds(place).items():
        if isinstance(build, str):
            rows.append(Row(f"build {name}", DIFFERS, build))
            continue
        rows += [*check_exports(place, build), *check_engines(place, build)]
    if not any(row.what.startswith("ONNX") for row in rows):
        rows.append(Row("ONNX exports", MISSING, f"none under {place.folder}", "bash preprocess.sh"))
    if not any(row.what.startswith("engines") for row in rows):
        fix = "" if place.version is None else "python3 build_engines.py"
        rows.append(Row("engines", MISSING, f"none under {place.folder}", fix))
    return rows


def check_exports(place: Place, build: Build) -> List[Row]:
    from deploy.manifest import ArtefactError, check_artefact, export_command, identity
    from deploy.spec import graph_specs

    what, specs, target = f"ONNX {build.folder_name}", graph_specs(build), place.folder / build.folder_name
    if not any((target / spec.file).is_file() for spec in specs.values()):
        return []
    weights = _weights_of(place, build, what)
    if isinstance(weights, Row):
        return [weights]
    try:
        for spec in specs.values():
            check_artefact(target / spec.file, identity(build, spec, weights), place.folder / ".hashes.json")
    except ArtefactError as error:
        return [Row(what, DIFFERS, first_line(error), export_command(build, weights, place.folder))]
    return [Row(what, OK, f"{len(specs)} graphs, of {weights}")]


def check_engines(place: Place, build: Build) -> List[Row]:
    from deploy.manifest import ArtefactError
    from deploy.plan_manifest import check_plan, engine_command, plan_path
    from deploy.spec import graph_specs

    what, specs, target = f"engines {build.folder_name}", graph_specs(build), place.folder / build.folder_name
    if not any(plan_path(target, spec).is_file() for spec in specs.values()):
        return []
    weights = _weights_of(place, build, what)
    if isinstance(weights, Row):
        return [weights]
    command = engine_command(build, weights, place.folder)
    try:
        machine = place.machine()
    except ArtefactError as error:
        return [Row(what, DIFFERS, first_line(error))]
    try:
        for spec in specs.values():
            check_plan(plan_path(target, spec), build, spec, weights, machine, place.folder / ".hashes.json")
    except ArtefactError as error:
        # Its message ends with the command.
        return [Row(what, DIFFERS, first_line(error).split("; build it with: ")[0], command)]
    return [Row(what, OK, f"{len(specs)} plans for TensorRT {machine.tensorrt} on {machine.gpu}, of {weights}")]


def _weights_of(place: Place, build: Build, what: str) -> Any:
    """The weights that a build has to be of, or the row that says that there are none."""
    from cldm.weights import CheckpointError

    try:
        return place.weights(build.config)
    except CheckpointError as error:
        fix = f"python3 doctor.py --model {build.config.name} --random-weights SEED, if it is of random weights"
        return Row(what, DIFFERS, f"nothing to compare with: {first_line(error)}", fix)


def check_metric(name: str, file: str, package: str) -> Row:
    """The weights of a metric."""
    from scoring.backbones import NotMeasured, find_backbone

    what = f"weights of {name}"
    try:
        return Row(what, OK, str(find_backbone(file, package)))
    except NotMeasured as error:
        reason, _, fix = first_line(error).partition(", ")
        return Row(what, MISSING, f"{reason}; without it the score lacks {name}", fix)
    except ValueError as error:
        return Row(what, DIFFERS, first_line(error), "copy it again")


def check_metrics() -> List[Row]:
    from cldm.weights import ALEXNET_WEIGHTS, INCEPTION_WEIGHTS

    return [
        check_metric("PD", INCEPTION_WEIGHTS, "pytorch_fid"),
        check_metric("LPIPS", ALEXNET_WEIGHTS, "lpips"),
    ]


def check_fused(place: Place) -> List[Row]:
    """The fused networks of the torch backend, and the table of their tile sizes."""
    from runtime.fused.build import SHIPPED, fused_problem
    from runtime.fused.tuning import Card, card_slug, read_table

    problem = fused_problem("cuda" if place.gpu is not None else "cpu", "fp16")
    if problem is not None or place.gpu is None:
        fix = "pip install triton" if problem and "triton" in problem else ""
        return [Row("fused networks", MISSING, str(problem), fix)]
    card = Card(place.gpu.name, int(place.gpu.compute_capability.replace(".", "")), 0, 0)
    places = [folder / f"{card_slug(card)}.json" for folder in (place.folder / "tuning", SHIPPED)]
    tables = [path for path in places if path.is_file()]
    rows = [Row("fused networks", OK, "they run in FP16 and BF16")]
    if not tables:
        return [*rows, Row("tile sizes", MISSING, f"none of {place.gpu.name}; measured on the first start, in minutes")]
    try:
        found = ", ".join(f"{len(read_table(path))} in {path}" for path in tables)
    except ValueError as error:
        reason, _, fix = first_line(error).rpartition("; ")
        return [*rows, Row("tile sizes", DIFFERS, reason, fix)]
    return [*rows, Row("tile sizes", OK, found)]


def check_calibration(place: Place) -> Row:
    """What fewer evaluations than asked for are chosen by; exact sampling needs none."""
    from sampling.calibration import CalibrationError, Running, by_count, find_calibrations

    weights = place.weights(place.config)
    try:
        found = find_calibrations(place.config, weights, place.folder, Running(place.config.name, weights.digest))
    except CalibrationError as error:
        reason, _, command = first_line(error).partition(". Make one with: ")
        return Row("calibration", MISSING, f"{reason}; only --speed needs it", command)
    counts = ", ".join(map(str, by_count(found)))
    return Row("calibration", OK, f"of {found[0].setting.num_steps} steps, for {counts} evaluations")
