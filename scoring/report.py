"""The score as text, JSON, CSV and a contact sheet."""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import io
import math
import platform
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from cldm.files import atomic_path, write_json
from cldm.machine import available_cores, processor_name
from scoring.measures import COMPARISONS, LATENCY, Measure, summarise
from scoring.pd import PD_LIMIT
from scoring.runner import PictureScore, Score
from scoring.sheet import contact_sheet, encode_png

PACKAGES = (
    "torch",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "numpy",
    "opencv-python",
    "opencv-python-headless",
    "pillow",
    "torchvision",
    "pytorch-fid",
    "lpips",
)
ABSENT = "-"
NOT_MEASURED = "not measured"


def environment() -> Dict[str, Any]:
    """Python, system, processor, usable cores, and the versions of the packages that decide numbers and times."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": available_cores(),
        "packages": versions,
    }


def what_runs(receipt: Dict[str, Any], warmup: int, repeats: int, by_plan: bool = False) -> str:
    """The first lines of the report, from the receipt of a run.

    Parameters
    ----------
    warmup, repeats : int
        Of `scoring.runner.ScoreOptions`.
    by_plan : bool
        Plans are compared, as `scoring.speed.SpeedRunner` does: it times `run`, not `process`, and warms up each plan
        at each picture size.
    """
    timed = _count(repeats, "timed call")
    if by_plan:
        latency = f"wall clock of run(), {timed} a picture and plan, after {warmup} untimed a plan and picture size"
    else:
        median = ", their median" if repeats > 1 else ""
        latency = f"wall clock of process(), {timed} a picture{median}, after {warmup + 1} untimed"
    lines = [
        f"model      {receipt['model']}, {receipt['weights']}",
        f"backend    {receipt['backend']}: {receipt['backend_reason']}",
        f"precision  {receipt['precision']} on {receipt['device']}",
        f"image      {receipt['width']} x {receipt['height']}, {receipt['evaluations']} network evaluations,"
        f" seed {receipt['seed']}",
        f"sampling   {receipt['sampling']}",
        f"latency    {latency}",
    ]
    lines.extend(f"warning    {warning}" for warning in receipt["warnings"])
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _cell(measure: Measure, value: Optional[float], mark: bool) -> str:
    if value is None:
        return ABSENT
    text = format(value, measure.form)
    if mark and measure.key == "pd":
        text += " pass" if value <= PD_LIMIT else " FAIL"
    return text


def format_table(
    measures: Sequence[Measure], rows: Sequence[Tuple[str, Dict[str, float]]], not_measured: Dict[str, str]
) -> str:
    """A plain text table: one line a picture, then mean, p50, p95 and max of every measure.

    Parameters
    ----------
    rows : sequence of (name, values)
        At least one.
    not_measured : dict of str to str
        Reasons, printed under the table; those columns hold dashes.
    """
    header = ["picture", *(measure.title for measure in measures)]
    body = [[name, *(_cell(measure, values.get(measure.key), True) for measure in measures)] for name, values in rows]
    summaries = _summaries(measures, [values for _, values in rows])
    tail = [
        [statistic, *(_cell(m, summaries[m.key][statistic] if m.key in summaries else None, False) for m in measures)]
        for statistic in ("mean", "p50", "p95", "max")
    ]
    widths = [max(len(line[i]) for line in [header, *body, *tail]) for i in range(len(header))]

    def join(line: Sequence[str]) -> str:
        return "  ".join([line[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(line[1:], widths[1:]))])

    rule = "-" * len(join(header))
    lines = [join(header), rule, *map(join, body), rule, *map(join, tail)]
    titles = {measure.key: measure.title for measure in measures}
    lines.extend(f"{titles[key]}: {reason}" for key, reason in not_measured.items() if key in titles)
    return "\n".join(lines)


def _summaries(measures: Sequence[Measure], rows: Sequence[Dict[str, float]]) -> Dict[str, Dict[str, float]]:
    """Statistics of each measure that any picture has."""
    columns = {m.key: [values[m.key] for values in rows if m.key in values] for m in measures}
    return {key: summarise(column) for key, column in columns.items() if column}


def _measures(score: Score) -> List[Measure]:
    return [LATENCY, *(COMPARISONS if score.options.reference else ())]


def format_report(score: Score) -> str:
    """Tables, pass count, noise floor, warnings, what sampling the figures are of, and total time."""
    rows = [(picture.name, picture.values) for picture in score.pictures]
    lines = [format_table(_measures(score), rows, score.not_measured)]
    distances = [picture.values["pd"] for picture in score.pictures if "pd" in picture.values]
    if distances:
        passed = sum(value <= PD_LIMIT for value in distances)
        lines.append(f"PD <= {PD_LIMIT:g}: {passed} of {len(distances)} pictures pass")
    if score.options.noise_floor:
        floors = [(picture.name, picture.floor) for picture in score.pictures if picture.floor is not None]
        lines.append("\nNoise floor: the reference made twice, and compared with itself")
        lines.append(format_table(COMPARISONS, floors, {}))
    lines.extend(_warnings(score.pictures))
    ran = dict.fromkeys(picture.receipt["sampling"] for picture in score.pictures)
    lines.extend(f"sampling   {sampling}" for sampling in ran)
    made = sum(picture.reference_receipt is not None and not picture.reference_cached for picture in score.pictures)
    references = f", {_count(made, 'reference')} made" if score.options.reference else ""
    lines.append(f"total      {score.seconds:.1f} s for {_count(len(score.pictures), 'picture')}{references}")
    return "\n".join(lines)


def _warnings(pictures: Sequence[PictureScore]) -> List[str]:
    """Each warning once, with the pictures that it is about; those of the first receipt stand at the top already."""
    about: Dict[str, List[str]] = {}
    for picture in pictures:
        for warning in picture.warnings:
            if warning not in pictures[0].receipt["warnings"]:
                about.setdefault(warning, []).append(picture.name)
    return [f"warning    {', '.join(names)}: {warning}" for warning, names in about.items()]


def to_json(score: Score, arguments: Dict[str, Any]) -> Dict[str, Any]:
    """Everything, as plain values; an infinite number becomes the string "inf", which JSON has no number for."""
    rows = [picture.values for picture in score.pictures]
    floors = [picture.floor for picture in score.pictures if picture.floor is not None]
    report = {
        "arguments": arguments,
        "request": dataclasses.asdict(score.options.request),
        "environment": environment(),
        "pd_limit": PD_LIMIT,
        "not_measured": score.not_measured,
        "pictures": [_picture_json(picture) for picture in score.pictures],
        "summary": _summaries(_measures(score), rows),
        "noise_floor": _summaries(COMPARISONS, floors) if floors else None,
        "seconds": score.seconds,
    }
    return to_plain(report)


def _picture_json(picture: PictureScore) -> Dict[str, Any]:
    entry = dataclasses.asdict(picture)
    entry["passes"] = picture.values["pd"] <= PD_LIMIT if "pd" in picture.values else None
    return entry


def to_plain(value: Any) -> Any:
    """Lists and dicts all the way down, with numbers that JSON does not have as strings."""
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def to_csv(score: Score) -> str:
    """One line a picture; a measure that could not be taken says so."""
    measures = _measures(score)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["picture", *(measure.key for measure in measures)])
    for picture in score.pictures:
        writer.writerow([picture.name, *(picture.values.get(measure.key, NOT_MEASURED) for measure in measures)])
    return text.getvalue()


def write_report(score: Score, folder: Path, arguments: Dict[str, Any]) -> List[Path]:
    """Write score.json, score.csv and contact_sheet.png into a folder, each one whole or not at all.

    Raises
    ------
    OSError
        The folder cannot be written or its disk is full.
    """
    paths = [folder / name for name in ("score.json", "score.csv", "contact_sheet.png")]
    write_json(paths[0], to_json(score, arguments))
    with atomic_path(paths[1]) as temporary:
        temporary.write_text(to_csv(score), encoding="utf-8")
    receipt = score.pictures[0].receipt
    ours = f"ours ({receipt['backend']}, {receipt['precision']}, {receipt['evaluations']} evaluations)"
    sheet = contact_sheet(score.sheet, ours)
    with atomic_path(paths[2]) as temporary:
        temporary.write_bytes(encode_png(sheet))
    return paths
