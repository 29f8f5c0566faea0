"""A line chart as SVG text: no library, no script, no network.

    build_chart("loss", [Series("training", [(1, 9.1), (2, 8.7)]), Series("held out", [(2, 8.9)])])

The drawn area's ends stand in the element's data attributes, so that a program can read the numbers back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 720, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 12, 12, 28
_COLOURS = ("#1f6fb4", "#d1495b", "#2e8b57", "#8f5fbf")
_MOST_POINTS = 800  # of a line; more are not seen
_MOST_MARKS = 60  # points that are shown, each with its numbers when pointed at
_TICKS = 5


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: what it is.
        points: step and value, in order; a value that is NaN or infinite breaks the line.
    """

    name: str
    points: Sequence[tuple[float, float]]


def build_chart(name: str, series: Sequence[Series]) -> str:
    """The chart's `<svg>` element; empty when no value can be drawn.

    Args:
        name: what is shown, for those who cannot see it.
        series: the lines; those without a finite value are left out.
    """
    lines = [line for line in series if any(math.isfinite(value) for _, value in line.points)]
    drawn = [(x, y) for line in lines for x, y in line.points if math.isfinite(y)]
    if not drawn:
        return ""
    x_low, x_high = _ends([x for x, _ in drawn])
    y_low, y_high = _ends([y for _, y in drawn])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(_LEFT + across, 2), round(_HEIGHT - _BOTTOM - up, 2)

    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(name)}"'
        f' data-x="{x_low!r} {x_high!r}" data-y="{y_low!r} {y_high!r}">'
    ]
    for value in ticks(y_low, y_high):
        _, y = place(x_low, value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{escape(label(value))}</text>')
    for value in ticks(x_low, x_high):
        x, _ = place(value, y_low)
        parts.append(f'<text x="{x}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(label(value))}</text>')
    for number, line in enumerate(lines):
        colour = _COLOURS[number % len(_COLOURS)]
        for stretch in _finite_stretches(thinned(line.points)):
            points = " ".join("{},{}".format(*place(x, y)) for x, y in stretch)
            parts.append(f'<polyline data-name="{escape(line.name)}" stroke="{colour}" points="{points}"/>')
            parts += _marks(line.name, stretch, [place(x, y) for x, y in stretch], colour)
    parts.append("</svg>")
    if len(lines) > 1:
        keys = (
            f'<span style="color:{_COLOURS[n % 4]}">&#9644; {escape(one.name)}</span>' for n, one in enumerate(lines)
        )
        parts.append(f'<p class="key">{" ".join(keys)}</p>')
    return "".join(parts)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between `low` and `high`, about `_TICKS` of them."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(count * step, 12 - math.floor(math.log10(step))) for count in range(first, last + 1)]


def label(value: float) -> str:
    """A number short enough for an axis."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.6g}" if abs(value) >= 1e3 else f"{value:.4g}"


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about `_MOST_POINTS`: of each stretch its lowest and its highest, so that no spike is lost.

    A value that is not finite is kept, wherever it stands.
    """
    if len(points) <= _MOST_POINTS:
        return list(points)
    size = -(-len(points) * 2 // (_MOST_POINTS - 2))
    kept = {0, len(points) - 1}
    for begin in range(0, len(points), size):
        places = range(begin, min(begin + size, len(points)))
        finite = [place for place in places if math.isfinite(points[place][1])]
        kept |= set(places) - set(finite)
        if finite:
            kept |= {min(finite, key=lambda place: points[place][1]), max(finite, key=lambda place: points[place][1])}
    return [points[place] for place in sorted(kept)]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = float(min(values)), float(max(values))
    if low == high:  # one value, or always the same: a line needs some room
        room = abs(low) * 0.05 or 1.0
        return low - room, high + room
    return low, high


def _finite_stretches(points: Sequence[tuple[float, float]]) -> Iterator[list[tuple[float, float]]]:
    stretch: list[tuple[float, float]] = []
    for point in [*points, (math.nan, math.nan)]:
        if math.isfinite(point[1]):
            stretch.append(point)
        elif stretch:
            yield stretch
            stretch = []


def _marks(
    name: str, points: Sequence[tuple[float, float]], places: Sequence[tuple[float, float]], colour: str
) -> Iterator[str]:
    if len(points) > _MOST_MARKS:
        return
    for (step, value), (x, y) in zip(points, places, strict=True):
        title = f"{name}, step {step:,.0f}: {value:.6g}"
        yield f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"><title>{escape(title)}</title></circle>'
