"""Spreads, tables and plots of the benchmarks. No torch here."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple
from xml.sax.saxutils import escape

import numpy as np

# Okabe and Ito's colours, which the colour-blind can tell apart too.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#999999", "#56b4e9", "#d55e00")
WIDTH, LEFT, RIGHT, ROW, GAP = 860, 190, 90, 30, 12
TITLE, AXIS, LEGEND = 52, 46, 28
PLOT_HEIGHT = 260


@dataclasses.dataclass(frozen=True)
class Spread:
    """Repeated measurements of one thing, all in the unit of the samples.

    Attributes
    ----------
    p5, p95 : float
        Percentiles, linear between the samples.
    """

    count: int
    median: float
    p5: float
    p95: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Raises ValueError for no samples, or one that is not finite."""
        if not len(samples) or not np.isfinite(samples).all():
            raise ValueError(f"a spread needs finite samples, got {list(samples)[:5]}")
        p5, median, p95 = (float(value) for value in np.percentile(samples, (5, 50, 95)))
        return cls(len(samples), median, p5, p95, float(min(samples)), float(max(samples)))

    @property
    def relative(self) -> float:
        """Distance of the two percentiles over the median."""
        return (self.p95 - self.p5) / self.median if self.median else 0.0

    def cells(self) -> List[str]:
        """Median, p5, p95, spread and count for a table with the header `SPREAD`."""
        return [number(self.median), number(self.p5), number(self.p95), f"{self.relative:.1%}", str(self.count)]

    def to_json(self) -> Dict[str, float]:
        return {**dataclasses.asdict(self), "relative": self.relative}


SPREAD = ("median", "p5", "p95", "spread", "repeats")


def number(value: Optional[float]) -> str:
    """Three or more significant digits, without an exponent; "-" for None."""
    if value is None:
        return "-"
    digits = 3 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 4)}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of aligned columns: the first to the left, the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    if any(len(line) != len(header) for line in lines):
        raise ValueError(f"every row needs {len(header)} cells")
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths)))
        for line in lines
    )


