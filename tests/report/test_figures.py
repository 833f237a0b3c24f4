"""Figures: what they hold and where their marks lie, worked by hand."""

import math
import re
from xml.etree import ElementTree

import pytest
from report_pages import BAND, EMPTY, EVIL, FIGURES, RELIABILITY

from lit_rlhf.report import Bars, Plot, Series, histogram, lines, smoothed
from lit_rlhf.report.draw import draw, log_ticks, number, ticks
from lit_rlhf.report.figures import has_points
from lit_rlhf.report.svg import standalone, svg


def test_ticks_by_hand():
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.13, 0.52, 4) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]  # step 0.1 is the first of 0.1, 0.2, 0.5 with at most 4 steps in 0.39
    assert ticks(-1.5, 3, 4) == [-2, 0, 2, 4]
    assert ticks(5, 5, 4)[0] <= 5 < ticks(5, 5, 4)[-1]  # a flat line still gets an axis
    assert ticks(0, 3e-12, 3) == [0, 1e-12, 2e-12, 3e-12]


def test_log_ticks_by_hand():
    assert log_ticks([1, 2, 4, 64]) == [1, 2, 4, 64]  # few: the values themselves
    assert log_ticks(range(1, 60)) == [1, 2, 5, 10, 20, 50]
    assert log_ticks([10.0**i for i in range(9)] + [3.0]) == [10.0**i for i in range(9)]


def test_numbers_are_short():
    assert [number(v) for v in (0.25, -3, 12000, 2.5e6, 3e9)] == ["0.25", "-3", "12k", "2.5M", "3G"]


def test_smoothed_by_hand():
    assert smoothed([(0, 1.0), (1, 3.0), (2, 8.0)], 2) == [(0, 1.0), (1, 2.0), (2, 5.5)]


def test_a_histogram_by_hand():
    found = histogram("h", "x", {"a": [0.0, 0.5, 1.0, 2.0], "b": [2.0, math.inf]}, bins=2).series
    assert [(s.x, s.y) for s in found] == [([0, 1, 2], [0.5, 0.5]), ([0, 1, 2], [0, 1])]  # 1 opens the second column, 2 closes it
    same = histogram("h", "x", {"a": [3.0, 3.0]}, bins=2).series[0]
    assert same.x[0] == 3 and sum(same.y) == 1


def test_points_lie_where_they_should():
    # left: 24 and the widest tick label, "0.2" at 3 x 6 = 42; right 380 - 14 = 366; top 24 + 4 = 28, bottom 28 + 156 = 184
    drawn = svg(lines("t", "x", "y", {"a": [(0, 0.0), (5, 0.5), (10, 1.0)]}))
    assert 'class="line0" points="42.0,184.0 204.0,106.0 366.0,28.0"' in drawn


def test_a_logarithmic_axis_spaces_by_factors():
    drawing = draw(Plot("t", "n", "y", [Series("a", [1, 2, 4], [0.0, 1.0, 2.0])], x_log=True))
    (path,) = (mark for mark in drawing.marks if mark.style == "line0")
    a, b, c = (x for x, _ in path.at)
    assert b - a == pytest.approx(c - b)


def test_a_fit_has_the_colour_of_its_points_and_whiskers_at_one_x_stand_beside_each_other():
    whiskers = {"low": [0.0, 0.5], "high": [1.0, 1.5], "kind": "points"}
    fit = {"kind": "dashed", "like": "proxy"}
    series = [
        Series("proxy", [0, 1], [0.5, 1.0], **whiskers),
        Series("fit", [0, 1], [0.5, 1.0], **fit),
        Series("gold", [0, 1], [0.5, 1.0], **whiskers),
    ]
    marks = [mark for mark in draw(Plot("t", "x", "y", series)).marks if mark.kind == "path" and len(mark.at) == 2]
    across = {style: [mark.at[0][0] for mark in marks if mark.style == style and mark.at[0][1] > 60] for style in ("whisker0", "whisker1")}
    # left 24 and "0.5" at 3 x 6 = 42, right 366, of which 0.025 are free at either end: 324 / 1.05 x 0.025 = 7.71; 2 pixels to either side
    assert across == {"whisker0": pytest.approx([47.71, 356.29], abs=0.01), "whisker1": pytest.approx([51.71, 360.29], abs=0.01)}
    assert {mark.style for mark in marks if mark.style.startswith("dashed")} == {"dashed0"}


