"""A chart of errors as SVG text, with a logarithmic axis upwards."""

from __future__ import annotations

import math
from typing import Dict, List, Mapping, NamedTuple, Sequence, Tuple
from xml.sax.saxutils import escape

PANEL_WIDTH, PANEL_HEIGHT = 400, 380
LEFT, TOP, BOTTOM, GAP = 60, 30, 44, 70
LEGEND_LINE = 18
LEGEND_WIDTH = 280
# Of Okabe and Ito's palette, which colour-blind readers can tell apart, and black; then the same again, dashed.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")

Line = Sequence[Tuple[float, float]]


class Panel(NamedTuple):
    """One diagram: title, text under its axis, and for each name its points (x, y above 0)."""

    title: str
    axis: str
    lines: Mapping[str, Line]


def draw_chart(panels: Sequence[Panel], up: str) -> str:
    """Panels side by side over one legend, as an SVG file's text.

    Parameters
    ----------
    up : str
        What the vertical axis shows.

    Raises
    ------
    ValueError
        No panel has a point, or a value that goes upwards is not above 0.
    """
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    values = [y for panel in panels for line in panel.lines.values() for _, y in line]
    if not values or min(values) <= 0:
        raise ValueError("a chart needs points, and values above 0 on its logarithmic axis")
    styles = {name: _style(place) for place, name in enumerate(names)}
    across = len(panels) * (PANEL_WIDTH + GAP) - GAP
    columns = max(1, across // LEGEND_WIDTH)
    rows = -(-len(names) // columns)
    width = LEFT + across + 20
    height = TOP + PANEL_HEIGHT + BOTTOM + rows * LEGEND_LINE + 10
    low, high = math.floor(math.log10(min(values)) * 4) / 4, math.ceil(math.log10(max(values)) * 4) / 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
        ' font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for place, panel in enumerate(panels):
        parts += _panel(panel, LEFT + place * (PANEL_WIDTH + GAP), (low, max(high, low + 0.25)), up, styles)
    parts += _legend(styles, columns, TOP + PANEL_HEIGHT + BOTTOM + LEGEND_LINE)
    return "\n".join([*parts, "</svg>", ""])


def _style(place: int) -> str:
    dash = ' stroke-dasharray="5 3"' if place >= len(COLOURS) else ""
    return f'stroke="{COLOURS[place % len(COLOURS)]}"{dash}'


def _panel(panel: Panel, left: int, powers: Tuple[float, float], up: str, styles: Dict[str, str]) -> List[str]:
    across = [x for line in panel.lines.values() for x, _ in line]
    first, last = min(across), max(across)
    margin = 0.03 * (last - first) or 1.0
    first, last = first - margin, last + margin

    def place_x(x: float) -> float:
        return left + (x - first) / (last - first) * PANEL_WIDTH

    def place_y(y: float) -> float:
        return TOP + (powers[1] - math.log10(y)) / (powers[1] - powers[0]) * PANEL_HEIGHT

    bottom = TOP + PANEL_HEIGHT
    parts = [_text(left + PANEL_WIDTH / 2, TOP - 10, panel.title, "middle")]
    parts.append(_text(left + PANEL_WIDTH / 2, bottom + 34, panel.axis, "middle"))
    parts.append(
        f'<text transform="translate({left - 42} {TOP + PANEL_HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(up)}</text>"
    )
    for value in _log_ticks(powers):
        y = place_y(value)
        parts.append(f'<path d="M{left} {y:.1f}h{PANEL_WIDTH}" stroke="#ddd"/>')
        parts.append(_text(left - 6, y + 4, f"{value:g}", "end"))
    for value in _ticks(first, last):
        x = place_x(value)
        parts.append(f'<path d="M{x:.1f} {bottom}v5" stroke="black"/>')
        parts.append(_text(x, bottom + 18, f"{value:g}", "middle"))
    frame = f'<rect x="{left}" y="{TOP}" width="{PANEL_WIDTH}" height="{PANEL_HEIGHT}" fill="none" stroke="black"/>'
    parts.append(frame)
    for name, line in panel.lines.items():
        points = [(place_x(x), place_y(y)) for x, y in sorted(line)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke-width="1.8" {styles[name]}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="white" {styles[name]}/>' for x, y in points]
    return parts


def _log_ticks(powers: Tuple[float, float]) -> List[float]:
    """1, 2 and 5 times each power of ten between two powers."""
    tens = range(math.floor(powers[0]), math.ceil(powers[1]) + 1)
    ticks = [float(f"{factor}e{ten}") for ten in tens for factor in (1, 2, 5)]
    return [tick for tick in ticks if powers[0] <= math.log10(tick) <= powers[1]]


def _ticks(first: float, last: float) -> List[float]:
    """At most ten round numbers between two."""
    step = 10.0 ** math.floor(math.log10((last - first) / 10))
    step = next(step * factor for factor in (1, 2, 5, 10) if (last - first) / (step * factor) <= 10)
    return [step * k for k in range(math.ceil(first / step), math.floor(last / step) + 1)]


def _legend(styles: Dict[str, str], columns: int, top: int) -> List[str]:
    parts = []
    for place, (name, style) in enumerate(styles.items()):
        x = LEFT + (place % columns) * LEGEND_WIDTH
        y = top + (place // columns) * LEGEND_LINE
        parts.append(f'<path d="M{x:.0f} {y - 4}h24" stroke-width="1.8" {style}/>')
        parts.append(_text(x + 30, y, name, "start"))
    return parts


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
