"""Ensembles by hand."""

import math

import pytest
import torch

from lit_rlhf.functional import lower_bound, preference_spread, spread, weighted_sum

SCORES = torch.tensor([[1.0, 3.0, 0.0], [3.0, 3.0, 0.0], [5.0, 3.0, 6.0]])


def test_spread_and_lower_bound():
    """Means 3, 3, 2; deviations -2, 0, 2 and -2, -2, 4: variances 8/3, 0 and 24/3."""
    wanted = [math.sqrt(8 / 3), 0.0, math.sqrt(8)]
    assert spread(SCORES).tolist() == pytest.approx(wanted)
    assert lower_bound(SCORES, 0.5).tolist() == pytest.approx([3 - wanted[0] / 2, 3.0, 2 - math.sqrt(2)])
    assert lower_bound(SCORES, 0.0).tolist() == pytest.approx([3.0, 3.0, 2.0])


def test_disagreement_counts_where_the_order_is_in_doubt():
    """Margins log 3 and -log 3 are probabilities 3/4 and 1/4, spread 1/4; margins 5 and 8 agree; equal margins have none."""
    first = torch.tensor([[math.log(3.0), 5.0, 1.0], [0.0, 8.0, 1.0]])
    second = torch.tensor([[0.0, 0.0, 0.0], [math.log(3.0), 0.0, 0.0]])
    found = preference_spread(first, second).tolist()
    assert found[0] == pytest.approx(0.25) and 0 < found[1] < 0.01 and found[2] == 0.0


# Three models' scores of four responses. The second is the first + 10 (it agrees in every difference); the third sees response 2 otherwise.
FOUR = torch.tensor([[0.0, 1.0, 4.0, 4.0], [10.0, 11.0, 14.0, 14.0], [0.0, 1.0, 1.0, 10.0]])


def test_disagreement_of_three_models_by_hand():
    """Margins (-1, -1, -1), (-4, -4, -1), (-4, -4, -10), (0, 0, -9), (3, 3, 0). Of a, a, b the spread is |a - b| sqrt(2)/3, with a and b
    of 1/(1 + e^4) = .01799 and 1/(1 + e) = .26894; .01799 and .00005; .5 and .00012; .95257 and .5.

    The third pair's margins are the widest apart, but all three models are sure of it: it comes after those whose order is in doubt.
    """
    found = preference_spread(FOUR[:, [0, 0, 0, 2, 2]], FOUR[:, [1, 2, 3, 3, 1]])
    assert found.tolist() == pytest.approx([0, 0.11830, 0.00846, 0.23564, 0.21334], abs=1e-5)
    assert preference_spread(FOUR[:, [1]], FOUR[:, [0]]).tolist() == pytest.approx([0], abs=1e-7)  # what a model adds to all counts nothing
    with pytest.raises(ValueError, match="two or more models"):
        preference_spread(FOUR[:1], FOUR[:1])


def test_weighted_sum():
    parts = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([10.0, 0.0])}
    assert weighted_sum(parts, {"b": -0.5}).tolist() == [-4.0, 2.0]
