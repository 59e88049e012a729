"""Charts: their axes, what they draw, and that they say the same in words and in a table."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.reports.bars import Dot, Track, columns_chart, dots_chart, histogram, rows_chart, tracks_chart
from embrag_ds.reports.charts import Axis, Series, lines_chart, spread, tick
from embrag_ds.reports.page import Page
from embrag_ds.reports.text import NOTHING, number
from tests.reports.pages import Parsed, parsed

FINITE = st.floats(-1e12, 1e12)


def shown(chart: str) -> Parsed:
    page = Page("title", "subtitle")
    page.add("charts", chart)
    return parsed(page.html({}))


def path_points(chart: str) -> list[list[tuple[float, float]]]:
    """Points of every unbroken piece of the lines of a chart, in pixels."""
    pieces = []
    for path in re.findall(r'<path class="series[^"]*" d="([^"]*)"', chart):
        for piece in path.split("M")[1:]:
            pieces.append([tuple(map(float, point.split())) for point in piece.split("L")])
    return pieces


@given(st.lists(FINITE, max_size=5), st.booleans())
def test_limits_hold_all_values(values: list[float], from_zero: bool) -> None:
    low, high = spread([*values, math.nan], from_zero)
    assert low < high and math.isfinite(low) and math.isfinite(high)
    assert all(low <= value <= high for value in values) and (not from_zero or low <= 0)


@given(FINITE, st.floats(1e-6, 1e12), st.integers(2, 9))
def test_ticks_are_round_few_and_on_the_axis(low: float, length: float, most: int) -> None:
    high = low + length
    if high - low < 1e-6 * max(abs(low), abs(high)):
        return
    ticks = Axis(low, high, 0, 100).ticks(most)
    assert len(ticks) <= most + 1
    room = 1e-6 * length
    assert all(low - room <= tick <= high + room for tick in ticks) and ticks == sorted(ticks)
    if len(ticks) > 1:
        step = ticks[1] - ticks[0]
        digits = f"{step:.1e}"[:3]
        assert digits in ("1.0", "2.0", "2.5", "5.0"), step
        # None is left out at the ends.
        assert ticks[0] - step < low + room and ticks[-1] + step > high - room


def test_a_line_is_where_its_points_are_and_broken_where_there_is_none() -> None:
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, None), (3.0, 4.0), (4.0, None), (5.0, 3.0), (6.0, 1.0)]
    chart = lines_chart("T", ("x, s", "y, GiB"), [Series("a", points)])
    pieces = path_points(chart)
    assert [len(piece) for piece in pieces] == [2, 1, 2]
    flat = [point for piece in pieces for point in piece]
    known = [(x, y) for x, y in points if y is not None]
    for axis, pixels, values in (
        (0, [p[0] for p in flat], [k[0] for k in known]),
        (1, [p[1] for p in flat], [k[1] for k in known]),
    ):
        slope = (pixels[1] - pixels[0]) / (values[1] - values[0])
        assert (slope > 0) == (axis == 0)
        for pixel, value in zip(pixels, values, strict=True):
            assert pixel == pytest.approx(pixels[0] + slope * (value - values[0]), abs=0.2 * (1 + abs(value)))
    found = shown(chart)
    assert found.figures == ["T"] and "x, s" in found.words and "y, GiB" in found.words
    assert found.tables[0].header == ["x, s", "a"]
    assert found.tables[0].rows == [[number(x), number(y)] for x, y in points]
    assert found.described[0].startswith("y, GiB over x, s: a from 1 to 1, lowest 1, highest 4")


def test_a_long_line_is_thinned_without_losing_its_peaks() -> None:
    points = [(float(x), 100.0 if x == 3_333 else -50.0 if x == 7_777 else math.sin(x)) for x in range(10_000)]
    chart = lines_chart("T", ("x", "y"), [Series("a", points)])
    (piece,) = path_points(chart)
    assert len(piece) <= 600 and len(chart) < 60_000
    whole = lines_chart("T", ("x", "y"), [Series("a", [points[0], points[3_333], points[7_777], points[-1]])])
    ys = [y for _, y in path_points(whole)[0]]
    assert min(y for _, y in piece) == min(ys) and max(y for _, y in piece) == max(ys)
    found = shown(chart)
    assert len(found.tables[0].rows) == 200 and "200 of 10,000 rows" in found.tables[0].caption


def test_series_share_a_table_and_marks_are_named() -> None:
    series = [Series("a", [(1.0, 1.0), (2.0, 2.0)]), Series("b<", [(2.0, 5.0)], "c1"), Series("none", [(1.0, None)])]
    found = shown(lines_chart("T", ("x", "y"), series, marks=[(1.5, "resumed"), (9.0, "resumed")], note="N."))
    assert found.tables[0].header == ["x", "a", "b<"]
    assert found.tables[0].rows == [["1", "1", NOTHING], ["2", "2", "5"]]
    assert found.words.count("resumed") == 1 and "N. Dashed vertical lines: resumed." in found.text


def test_columns_and_bars_are_as_high_as_their_values() -> None:
    chart = columns_chart("T", ("bin", "share"), ["p", "q"], {"a": [0.5, 0.9], "b": [None, 0.3]})
    heights = [float(each) for each in re.findall(r'<rect [^>]*height="([\d.]+)"', chart)]
    assert [each / heights[0] for each in heights] == pytest.approx([1, 1.8, 0.6], abs=0.01)
    assert shown(chart).tables[0].rows == [["p", "0.5", NOTHING], ["q", "0.9", "0.3"]]
    chart = rows_chart("T", "ms", [("forward", 10.0), ("backward", 30.0)])
    widths = [float(each) for each in re.findall(r'<rect [^>]*width="([\d.]+)"', chart)]
    assert widths[1] / widths[0] == pytest.approx(3, rel=0.02)
    chart = histogram("T", ("DR2", "sites"), [0, 0.5, 1], [4, 1])
    heights = [float(each) for each in re.findall(r'<rect [^>]*height="([\d.]+)"', chart)]
    assert heights[0] / heights[1] == pytest.approx(4, rel=0.02)
    assert shown(chart).tables[0].rows == [["0 to 0.5", "4"], ["0.5 to 1", "1"]]


def test_dots_that_stand_out_are_named() -> None:
    chart = dots_chart("T", ("x", "y"), [Dot(1, 2, "quiet"), Dot(3, 9, "<b>", True)], "")
    found = shown(chart)
    assert "outliers: <b>" in found.described[0] and found.words.count("<b>") == 1 and "quiet" not in found.words


def test_a_track_is_as_long_and_as_high_as_it_should_be() -> None:
    tracks = [
        Track("1", 1, 4_000_001, 1_000_000, [1, 2, 0, 4]),
        Track("2", 1, 1_000_001, 500_000, [2, 1], [(5, 400_005)]),
    ]
    chart = tracks_chart("T", "typed sites", tracks, "")
    paths = re.findall(r'<path class="f-c0" d="M([\d.]+) ([\d.]+)(.*?)L([\d.]+) [\d.]+Z"', chart)
    lengths = [float(end) - float(start) for start, _, _, end in paths]
    assert lengths[0] / lengths[1] == pytest.approx(4, rel=0.01)
    heights = [[float(base) - float(y) for y in re.findall(r"L[\d.]+ ([\d.]+)H", steps)] for _, base, steps, _ in paths]
    # 4 sites a million base pairs are the most, in both.
    assert [each / max(heights[0]) for each in heights[0]] == pytest.approx([0.25, 0.5, 0, 1], abs=0.01)
    assert [each / max(heights[0]) for each in heights[1]] == pytest.approx([1, 0.5], abs=0.01)
    (gap,) = re.findall(r'<rect class="f-bad"[^>]*width="([\d.]+)"', chart)
    assert float(gap) / lengths[1] == pytest.approx(0.4, abs=0.02)
    assert "the highest is 4 per Mb" in shown(chart).text


def test_nothing_to_draw_is_said() -> None:
    empty = [
        lines_chart("A", ("x", "y"), []),
        lines_chart("B", ("x", "y"), [Series("a", [(1.0, None)])]),
        columns_chart("C", ("x", "y"), ["p"], {"a": [None]}),
        histogram("D", ("x", "y"), [0, 1], [0]),
        rows_chart("E", "ms", []),
        dots_chart("F", ("x", "y"), [], ""),
    ]
    for chart in empty:
        assert "There is no" in chart and "<svg" not in chart and shown(chart).figures
    one = lines_chart("G", ("x", "y"), [Series("a", [(5.0, 0.0)])])
    assert path_points(one) and "nan" not in one


@given(st.floats(1e-9, 1e12), st.floats(1e-6, 10))
def test_ticks_fit_beside_the_axis(low: float, width: float) -> None:
    """Beside the axis there is room for eight characters, and the axis's name comes next."""
    for value in Axis(low, low * (1 + width), 0, 100).ticks():
        assert len(tick(value)) <= 8, value


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.000125, "1.25e-4"), (7.5e-5, "7.5e-5"), (0.0005, "5e-4"), (0.001, "0.001"), (-2.5e-4, "-2.5e-4")],
)
def test_small_ticks_have_a_power_of_ten(value: float, shown: str) -> None:
    assert tick(value) == shown
