"""What is said of points, worked by hand."""

import math

import pytest

from lit_rlhf.frontier.analysis import Scale, best_of_n_marks, laws, own_scales, parting, run_marks, scales
from lit_rlhf.frontier.points import Point, read_points
from lit_rlhf.frontier.report import as_text, report

SAMPLES = {"proxy": [[0.0, 2.0], [1.0, 3.0]], "gold": [[5.0, 1.0], [0.0, 6.0]]}


def test_zero_and_unit_are_those_of_all_samples():
    found = scales(SAMPLES)
    # proxy 0 2 1 3: mean 1.5, variance (2.25 + .25 + .25 + 2.25) / 4; gold 5 1 0 6: mean 3, variance (4 + 4 + 9 + 9) / 4
    assert found["proxy"] == Scale(1.5, pytest.approx(math.sqrt(1.25))) and found["gold"] == Scale(3.0, pytest.approx(math.sqrt(6.5)))


def test_a_zero_of_its_own():
    found = own_scales([Point(0, [0.0] * 2, [1.0, 3.0]), Point(1, [1.0] * 2, [9.0, 9.0])])
    assert found == {"proxy": Scale(2.0, 1.0)}


def test_best_of_n_is_chosen_by_the_proxy():
    one, two = best_of_n_marks(SAMPLES, {"proxy": Scale(1.5, 0.5), "gold": Scale(3.0, 1.0)})
    assert (one.iteration, one.kl, two.iteration, two.kl) == (1, 0.0, 2, pytest.approx(math.log(2) - 0.5))
    assert one.gains["proxy"].mean == one.gains["gold"].mean == 0.0
    assert two.gains["proxy"].mean == 2.0  # the better ones score 2 and 3: mean 2.5, less 1.5, over .5
    assert two.gains["gold"].mean == 0.5  # they are worth 1 and 6: mean 3.5, less 3


UNIT = {"proxy": Scale(0.0, 1.0), "gold": Scale(0.0, 1.0)}


def point(iteration: int, kl: float, proxy: float, gold: float) -> Point:
    """Ten prompts around these means, the same way in every point."""
    noise = [-0.1, 0.1] * 5
    return Point(iteration, [kl] * 10, [proxy + x for x in noise], [gold + x for x in noise], [7.0] * 10, [1.0] * 10)


RUN = [point(0, 0, 0, 0), point(2, 1, 1, 1), point(4, 4, 1.5, 1.2), point(6, 9, 2, 0.9), point(8, 16, 2.5, 0.1)]


def test_a_runs_marks():
    mark = run_marks("a", RUN, UNIT)[2]
    assert (mark.kl, mark.distance, mark.length) == (4.0, 2.0, 7.0)
    assert mark.gains["gold"].mean == pytest.approx(1.2) and mark.gains["gold"].low < 1.2 < mark.gains["gold"].high


def test_where_proxy_and_gold_part():
    found = parting("a", RUN, UNIT)
    assert (found.best, found.best_kl, found.parted, found.parted_kl) == (4, 4.0, 6, 9.0)
    assert found.lost.mean == pytest.approx(1.1) and found.proxy_gain.mean == pytest.approx(1.0)


def test_they_do_not_part_while_gold_is_within_the_noise():
    noisy = [RUN[0], RUN[2], Point(6, [9.0] * 10, [2.0] * 10, [1.2 + x for x in [5, -5.4] * 5], [7.0] * 10, [1.0] * 10)]
    assert parting("a", noisy, UNIT).parted is None


def test_nor_where_the_proxy_falls_too():
    assert parting("a", [RUN[0], RUN[2], point(6, 9, 1.0, 0.5)], UNIT).parted is None


def test_without_gold_there_is_nothing_to_part():
    assert parting("a", [Point(0, [0.0], [1.0]), Point(1, [1.0], [2.0])], UNIT) is None
    assert parting("a", RUN[:1], UNIT) is None


def test_laws_of_points_on_them():
    # gold d (2 - ln d) at d = 1, e: 2, e; the proxy d (1 + ln d): 1, 2e
    run = [point(0, 0, 0, 0), point(1, 1, 1, 2), point(2, math.e**2, 2 * math.e, math.e)]
    found = laws(run_marks("a", run, UNIT), "rl")
    assert (found["gold"].a, found["gold"].b) == pytest.approx((2, 1)) and (found["proxy"].a, found["proxy"].b) == pytest.approx((1, -1))
    assert laws(run_marks("a", run[:2], UNIT), "rl") == {}


def test_report_and_text(tmp_path):
    marks, chosen = {"kl_coef=0": run_marks("kl_coef=0", RUN, UNIT)}, best_of_n_marks(SAMPLES, scales(SAMPLES))
    fits = {"rl": laws(marks["kl_coef=0"], "rl"), "best_of_n": laws(chosen, "best_of_n")}
    partings = [parting("kl_coef=0", RUN, UNIT)]
    page = report("frontier", marks, chosen, fits, partings).write(tmp_path).read_text()
    assert page.count("<svg") == 3 and "Gold reward of both" in page and "kl_coef=0" in page
    said = as_text(partings, fits, marks)
    assert "kl_coef=0: gold picks iteration 4 (4.00 nats, +1.20); proxy and gold part at iteration 6 (9.00 nats)" in said
    assert "after 8 iterations 16.00 nats, proxy +2.50" in said


def test_points_are_read_by_iteration_and_a_cut_line_does_not_count(tmp_path):
    path = tmp_path / "points.jsonl"
    assert read_points(path) == []
    path.write_text('{"iteration": 2, "kl": [1.0]}\n{"iteration": 0, "kl": [0.0]}\n{"iteration": 2, "kl": [3.0]}\n{"iteration": 4, "kl"')
    assert [(p.iteration, p.kl) for p in read_points(path)] == [(0, [0.0]), (2, [3.0])]
