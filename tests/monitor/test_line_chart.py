"""Charts: the numbers can be read back from the drawing, spikes are kept, and what is not finite breaks the line."""

from __future__ import annotations

import math
import random
from xml.etree import ElementTree

import pytest

from train.monitor.line_chart import Series, build_chart, label, thinned, ticks


def read_back(svg: str) -> dict[str, list[list[tuple[float, float]]]]:
    """The lines of a chart in the data's own numbers, from the drawing's coordinates."""
    root = ElementTree.fromstring(svg.partition("</svg>")[0] + "</svg>")
    x_low, x_high = map(float, root.attrib["data-x"].split())
    y_low, y_high = map(float, root.attrib["data-y"].split())
    lines: dict[str, list[list[tuple[float, float]]]] = {}
    for line in root.iter("polyline"):
        pairs = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
        stretch = [
            (x_low + (x - 70) / 638 * (x_high - x_low), y_low + (212 - y) / 200 * (y_high - y_low)) for x, y in pairs
        ]
        lines.setdefault(line.attrib["data-name"], []).append(stretch)
    return lines


def test_points_are_where_their_numbers_say() -> None:
    points = [(1, 9.5), (2, 8.25), (5, 4.0), (10, 4.5)]
    ((line,),) = read_back(build_chart("loss", [Series("training", points)])).values()
    for (x, y), (step, value) in zip(line, points, strict=True):
        assert x == pytest.approx(step, abs=0.02) and y == pytest.approx(value, abs=0.06)


def test_two_lines_share_their_axes_and_have_a_key() -> None:
    svg = build_chart("loss", [Series("training", [(0, 0), (10, 10)]), Series("held out", [(5, 20)]), Series("no", [])])
    found = read_back(svg)
    assert list(found) == ["training", "held out"]
    assert found["held out"][0][0] == (pytest.approx(5, abs=0.02), pytest.approx(20, abs=0.1))
    assert "held out</span>" in svg and "no</span>" not in svg


def test_what_is_not_finite_breaks_the_line() -> None:
    points = [(1, 1.0), (2, math.nan), (3, 2.0), (4, math.inf), (5, 3.0), (6, 4.0)]
    (stretches,) = read_back(build_chart("loss", [Series("training", points)])).values()
    assert [len(stretch) for stretch in stretches] == [1, 1, 2]
    assert build_chart("loss", [Series("training", [(1, math.nan)])]) == ""
    assert build_chart("loss", []) == ""


def test_one_point_and_a_flat_line_are_drawn() -> None:
    for points in ([(7, 3.0)], [(1, 0.0), (2, 0.0)], [(1, -2.0), (9, -2.0)]):
        ((line,),) = read_back(build_chart("x", [Series("s", points)])).values()
        assert [round(value, 1) for _, value in line] == [value for _, value in points]


def test_names_are_escaped() -> None:
    name = "<script>\"'&]]></svg>"
    svg = build_chart(name, [Series(name, [(1, 1), (2, 2)]), Series("b", [(1, 1)])])
    assert "<script" not in svg and svg.count("</svg>") == 1
    assert list(read_back(svg)) == [name, "b"]


def test_no_spike_is_lost() -> None:
    source = random.Random(0)
    points = [(float(step), source.random()) for step in range(100_000)]
    points[31_415] = (31_415.0, 99.0)
    points[70_000] = (70_000.0, -99.0)
    points[50_000] = (50_000.0, math.nan)
    kept = thinned(points)
    assert len(kept) <= 810
    assert {(31_415.0, 99.0), (70_000.0, -99.0), points[0], points[-1]} <= set(kept)
    assert any(math.isnan(value) for _, value in kept)
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    assert thinned(points[:800]) == points[:800]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1e-9, 3e-4), (-5, 7), (1234, 1235), (0, 1e12), (9.99, 10.02)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 11
    span = high - low
    assert all(low - 1e-9 * span <= value <= high + 1e-9 * span for value in found)
    assert len({label(value) for value in found}) >= 2


def test_labels() -> None:
    assert [label(value) for value in (0, 0.5, 1500, 2e-5, 3e9, -0.25)] == [
        "0",
        "0.5",
        "1,500",
        "2e-05",
        "3e+09",
        "-0.25",
    ]
