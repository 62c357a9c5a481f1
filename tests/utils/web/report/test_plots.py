"""Line plots: where points land, which ticks there are, when axes are logarithmic."""

from __future__ import annotations

import json
import math

import pytest

from tests.pages import Page
from utils.web.report.plots import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MOST_POINTS,
    RIGHT,
    WIDTH,
    Axis,
    Line,
    axes,
    log_ticks,
    plot,
    round_ticks,
    smoothed,
    thinned,
)


def drawn(*lines: Line) -> Page:
    return Page(plot(lines, x_label="step", y_label="loss"))


def test_ticks_are_round_and_within() -> None:
    assert round_ticks(0.0, 10.0) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert round_ticks(0.13, 0.29) == pytest.approx([0.15, 0.2, 0.25])
    assert log_ticks(1.0, 100.0) == pytest.approx([1, 2, 5, 10, 20, 50, 100])
    assert log_ticks(1e-12, 1e-2) == pytest.approx([1e-12, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6,
                                                    1e-5, 1e-4, 1e-3, 1e-2])  # fmt: skip


def test_values_land_between_the_axes() -> None:
    axis = Axis(0.0, 10.0, 100.0, 200.0)
    assert [axis.at(v) for v in (0.0, 5.0, 10.0)] == [100.0, 150.0, 200.0]
    log = Axis(1.0, 100.0, 0.0, 10.0, log=True)
    assert log.at(10.0) == pytest.approx(5.0)


def test_positive_values_that_span_decades_have_a_logarithmic_axis_and_others_none() -> None:
    assert axes([(0, 0.01), (1, 10.0)], log_x=False)[1].log
    assert not axes([(0, 0.5), (1, 10.0)], log_x=False)[1].log
    assert not axes([(0, -0.01), (1, 10.0)], log_x=False)[1].log


def test_a_flat_line_and_a_single_point_are_drawn() -> None:
    assert drawn(Line("a", [(1, 2.0), (2, 2.0)])).count("polyline") == 1
    assert drawn(Line("a", [(1, 0.0)])).count("circle") == 1


def test_nothing_is_drawn_of_nothing_and_of_what_is_not_finite() -> None:
    assert plot([Line("a", [])], x_label="x", y_label="y") == ""
    assert plot([Line("a", [(1, math.nan)])], x_label="x", y_label="y") == ""
    page = drawn(Line("a", [(1, 1.0), (2, math.inf), (3, 2.0)]))
    (line,) = [attrs for tag, attrs in page.tags if tag == "polyline"]
    assert len((line["points"] or "").split()) == 2


def test_every_point_lies_within_the_frame() -> None:
    page = drawn(Line("a", [(i, (-1.0) ** i * i) for i in range(50)]))
    (line,) = [attrs for tag, attrs in page.tags if tag == "polyline"]
    for pair in (line["points"] or "").split():
        x, y = map(float, pair.split(","))
        assert LEFT <= x <= WIDTH - RIGHT
        assert 0 <= y <= HEIGHT - BOTTOM


def test_axes_are_labelled_and_several_lines_named() -> None:
    assert "step" in drawn(Line("a", [(1, 1.0), (2, 3.0)])).text
    text = drawn(Line("critic", [(1, 1.0)]), Line("generator", [(1, 2.0)])).text
    assert "critic" in text
    assert "generator" in text
    assert "loss" in text


def test_hovering_finds_the_values_as_they_were() -> None:
    page = drawn(Line("a <b>", [(10, 0.123456), (20, 3.0)]))
    (data,) = [attrs["data-lines"] for _, attrs in page.tags if "data-lines" in attrs]
    (line,) = json.loads(data or "")
    assert line["name"] == "a <b>"
    assert [point[2:] for point in line["points"]] == [["10", "0.1235"], ["20", "3"]]


def test_a_long_line_is_thinned_without_losing_its_mean_or_its_end() -> None:
    points = [(float(i), float(i % 7)) for i in range(10_000)]
    found = thinned(points)
    assert len(found) <= MOST_POINTS
    assert found[-1][0] == 9999.0
    assert sum(y for _, y in found) / len(found) == pytest.approx(3.0, abs=0.02)


def test_a_running_average_keeps_a_constant_and_calms_noise() -> None:
    assert [y for _, y in smoothed([(i, 2.0) for i in range(100)])] == pytest.approx([2.0] * 100)
    noisy = [(float(i), (-1.0) ** i) for i in range(200)]
    assert max(abs(y) for _, y in smoothed(noisy)[50:]) < 0.25


def test_a_smoothed_line_is_drawn_over_its_raw_one() -> None:
    points = [(float(i), float(i % 5)) for i in range(40)]
    page = drawn(Line("a", points, smooth=True))
    kinds = [attrs["class"] for tag, attrs in page.tags if tag == "polyline"]
    assert kinds == ["raw s0", "line s0"]
