"""The study's numbers: kept as JSON, shown as tables and a chart, put into the document."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from cldm.files import atomic_path, write_json
from scoring.report import to_plain
from tools.sampler.chart import Panel, draw_chart

CHART = "sampler_error.svg"
# Wanted of the calibrated sampler: evaluations, and the most that its error may be in those of the best subset's of 10.
WANTED = ((8, 1.0), (7, 1.2))
BASE, BASE_COUNT = "DDIM, best subset", 10
CALIBRATED = ("calibrated, polished", "calibrated")
ERROR = "latent_relative_error"
IMAGE_MEASURES = (("psnr_db", "PSNR, dB", ".1f"), ("pd", "PD", ".2f"), ("lpips", "LPIPS", ".3f"))
# Numbers of evaluations whose images are measured.
IMAGE_COUNTS = (7, 8, 10, 20)
NOTHING = "-"


class StudyReport:
    """What was measured so far.

    Attributes
    ----------
    settings : dict
        What ran, on what.
    values : dict
        errors: by precision, method and evaluations; transfer, savings, precision, bound: rows; latency: by precision.
    """

    def __init__(self) -> None:
        self.settings: Dict[str, Any] = {}
        self.values: Dict[str, Any] = {
            "errors": {},
            "transfer": [],
            "savings": [],
            "precision": [],
            "latency": {},
            "bound": [],
        }

    def add_error(self, precision: str, method: str, evaluations: int, values: Dict[str, float]) -> None:
        self.values["errors"].setdefault(precision, {}).setdefault(method, {})[evaluations] = values

    def add_transfer(self, where: str, evaluations: int, errors: Dict[str, float]) -> None:
        self.values["transfer"].append({"where": where, "evaluations": evaluations, **errors})

    def add_saving(self, saving: str, evaluations: int, halves: float, error: float, whole: float) -> None:
        """`whole` is the error of whole evaluations at the same cost."""
        row = {"saving": saving, "evaluations": evaluations, "halves": halves, "error": error, "whole": whole}
        self.values["savings"].append(row)

    def add_precision(self, evaluations: int, first: int, error: float) -> None:
        """The first so many evaluations were in FP32, the others in FP16."""
        self.values["precision"].append({"evaluations": evaluations, "first": first, "error": error})

    def add_latency(self, precision: str, backend: str, fixed_ms: float, evaluation_ms: float) -> None:
        row = {"backend": backend, "fixed_ms": fixed_ms, "evaluation_ms": evaluation_ms}
        self.values["latency"][precision] = row

    def add_bound(self, indices: Sequence[int], errors: Dict[str, float]) -> None:
        """Errors of students with weights of their own, by what the weights are of."""
        self.values["bound"].append({"indices": list(indices), "errors": errors})

    def tables(self) -> Dict[str, str]:
        """Markdown of every part that was measured, by name."""
        found = {f"errors-{name}": self._errors(name) for name in self.values["errors"]}
        found.update({f"images-{name}": self._images(name) for name in self.values["errors"]})
        found["wanted"] = self._wanted()
        if self.values["transfer"]:
            found["transfer"] = self._transfer()
        if self.values["savings"]:
            found["savings"] = self._savings()
        if self.values["precision"]:
            found["precision"] = self._precision()
        if self.values["latency"]:
            found["latency"] = self._latency()
        if self.values["bound"]:
            found["bound"] = self._bound()
        found["measured"] = self._measured()
        return {name: text for name, text in found.items() if text}

    def text(self) -> str:
        """All tables under their names."""
        return "\n\n".join(f"{name}\n\n{table}" for name, table in self.tables().items())

    def write(self, folder: Path, document: Optional[Path] = None) -> List[Path]:
        """Write study.json and the chart; with a document also the chart beside it and its tables.

        Raises
        ------
        OSError
            A file cannot be read or written.
        """
        study = folder / "study.json"
        write_json(study, to_plain({"settings": self.settings, **self.values}))
        written, chart = [study], self._chart()
        folders = [folder, *([document.parent] if document is not None else [])]
        for place in folders if chart is not None else []:
            with atomic_path(place / CHART) as temporary:
                temporary.write_text(str(chart), encoding="utf-8")
            written.append(place / CHART)
        if document is not None:
            text = fill_tables(document.read_text(encoding="utf-8"), self.tables())
            with atomic_path(document) as temporary:
                temporary.write_text(text, encoding="utf-8")
            written.append(document)
        return written

    def _errors(self, precision: str) -> str:
        """Relative latent error by method and evaluations."""
        methods = self.values["errors"][precision]
        counts = sorted({count for rows in methods.values() for count in rows})
        body = [
            [name, *(_number(rows.get(count, {}).get(ERROR), ".3f") for count in counts)]
            for name, rows in methods.items()
        ]
        return markdown(["evaluations", *map(str, counts)], body)

    def _images(self, precision: str) -> str:
        """Image measures of the methods, at the numbers of evaluations that matter most."""
        methods = self.values["errors"][precision]
        counts = [c for c in IMAGE_COUNTS if any(c in rows for rows in methods.values())]
        taken = [m for m in IMAGE_MEASURES if any(m[0] in v for rows in methods.values() for v in rows.values())]
        if not taken or not counts:
            return ""
        head = ["", *(f"{title}, {count} evaluations" for _, title, _ in taken for count in counts)]
        body = [
            [name, *(_number(rows.get(count, {}).get(key), form) for key, _, form in taken for count in counts)]
            for name, rows in methods.items()
        ]
        return markdown(head, body)

    def verdicts(self) -> List[Tuple[int, str, float, float]]:
        """Evaluations, method, its error in those of the base, and the most that was wanted; in FP32."""
        methods = self.values["errors"].get("fp32", {})
        base = methods.get(BASE, {}).get(BASE_COUNT, {}).get(ERROR)
        found = []
        for count, limit in WANTED if base else ():
            for name in CALIBRATED:
                error = methods.get(name, {}).get(count, {}).get(ERROR)
                if error is not None:
                    found.append((count, name, error / base, limit))
        return found

    def _wanted(self) -> str:
        body = [
            [str(count), name, f"{ratio:.2f}", f"{limit:g}", "yes" if ratio <= limit else "**missed**"]
            for count, name, ratio, limit in self.verdicts()
        ]
        head = ["evaluations", "", f"error, in that of {BASE} with {BASE_COUNT}", "at most", "reached"]
        return markdown(head, body) if body else ""

    def _transfer(self) -> str:
        rows = self.values["transfer"]
        names = list(dict.fromkeys(key for row in rows for key in row if key not in ("where", "evaluations")))
        body = [
            [row["where"], str(row["evaluations"]), *(_number(row.get(name), ".3f") for name in names)] for row in rows
        ]
        return markdown(["", "evaluations", *names], body)

    def _savings(self) -> str:
        body = [
            [
                row["saving"],
                str(row["evaluations"]),
                f"{row['halves']:.2f}",
                f"{row['error']:.3f}",
                f"{row['whole']:.3f}",
                "yes" if row["error"] < row["whole"] else "no",
            ]
            for row in self.values["savings"]
        ]
        head = ["saving", "evaluations", "cost in halves", "error", "error of whole evaluations at that cost", "wins"]
        return markdown(head, body)

    def _precision(self) -> str:
        rows = self.values["precision"]
        firsts = sorted({row["first"] for row in rows})
        known = {(row["evaluations"], row["first"]): row["error"] for row in rows}
        counts = sorted({row["evaluations"] for row in rows}, reverse=True)
        body = [[str(count), *(_number(known.get((count, first)), ".2e") for first in firsts)] for count in counts]
        return markdown(["evaluations, of which first in FP32", *map(str, firsts)], body)

    def _bound(self) -> str:
        rows = self.values["bound"]
        names = list(rows[0]["errors"])
        body = [
            [
                str(len(row["indices"])),
                " ".join(map(str, row["indices"])),
                *(_number(row["errors"].get(name), ".3f") for name in names),
            ]
            for row in rows
        ]
        return markdown(["evaluations", "steps evaluated", *names], body)

    def _latency(self) -> str:
        body = [
            [precision, row["backend"], f"{row['fixed_ms']:.1f}", f"{row['evaluation_ms']:.2f}"]
            for precision, row in self.values["latency"].items()
        ]
        return markdown(["precision", "backend", "fixed, ms", "an evaluation, ms"], body)

    def _measured(self) -> str:
        """One line: where the tables come from."""
        s = self.settings
        if not s:
            return ""
        made = s["calibration"]
        calibration = "no calibration" if made is None else f"calibration of {made['number']} cases"
        kinds = ", ".join(f"{number} {kind}" for kind, number in s["kinds"].items())
        return (
            f"*Measured on {s['device']}, torch {s['torch']}, diffusers {s['diffusers']}: {s['cases']} cases"
            f" ({kinds}), {calibration}.*"
        )

    def _chart(self) -> Optional[str]:
        """Error against evaluations and, where latency was measured, also against milliseconds; FP32 first."""
        for precision in ("fp32", "fp16"):
            methods = self.values["errors"].get(precision)
            if methods:
                lines = {
                    name: [(count, values[ERROR]) for count, values in rows.items() if values[ERROR] > 0]
                    for name, rows in methods.items()
                    if name != "exact"
                }
                lines = {name: line for name, line in lines.items() if line}
                break
        else:
            return None
        if not lines:
            return None
        panels = [Panel("Error against evaluations", "network evaluations", lines)]
        for name, row in self.values["latency"].items():
            fixed, each = row["fixed_ms"], row["evaluation_ms"]
            timed = {method: [(fixed + each * n, error) for n, error in line] for method, line in lines.items()}
            if name == precision:
                panels.append(Panel("Error against time", f"milliseconds a picture ({row['backend']})", timed))
        return draw_chart(panels, f"relative error of the latent, {precision}")


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table of GitHub's Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: Optional[float], form: str) -> str:
    return NOTHING if value is None else format(value, form)


def fill_tables(text: str, tables: Dict[str, str]) -> str:
    """A document with each table between its own marks, `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Raises
    ------
    ValueError
        A table has no place in the document.
    """
    for name, table in tables.items():
        pattern = rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)"
        text, places = re.subn(pattern, lambda found, t=table: f"{found[1]}{t}\n{found[2]}", text, flags=re.DOTALL)
        if not places:
            raise ValueError(f"the document has no place for the table {name}: put its marks there")
    return text
