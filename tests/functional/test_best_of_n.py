"""Best-of-n by counting all choices, and the laws from points that lie on them."""

import math
from itertools import combinations

import pytest
import torch

from lit_rlhf.functional import best_of_n_kl, best_of_n_mean, fit_law


def test_kl():
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)
    # Stiennon et al. 2020, table 10, which prints them rounded: n = 8, 64, 128, 256, 512
    assert [round(best_of_n_kl(n), 1) for n in (8, 64, 128, 256, 512)] == [1.2, 3.2, 3.9, 4.5, 5.2]


def test_three_samples():
    scores, worth = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[5.0, 10.0, 0.0]])
    assert best_of_n_mean(scores, worth, 1).tolist() == [5.0]
    assert best_of_n_mean(scores, worth, 2).tolist() == pytest.approx([10 / 3])  # of the three pairs: 5, 5, 0
    assert best_of_n_mean(scores, worth, 3).tolist() == [5.0]


def test_ties_share_what_they_are_worth():
    # scores 1, 1, 2 with worth 0, 4, 6: pairs (0 or 4) -> 2, 6, 6
    assert best_of_n_mean(torch.tensor([[1.0, 1.0, 2.0]]), torch.tensor([[0.0, 4.0, 6.0]]), 2).tolist() == pytest.approx([14 / 3])


def test_is_the_mean_over_all_choices():
    torch.manual_seed(0)
    scores, worth = torch.randn(3, 7), torch.randn(3, 7)
    for n in range(1, 8):
        for row in range(3):
            best = [max(choice, key=lambda i: scores[row, i].item()) for choice in combinations(range(7), n)]  # noqa: B023
            assert float(best_of_n_mean(scores, worth, n)[row]) == pytest.approx(float(worth[row, best].mean()), abs=1e-6)


@pytest.mark.parametrize("n", [0, 4])
def test_refuses_more_than_there_are(n):
    with pytest.raises(ValueError, match=f"best of {n}.*from 3 samples"):
        best_of_n_mean(torch.zeros(1, 3), torch.zeros(1, 3), n)


def test_laws():
    law = fit_law([0.0, 1.0, 2.0, 3.0], [0.0, 1.5, 2.0, 1.5], "best_of_n")  # d (2 - d/2)
    assert (law.a, law.b, law.error) == pytest.approx((2.0, 0.5, 0.0), abs=1e-9)
    assert (law.peak_distance, law.peak) == pytest.approx((2.0, 2.0))
    law = fit_law([1.0, math.e, math.e**2], [2.0, math.e, 0.0], "rl")  # d (2 - ln d)
    assert (law.a, law.b) == pytest.approx((2.0, 1.0))
    assert (law.peak_distance, law.peak) == pytest.approx((math.e, math.e))
    assert law(math.e**2) == pytest.approx(0.0, abs=1e-9) and law(0.0) == 0.0


def test_a_law_that_only_rises_has_no_peak():
    law = fit_law([1.0, 2.0], [1.0, 3.0], "best_of_n")
    assert law.b < 0 and law.peak_distance == law.peak == math.inf


def test_least_squares_between_points():
    # d = 1 twice with gains 1 and 3, d = 2 with 4: the line a - b d through the means 2 and 2 has b = 0; errors 1, 1, 0
    law = fit_law([1.0, 1.0, 2.0], [1.0, 3.0, 4.0], "best_of_n")
    assert (law.a, law.b, law.error) == pytest.approx((2.0, 0.0, math.sqrt(2 / 3)), abs=1e-9)


def test_one_distance_is_not_enough():
    with pytest.raises(ValueError, match="two or more distances"):
        fit_law([0.0, 1.0, 1.0], [0.0, 1.0, 2.0], "rl")
