"""What was measured against what was asked: rows, table, JSON and picture sheets."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np

from cldm.files import atomic_path, write_json
from scoring.sheet import encode_png, image_grid
from tools.tiny.measures import EdgeMatch, mean_and_error

FORMS = {"%": ".1f", "dB": ".2f", "levels": ".2f", "": ".4g"}


@dataclass(frozen=True)
class Row:
    """One measure.

    Attributes
    ----------
    value : float
        In `unit`, one of `FORMS`.
    error : float or None
        Standard error of the mean.
    note : str
        What else is to be known, such as the spread.
    at_least, at_most : float or None
        The limit asked for, where there is one.
    """

    section: str
    name: str
    value: float
    unit: str = ""
    error: Optional[float] = None
    note: str = ""
    at_least: Optional[float] = None
    at_most: Optional[float] = None

    @property
    def passed(self) -> Optional[bool]:
        """Whether the limit is kept; None without one. NaN keeps none."""
        if self.at_least is None and self.at_most is None:
            return None
        above = self.at_least is None or self.value >= self.at_least
        below = self.at_most is None or self.value <= self.at_most
        return above and below

    @property
    def asked(self) -> str:
        """The limit with its unit; empty without one."""
        limits = [(">=", self.at_least), ("<=", self.at_most)]
        return " ".join(f"{sign} {limit:g} {self.unit}".strip() for sign, limit in limits if limit is not None)

    @property
    def reached(self) -> str:
        """The value with its unit."""
        return f"{self.value:{FORMS[self.unit]}} {self.unit}".strip()

    def cells(self) -> List[str]:
        """The row of the table."""
        error = "" if self.error is None else f"+- {self.error:{FORMS[self.unit]}}"
        verdict = {None: "", True: "pass", False: "MISSED"}[self.passed]
        return [self.section, self.name, self.asked, self.reached, error, verdict, self.note]


TITLES = ("section", "measure", "asked", "reached", "std. error", "verdict", "note")


@dataclass
class Report:
    """The rows in order; details that are no single number go to the JSON file only.

    Attributes
    ----------
    settings : dict
        What ran: model, weights, device and so on.
    """

    settings: Dict[str, Any]
    rows: List[Row] = field(default_factory=list)
    details: Dict[str, Any] = field(default_factory=dict)

    def add(self, section: str, name: str, value: float, **others: Any) -> None:
        """Append a `Row`."""
        self.rows.append(Row(section, name, float(value), **others))

    def add_mean(self, section: str, name: str, values: Sequence[float], **others: Any) -> None:
        """Append the mean of values with its standard error."""
        mean, error = mean_and_error(values)
        self.add(section, name, mean, error=error, **others)

    def add_edges(
        self,
        section: str,
        name: str,
        matches: Sequence[EdgeMatch],
        recall: Optional[float] = None,
        precision: Optional[float] = None,
        pooled_only: bool = False,
        note: str = "",
    ) -> None:
        """Append recall and precision, in percent, pooled over pixels and, if not told otherwise, as the images' mean.

        Parameters
        ----------
        recall, precision : float, optional
            Least values asked for, in percent.
        note : str
            What one match stands for, where that is more than one picture.
        """
        pooled = sum(matches, EdgeMatch())
        note = note or f"{len(matches)} pictures"
        for measure, limit in (("recall", recall), ("precision", precision)):
            title, value = f"{measure}, {name}: all pixels", 100 * getattr(pooled, measure)
            self.add(section, title, value, unit="%", at_least=limit, note=note)
            if pooled_only:
                continue
            shares = [100 * getattr(match, measure) for match in matches]
            title = f"{measure}, {name}: mean of images"
            self.add_mean(section, title, shares, unit="%", at_least=limit, note=note)

    @property
    def missed(self) -> List[Row]:
        return [row for row in self.rows if row.passed is False]

    @property
    def limits(self) -> int:
        """How many rows have a limit."""
        return sum(row.passed is not None for row in self.rows)

    def table(self) -> str:
        """The rows as aligned text."""
        lines = [list(TITLES), *(row.cells() for row in self.rows)]
        lines.insert(1, ["-" * max(len(line[i]) for line in lines) for i in range(len(TITLES))])
        return _aligned(lines)

    def write(self, folder: Path) -> Path:
        """Write report.json; returns its path."""
        path = folder / "report.json"
        rows = [{**asdict(row), "passed": row.passed} for row in self.rows]
        write_json(path, {"settings": self.settings, "rows": rows, "details": self.details})
        return path


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def edges_table(shares: Mapping[str, Mapping[str, float]]) -> str:
    """By name, number of pictures, and recall and precision in percent, as aligned text."""
    lines = [["", "pictures", "recall", "precision"]]
    for name, own in shares.items():
        lines.append([name, f"{own['pictures']}", f"{own['recall']:.1f} %", f"{own['precision']:.1f} %"])
    return _aligned(lines)


def confusion_table(counts: np.ndarray, words: Sequence[str]) -> str:
    """Counts of asked words (rows) that came out as others (columns, the last for grey) as text."""
    titles = ["asked", *words, "grey", "right"]
    lines = [titles]
    for i, (word, row) in enumerate(zip(words, counts)):
        right = f"{100 * row[i] / row.sum():.0f} %" if row.sum() else "-"
        lines.append([word, *(str(int(n)) for n in row), right])
    width = max(len(cell) for line in lines for cell in line)
    return "\n".join("  ".join(cell.rjust(width) for cell in line) for line in lines)


def write_sheet(
    path: Path, titles: Sequence[str], captions: Sequence[str], rows: Sequence[Sequence[np.ndarray]], cell_width: int
) -> None:
    """Write a PNG grid of (h, w, 3) RGB images and (h, w) edge maps, scaled to `cell_width`."""
    sheet = image_grid(titles, captions, [[as_bgr(image) for image in line] for line in rows], cell_width)
    with atomic_path(path) as temporary:
        temporary.write_bytes(encode_png(sheet))


def as_bgr(image: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 BGR of an RGB image or of an (h, w) edge map."""
    return np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else np.ascontiguousarray(image[:, :, ::-1])