def round_up(value: float) -> float:
    """An axis's end: the least of 1, 1.5, 2, 3, 4, 5, 6, 8 and 10 times a power of ten that is at least `value`."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= value * (1 - 1e-9))


class _Svg:
    """Shapes with a white ground, in pixels from the upper left corner."""

    def __init__(self, height: float, title: str, subtitle: str) -> None:
        self._height = height
        self._shapes: List[str] = []
        self.text(14, 22, title, size=15, weight="bold")
        self.text(14, 40, subtitle, size=11, colour="#555555")

    def text(
        self, x: float, y: float, text: str, anchor: str = "start", size: int = 12, weight: str = "normal", **more: str
    ) -> None:
        self._shapes.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
            f' fill="{more.get("colour", "#222222")}">{escape(text)}</text>'
        )

    def box(self, x: float, y: float, width: float, height: float, colour: str, hint: str) -> None:
        self._shapes.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}" fill="{colour}">'
            f"<title>{escape(hint)}</title></rect>"
        )

    def line(self, points: Sequence[Tuple[float, float]], colour: str, width: float = 1, dashes: str = "none") -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._shapes.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"'
            f' stroke-dasharray="{dashes}"/>'
        )

    def dot(self, x: float, y: float, colour: str) -> None:
        self._shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')

    def render(self) -> str:
        size = f'width="{WIDTH}" height="{self._height:.0f}" viewBox="0 0 {WIDTH} {self._height:.0f}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
        return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *self._shapes, "</svg>", ""])


def _check(values: Sequence[float]) -> None:
    if not values or not all(math.isfinite(value) and value >= 0 for value in values):
        raise ValueError(f"a plot needs finite values of at least 0, got {list(values)[:5]}")


def bars(
    title: str,
    subtitle: str,
    unit: str,
    rows: Mapping[str, Mapping[str, float]],
    mark: Optional[Tuple[str, float]] = None,
) -> str:
    """An SVG of horizontal stacked bars.

    Parameters
    ----------
    rows : mapping of str to mapping of str to float
        For each bar its parts, in `unit`; a part has the same colour in all bars.
    mark : (str, float), optional
        A dashed vertical line with its label.

    Raises
    ------
    ValueError
        No bars, or a part that is negative or not finite.
    """
    parts = list(dict.fromkeys(name for row in rows.values() for name in row))
    _check([value for row in rows.values() for value in row.values()] + ([mark[1]] if mark else []))
    totals = {name: sum(row.values()) for name, row in rows.items()}
    end = round_up(max([*totals.values(), mark[1] if mark else 0.0]))
    scale = (WIDTH - LEFT - RIGHT) / end
    bottom = TITLE + LEGEND + len(rows) * (ROW + GAP)
    svg = _Svg(bottom + AXIS, title, subtitle)
    _legend(svg, parts)
    for i in range(6):
        x = LEFT + scale * end * i / 5
        svg.line([(x, TITLE + LEGEND - 6), (x, bottom)], "#dddddd")
        svg.text(x, bottom + 16, f"{end * i / 5:g}", "middle", 11)
    svg.text(LEFT + scale * end / 2, bottom + 34, unit, "middle", 11)
    for i, (name, row) in enumerate(rows.items()):
        x, y = float(LEFT), TITLE + LEGEND + i * (ROW + GAP)
        svg.text(LEFT - 8, y + ROW * 0.65, name, "end")
        for part, value in row.items():
            svg.box(x, y, scale * value, ROW, COLOURS[parts.index(part) % len(COLOURS)], f"{part}: {number(value)}")
            x += scale * value
        svg.text(x + 6, y + ROW * 0.65, number(totals[name]))
    if mark:
        x = LEFT + scale * mark[1]
        svg.line([(x, TITLE + LEGEND - 6), (x, bottom)], "#000000", 1.5, "5 4")
        svg.text(x + 4, bottom - 2, mark[0], size=11)
    return svg.render()


def _legend(svg: _Svg, names: Sequence[str]) -> None:
    if len(names) < 2:
        return
    x = float(LEFT)
    for i, name in enumerate(names):
        svg.box(x, TITLE, 12, 12, COLOURS[i % len(COLOURS)], name)
        svg.text(x + 17, TITLE + 10, name, size=11)
        x += 34 + 6.5 * len(name)


def curve(title: str, subtitle: str, labels: Tuple[str, str], points: Sequence[Tuple[float, float]]) -> str:
    """An SVG of y over x through the points, both axes from 0.

    Parameters
    ----------
    labels : (str, str)
        Of the horizontal and the vertical axis.

    Raises
    ------
    ValueError
        No points, or one that is negative or not finite.
    """
    _check([value for point in points for value in point])
    # Above the highest point is room for its number.
    ends = [round_up(room * max(point[axis] for point in points)) for axis, room in ((0, 1.0), (1, 1.1))]
    bottom, left = TITLE + PLOT_HEIGHT, 80
    right = WIDTH - RIGHT

    def place(point: Tuple[float, float]) -> Tuple[float, float]:
        return left + (right - left) * point[0] / ends[0], bottom - PLOT_HEIGHT * point[1] / ends[1]

    svg = _Svg(bottom + AXIS, title, subtitle)
    for i in range(6):
        y = bottom - PLOT_HEIGHT * i / 5
        svg.line([(left, y), (right, y)], "#dddddd")
        svg.text(left - 8, y + 4, f"{ends[1] * i / 5:g}", "end", 11)
    svg.text(left, bottom + 36, f"{labels[1]} over {labels[0]}", size=11)
    placed = [place(point) for point in points]
    svg.line(placed, COLOURS[0], 2)
    for (x, y), point in zip(placed, points):
        svg.dot(x, y, COLOURS[0])
        svg.text(x, y - 9, number(point[1]), "middle", 11)
        svg.text(x, bottom + 18, f"{point[0]:g}", "middle", 11)
    return svg.render()


def as_json(value: Any) -> Any:
    """`value` with every `Spread` in it as a mapping, for `json`."""
    if isinstance(value, Spread):
        return value.to_json()
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return value


def from_json(value: Any) -> Any:
    """What `as_json` was given, as far as JSON can tell."""
    if isinstance(value, dict):
        if set(value) == {*Spread.__dataclass_fields__, "relative"}:
            return Spread(**{name: item for name, item in value.items() if name != "relative"})
        return {key: from_json(item) for key, item in value.items()}
    return [from_json(item) for item in value] if isinstance(value, list) else value
