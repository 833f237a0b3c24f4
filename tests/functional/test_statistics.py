"""Values worked by hand, or from the papers and textbooks named beside them."""

import math

import pytest
import torch

from lit_rlhf.functional import bootstrap_mean, calibration_error, correlation, grouped_mean, grouped_share, reliability


def test_the_error_of_a_mean():
    found = grouped_mean(torch.tensor([1.0, 2, 3, 4]))  # variance 5/3, over 4
    assert found.mean == 2.5 and found.error == pytest.approx(math.sqrt(5 / 12))
    assert (found.low, found.high) == pytest.approx((2.5 - 1.959964 * 0.6454972, 2.5 + 1.959964 * 0.6454972))


def test_entries_of_one_group_go_together():
    # sums of deviations -2 and 2: 8 x 2/1 = 16, its root 4, over 4 entries
    assert grouped_mean(torch.tensor([1.0, 2, 3, 4]), torch.tensor([7, 7, 3, 3])).error == pytest.approx(1.0)
    # the same number twice tells no more than once: [1, 2, 3, 4] has sqrt(5/12), doubled entries the same and not sqrt(1/2) of it
    assert grouped_mean(torch.tensor([1.0, 1, 2, 2, 3, 3, 4, 4]), torch.arange(4).repeat_interleave(2)).error == pytest.approx(
        math.sqrt(5 / 12)
    )


def test_one_entry_has_no_error_and_none_is_refused():
    assert grouped_mean(torch.tensor([3.0])).error == math.inf
    for function in (grouped_mean, bootstrap_mean):
        with pytest.raises(ValueError, match="no entries"):
            function(torch.tensor([]))


def test_wilson():
    # 8 of 10: 0.4901625, 0.9433178 (Wilson's score interval, e.g. statsmodels' proportion_confint(8, 10, method="wilson"))
    found = grouped_share(torch.tensor([True] * 8 + [False] * 2))
    assert (found.mean, found.low, found.high) == pytest.approx((0.8, 0.4901625, 0.9433178), abs=1e-6)
    # none of 20: 0 and z^2 / (n + z^2) = 3.8414589 / 23.8414589
    found = grouped_share(torch.zeros(20, dtype=torch.bool))
    assert (found.low, found.high) == pytest.approx((0.0, 0.1611252), abs=1e-6)


def test_wilson_of_pairs_that_go_together():
    hits = torch.tensor([True] * 8 + [False] * 2)
    twice = grouped_share(hits.repeat_interleave(2), torch.arange(10).repeat_interleave(2))
    assert (twice.low, twice.high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


def test_bootstrap():
    x = torch.tensor([0.0, 1.0] * 200)  # error sqrt(.25 / 400) = .025
    found = bootstrap_mean(x)
    assert found.mean == 0.5 and found.error == pytest.approx(0.025, rel=0.1)
    assert (found.low, found.high) == pytest.approx((0.451, 0.549), abs=0.006)
    assert found == bootstrap_mean(x) != bootstrap_mean(x, seed=1)
    grouped = bootstrap_mean(x, torch.arange(400) % 2)  # two groups, of all 0 and all 1: the mean of a sample is 0, .5 or 1
    assert (grouped.low, grouped.high) == (0.0, 1.0)


def test_reliability_and_calibration():
    confidence = torch.tensor([0.55, 0.55, 0.95, 0.95])
    right = torch.tensor([True, False, True, True])
    bins = reliability(confidence, right, bins=5)  # .5-.6: confidence .55, accuracy .5; .9-1: .95, 1
    assert [(b.size, round(b.confidence, 6), b.accuracy) for b in bins] == [(2, 0.55, 0.5), (2, 0.95, 1.0)]
    assert calibration_error(bins) == pytest.approx(0.5 * 0.05 + 0.5 * 0.05)
    assert reliability(torch.tensor([1.0]), torch.tensor([False]))[0].accuracy == 0.0  # 1 lies in the last bin


def test_correlation():
    # x - mean = -1, 0, 1; y - mean = -1, -1, 2: 3 / sqrt(2 x 6)
    assert correlation(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 1, 4])) == pytest.approx(3 / math.sqrt(12))
    assert correlation(torch.tensor([1.0, 2, 3]), torch.tensor([5.0, 5, 5])) == 0.0
