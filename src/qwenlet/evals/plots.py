"""Plots as SVG: bars with errors, curves, heat maps. Colours come from the page around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from qwenlet.evals.figures import Bars, HeatMap, Lines, Plot

_COLOURS = ("#615ced", "#e4572e", "#17a398", "#f2a541", "#7d8597", "#c2185b")
_ROW = 22.0  # height of a bar with its gap
_LETTER = 7.5  # width of a digit


def svg(plot: Plot) -> str:
    """One plot, with its title as its accessible name."""
    if isinstance(plot, Bars):
        return _bars(plot)
    return _lines(plot) if isinstance(plot, Lines) else _heat_map(plot)


def _frame(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    body = "".join(parts)
    name = escape(title, quote=True)
    return (
        f'<svg role="img" aria-label="{name}" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" xmlns="http://www.w3.org/2000/svg">{_text(0, 16, title, weight="600")}{body}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "400") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str = "var(--line)", width: float = 1.0) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def _bars(plot: Bars) -> str:
    left, wide, top = 220.0, 420.0, 28.0
    largest = max([v + (e or 0.0) for v, e in zip(plot.values, plot.errors, strict=True)], default=0.0) or 1.0
    parts = []
    rows = zip(plot.names, plot.values, plot.errors, plot.ours, strict=True)
    for number, (name, value, error, ours) in enumerate(rows):
        y = top + number * _ROW
        end = left + wide * value / largest
        colour = "var(--ours)" if ours else "var(--theirs)"
        parts.append(_text(left - 8, y + 13, name, "end", "600" if ours else "400"))
        parts.append(f'<rect x="{left}" y="{y + 2:.1f}" width="{end - left:.1f}" height="14" fill="{colour}" rx="2"/>')
        spread = 0.0
        if error:
            spread = wide * error / largest
            parts.append(_line(end - spread, y + 9, end + spread, y + 9, "var(--ink)", 1.5))
        parts.append(_text(end + spread + 6, y + 13, f"{value:.1f}"))
    return _frame(left + wide + 70, top + len(plot.names) * _ROW + 6, plot.title, parts)


def _lines(plot: Lines) -> str:
    left, wide, top, high = 70.0, 520.0, 34.0, 260.0
    values = [v for _, curve in plot.curves for v in curve if v is not None and math.isfinite(v)]
    if not values or not plot.x:
        return _frame(left + wide, top, plot.title, [])

    def scaled(value: float) -> float:
        return math.log10(max(value, 1e-12)) if plot.logarithmic else value

    low, peak = min(map(scaled, values)), max(map(scaled, values))
    low = low if plot.logarithmic else min(low, 0.0)
    span = (peak - low) or 1.0
    step = wide / max(len(plot.x) - 1, 1)

    def at(number: int, value: float) -> tuple[float, float]:
        return left + number * step, top + high * (1 - (scaled(value) - low) / span)

    parts = [
        _line(left, top + high, left + wide, top + high),
        _text(left + wide / 2, top + high + 38, plot.x_name, "middle"),
    ]
    parts.append(_text(left, top - 6, plot.y_name))
    marks = [f"{x:g}" for x in plot.x]
    every = math.ceil((max(map(len, marks)) * _LETTER + 8) / step)  # so that they don't run into each other
    for number in range(0, len(marks), every):
        parts.append(_text(left + number * step, top + high + 18, marks[number], "middle"))
    for share in (0.0, 0.5, 1.0):
        mark = low + share * span
        y = top + high * (1 - share)
        parts.append(_line(left, y, left + wide, y))
        parts.append(_text(left - 6, y + 4, f"{10**mark if plot.logarithmic else mark:.3g}", "end"))
    for index, (name, curve) in enumerate(plot.curves):
        colour = _COLOURS[index % len(_COLOURS)]
        points = [at(n, v) for n, v in enumerate(curve) if v is not None and math.isfinite(v)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        y = top + 10 + index * 18
        parts.append(_line(left + wide + 14, y - 4, left + wide + 34, y - 4, colour, 3))
        parts.append(_text(left + wide + 40, y, name))
    return _frame(left + wide + 220, top + high + 50, plot.title, parts)


def _heat_map(plot: HeatMap) -> str:
    left, top, cell_wide, cell_high = 110.0, 52.0, 46.0, 26.0
    middle = left + len(plot.columns) * cell_wide / 2
    parts = [_text(middle, 34, plot.x_name, "middle"), _text(left - 8, top - 2, plot.y_name, "end")]
    for number, name in enumerate(plot.columns):
        parts.append(_text(left + (number + 0.5) * cell_wide, top - 2, name, "middle"))
    for row, (name, values) in enumerate(zip(plot.rows, plot.values, strict=True)):
        y = top + 4 + row * cell_high
        parts.append(_text(left - 8, y + 17, name, "end"))
        for column, value in enumerate(values):
            x = left + column * cell_wide
            # red over yellow to green; what was not run is left open
            fill = "none" if value is None else f"hsl({120 * min(max(value, 0.0), 1.0):.0f} 60% 55%)"
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell_wide - 2}" height="{cell_high - 2}" fill="{fill}" '
                f'stroke="var(--line)"><title>{escape(name)}, {escape(plot.columns[column])}: '
                f"{'not run' if value is None else f'{value:.2f}'}</title></rect>"
            )
    width = left + len(plot.columns) * cell_wide + 10
    return _frame(max(width, 320.0), top + len(plot.rows) * cell_high + 12, plot.title, parts)