def test_band_and_whiskers():
    band = next(mark for mark in draw(BAND).marks if mark.style == "band0")
    assert len(band.at) == 6 and band.at[0][0] == band.at[-1][0]  # along low, back along high
    whiskers = [mark for mark in draw(RELIABILITY).marks if mark.style == "whisker0"]
    assert [mark.at[0][0] == mark.at[1][0] and mark.at[0][1] > mark.at[1][1] for mark in whiskers] == [True, True]
    diagonal = next(mark for mark in draw(RELIABILITY).marks if mark.style == "level")
    right, top = 366, 28  # the axes' upper right corner
    assert diagonal.at[1] == pytest.approx((right, top))  # x 0.5..1 and y 0.4..1: y = x ends in the corner


def test_bars_by_hand():
    # names of 1 letter: left 8 + 6 = 14; right 366; 0..1 on it
    drawing = draw(Bars("t", "share", ["a"], [0.25], [0.0], [1.0]))
    bar = next(mark for mark in drawing.marks if mark.style == "column0")
    whisker = next(mark for mark in drawing.marks if mark.style == "whisker0")
    assert bar.at[0][0] == pytest.approx(14) and bar.at[1][0] == pytest.approx(14 + 0.25 * 352)
    assert [x for x, _ in whisker.at] == pytest.approx([14, 366])


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.title)
def test_every_mark_lies_on_the_canvas(figure):
    drawing = draw(figure)
    for mark in drawing.marks:
        for x, y in mark.at:
            assert 0 <= x <= drawing.width and 0 <= y <= drawing.height, mark
    assert len({m.text for m in drawing.marks if m.style == "label"}) == (1 if isinstance(figure, Bars) else 2)


def test_svg_is_labelled_and_escaped():
    drawn = svg(BAND)
    for text in ("Loss &lt;1&gt;", "step", "nats &amp; bits", "&lt;a&gt;", "goal"):
        assert f">{text}<" in drawn
    assert 'aria-label="Loss &lt;1&gt;"' in drawn and "nan" not in drawn
    assert "<script" not in svg(FIGURES[4]) + svg(RELIABILITY)
    assert re.findall(r"<title>([^<]*)</title>", svg(RELIABILITY))[0] == "12 pairs"


def test_nothing_to_draw_is_nothing():
    assert svg(EMPTY) == "" and not has_points(EMPTY)
    assert svg(Bars("t", "x", ["a"], [math.nan])) == ""


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Series("a", [1, 2], [1]), "2 x for 1 y"),
        (lambda: Series("a", [1], [1], kind="columns"), "give 2"),
        (lambda: Series("a", [1], [1], low=[1]), "both low and high"),
        (lambda: Series("a", [1], [1], low=[1, 2], high=[1]), "2 low"),
        (lambda: Bars("t", "x", ["a"], [1, 2]), "2 values for 1 names"),
        (lambda: Bars("t", "x", ["a"], [1], low=[0]), "both low and high"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_evil_names_do_not_get_out():
    assert "<script" not in svg(lines(EVIL, EVIL, EVIL, {EVIL: [(0, 1.0), (1, 2.0)], "b": [(0, 1.0)]}, levels={EVIL: 1.0}))


def test_a_figure_by_itself_is_a_whole_svg_file():
    text = standalone(BAND)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.attrib["width"] == "380"
    assert "prefers-color-scheme: dark" in text and text.count("<style>") == 1
    used = set(re.findall(r'class="([^"]+)"', text))
    assert all(f".{name.split()[0]}" in text for name in used)


def test_labels_stand_beside_their_points_and_within_the_canvas():
    """Right of the point by 6; at the right edge, where 10 letters of 6 would pass 380, to the left of it.

    A point that is not finite takes its label along.
    """
    series = Series("a", [0, math.nan, 1, 2], [0.0, 5.0, 1.0, 2.0], kind="points", labels=["near", "lost", "", "ten signs."])
    marks = draw(Plot("t", "x", "y", [series])).marks
    dots = [mark.at[0] for mark in marks if mark.kind == "dot"]
    found = {mark.text: (mark.at[0], mark.anchor) for mark in marks if mark.style == "tick halo"}
    assert set(found) == {"near", "ten signs."}
    assert found["near"] == ((dots[0][0] + 6, dots[0][1] + 3.5), "start")
    assert found["ten signs."] == ((dots[2][0] - 6, dots[2][1] + 3.5), "end")
    with pytest.raises(ValueError, match="1 labels for 2 y"):
        Series("a", [0, 1], [0.0, 1.0], kind="points", labels=["one"])


def test_a_label_makes_way_for_an_earlier_one():
    """Two points 2 pixels apart at one height: the second's words stand at its left; one far above keeps its right."""
    series = Series("a", [0, 1, 1.01, 1.01, 2], [1.0, 1.0, 1.0, 3.0, 3.0], kind="points", labels=["", "first", "second", "third", ""])
    marks = draw(Plot("t", "x", "y", [series])).marks
    assert {mark.text: mark.anchor for mark in marks if mark.style == "tick halo"} == {"first": "start", "second": "end", "third": "start"}
