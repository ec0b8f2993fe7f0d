"""Charts as plain SVG, whose colours are the page's: legible on light and on dark ground."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 760
LABELS = 176  # of which the names of bars have so much
ROW, GAP = 24, 10
TOP, BOTTOM, LEFT, RIGHT = 14, 44, 56, 130  # margins of charts with two axes
HEIGHT = 280


@dataclass(frozen=True)
class Bar:
    """One stacked bar.

    Attributes:
        label: at its left.
        parts: length of each part by its name.
        low, high: ends of the whisker around the whole; None without one.
        note: at its right.
    """

    label: str
    parts: Mapping[str, float]
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Point:
    """A value of ``y`` at ``x``, with its interval."""

    x: float
    y: float
    low: float
    high: float
    label: str = ""


def legend(names: Sequence[str]) -> str:
    """The colour of each name, in the order in which charts take them."""
    keys = (f'<span><i class="c{place}"></i>{escape(name)}</span>' for place, name in enumerate(names))
    return f'<p class="legend">{"".join(keys)}</p>'


def stacked_bars(bars: Sequence[Bar], names: Sequence[str], unit: str) -> str:
    """Horizontal bars of stacked parts, on one axis from 0 on.

    Args:
        bars: from the top.
        names: of the parts, in their order and colours.
        unit: of the axis.
    """
    most = max((max(sum(bar.parts.values()), bar.high or 0.0) for bar in bars), default=0.0) or 1.0
    ticks = _ticks(0.0, most)
    notes = 150
    scale = (WIDTH - LABELS - notes) / max(most, ticks[-1])
    height = TOP + len(bars) * (ROW + GAP) + 34
    drawn = [_tick_line(LABELS + tick * scale, TOP, height - 34, _number(tick)) for tick in ticks]
    for place, bar in enumerate(bars):
        top, left = TOP + place * (ROW + GAP), float(LABELS)
        drawn.append(f'<text x="{LABELS - 8}" y="{top + 16}" class="end">{escape(bar.label)}</text>')
        for colour, name in enumerate(names):
            width = bar.parts.get(name, 0.0) * scale
            if width > 0:
                said = f"{bar.label}, {name}: {_number(bar.parts[name])} {unit}"
                drawn.append(
                    f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{ROW}" class="c{colour}">'
                    f"<title>{escape(said)}</title></rect>"
                )
            left += width
        right = left
        if bar.low is not None and bar.high is not None:
            first, last, middle = LABELS + bar.low * scale, LABELS + bar.high * scale, top + ROW / 2
            drawn.append(
                f'<path class="whisker" d="M{first:.1f} {middle}H{last:.1f}M{first:.1f} {middle - 5}v10'
                f'M{last:.1f} {middle - 5}v10"/>'
            )
            right = max(left, last)
        drawn.append(f'<text x="{right + 8:.1f}" y="{top + 16}">{escape(bar.note)}</text>')
    drawn.append(f'<text x="{LABELS}" y="{height - 2}" class="axis">{escape(unit)}</text>')
    return _svg(height, drawn)


def lines(series: Mapping[str, Sequence[Point]], x: str, y: str) -> str:
    """Lines through points with their intervals, both axes from 0 on.

    Args:
        series: points of each line by its name, from left to right.
        x, y: what the axes are.
    """
    points = [point for one in series.values() for point in one]
    across, up = _axes((0.0, max(p.x for p in points)), (0.0, max(p.high for p in points)))
    drawn = _frame(across, up, sorted({point.x for point in points}), x, y)
    ends = _apart({name: up.at(one[-1].y) for name, one in series.items()})
    for colour, (name, one) in enumerate(series.items()):
        path = "L".join(f"{across.at(point.x):.1f} {up.at(point.y):.1f}" for point in one)
        drawn.append(f'<path class="line c{colour}" d="M{path}"/>')
        drawn += [_marked(point, colour, across, up, f"{name}: {_number(point.y)}") for point in one]
        drawn.append(f'<text x="{WIDTH - RIGHT + 10}" y="{ends[name] + 4:.1f}">{escape(name)}</text>')
    return _svg(HEIGHT, drawn)


def scatter(series: Mapping[str, Sequence[Point]], x: str, y: str, least_y: float = 0.0) -> str:
    """Labelled points with their intervals.

    Args:
        series: points of each colour by its name.
        x, y: what the axes are.
        least_y: where the upright axis begins.
    """
    points = [point for one in series.values() for point in one]
    across, up = _axes((0.0, max(p.x for p in points)), (least_y, max(p.high for p in points)))
    drawn = _frame(across, up, _ticks(0.0, across.most), x, y)
    for colour, one in enumerate(series.values()):
        for point in one:
            drawn.append(_marked(point, colour, across, up, f"{point.label}: {_number(point.x)}, {_number(point.y)}"))
            drawn.append(
                f'<text x="{across.at(point.x) + 8:.1f}" y="{up.at(point.y) - 6:.1f}">{escape(point.label)}</text>'
            )
    return _svg(HEIGHT, drawn)


@dataclass(frozen=True)
class _Axis:
    least: float
    most: float
    start: float  # pixels
    end: float

    def at(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.least) / (self.most - self.least)


def _axes(across: tuple[float, float], up: tuple[float, float]) -> tuple[_Axis, _Axis]:
    ends = [_ticks(*one)[-1] for one in (across, up)]
    most = [max(end, one[1], one[0] + 1e-9) for end, one in zip(ends, (across, up), strict=True)]
    return (
        _Axis(across[0], most[0], LEFT, WIDTH - RIGHT),
        _Axis(up[0], most[1], HEIGHT - BOTTOM, TOP),
    )


def _frame(across: _Axis, up: _Axis, at: Sequence[float], x: str, y: str) -> list[str]:
    drawn = [_tick_line(across.at(tick), TOP, HEIGHT - BOTTOM, _number(tick)) for tick in at]
    for tick in _ticks(up.least, up.most):
        height = up.at(tick)
        drawn.append(f'<path class="grid" d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}"/>')
        drawn.append(f'<text x="{LEFT - 8}" y="{height + 4:.1f}" class="end axis">{_number(tick)}</text>')
    drawn.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" class="middle axis">{escape(x)}</text>')
    drawn.append(f'<text x="{LEFT}" y="{TOP - 3}" class="axis">{escape(y)}</text>')
    return drawn


def _marked(point: Point, colour: int, across: _Axis, up: _Axis, said: str) -> str:
    x, y, low, high = across.at(point.x), up.at(point.y), up.at(point.low), up.at(point.high)
    return (
        f'<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"/>'
        f'<circle class="c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{escape(said)}</title></circle>'
    )


def _apart(places: Mapping[str, float], least: float = 15.0) -> dict[str, float]:
    """Heights of labels, moved down where they would lie over each other."""
    moved: dict[str, float] = {}
    last = -math.inf
    for name, place in sorted(places.items(), key=lambda pair: pair[1]):
        last = moved[name] = max(place, last + least)
    return moved


def _tick_line(x: float, top: float, bottom: float, said: str) -> str:
    return (
        f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>'
        f'<text x="{x:.1f}" y="{bottom + 15}" class="middle axis">{said}</text>'
    )


def _ticks(least: float, most: float) -> list[float]:
    """Round numbers, the last of which is at or above ``most``."""
    span = (most - least) or 1.0
    step = 10.0 ** math.floor(math.log10(span))
    for factor in (0.1, 0.2, 0.25, 0.5, 1.0):
        if span / (step * factor) <= 5:
            step *= factor
            break
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [round(place * step, 10) for place in range(first, max(last, first + 1) + 1)]


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _svg(height: float, drawn: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(drawn)}</svg>'
