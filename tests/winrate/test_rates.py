"""Win rates by hand, and what length does to them."""

import math

import pytest
import torch

from lit_rlhf.winrate.judges import Verdict, combined
from lit_rlhf.winrate.pairs import Pair
from lit_rlhf.winrate.rates import at_equal_length, win_rate


def pair(number: int, first: int, second: int) -> Pair:
    """Responses of so many words."""
    return Pair(f"p{number}", "w " * first, "w " * second, {}, number)


def test_counts():
    pairs = [pair(i, 10, 10) for i in range(8)]
    verdicts = [Verdict(1.0)] * 4 + [Verdict(0.0)] + [Verdict(0.5)] + [Verdict(None)] * 2
    found = win_rate(pairs, verdicts)
    assert (found.wins, found.losses, found.ties, found.unparsable) == (4, 1, 1, 2)
    assert found.all.mean == pytest.approx(4.5 / 6) and 0 <= found.all.low < 0.75 < found.all.high <= 1
    assert found.alike == 6 and found.like_length.mean == found.all.mean and found.equal_length is None and found.length_ratio == 1.0


def test_nothing_parsable():
    with pytest.raises(ValueError, match="no answer that counts to any of the 2 pairs"):
        win_rate([pair(0, 1, 1), pair(1, 1, 1)], [Verdict(None)] * 2)


def test_pairs_of_one_prompt_go_together():
    pairs = [Pair("p", "a", "b", {}, i // 50) for i in range(100)]  # two prompts, all won and all lost: a sample is 0, 1/2 or 1
    found = win_rate(pairs, [Verdict(float(i < 50)) for i in range(100)])
    assert (found.all.low, found.all.high) == (0.0, 1.0)


def test_position():
    orders = [combined(0.9, 0.2), combined(0.9, 0.8)]  # first order says first twice; second order: 0.2 means it named what was shown first
    found = win_rate([pair(0, 3, 3), pair(1, 3, 3)], orders)
    assert found.picked_first == pytest.approx(3 / 4) and (found.wins, found.ties) == (1, 1)
    assert win_rate([pair(0, 3, 3)], [Verdict(1.0)]).picked_first is None


def test_a_judge_that_pays_for_length_alone():
    """P(win) = sigmoid(4 log ratio) = r^4 / (r^4 + 1) of sides that are mostly longer: over half is won, at equal length half."""
    pairs, verdicts = [], []
    for first, second, count in ((16, 12, 600), (12, 10, 300), (10, 12, 100), (15, 12, 200)):
        ratio = (first / second) ** 4
        pairs += [pair(len(pairs) + i, first, second) for i in range(count)]
        verdicts += [Verdict(float(i < count * ratio / (ratio + 1))) for i in range(count)]
    found = win_rate(pairs, verdicts)
    assert found.all.low > 0.6 and found.equal_length.mean == pytest.approx(0.5, abs=0.01)
    assert found.equal_length.low < 0.5 < found.equal_length.high and found.alike == 0 and found.like_length is None


def test_like_length_is_within_a_tenth_of_the_longer():
    found = win_rate([pair(0, 9, 10), pair(1, 10, 9), pair(2, 10, 8)], [Verdict(1.0), Verdict(0.0), Verdict(1.0)])
    assert found.alike == 2 and found.like_length.mean == 0.5


def test_logistic_by_hand():
    """x = -1 wins 1 in 4, x = 1 wins 3 in 4: slope log 3 and intercept 0; x = 0 and x = 1 alone give the intercept of x = 0."""
    values = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0], dtype=torch.double).repeat(50)
    x = torch.tensor([-1.0] * 4 + [1.0] * 4, dtype=torch.double).repeat(50)
    assert at_equal_length(values, x, torch.arange(400)).mean == pytest.approx(0.5, abs=1e-4)
    found = at_equal_length(values, (x + 1) / 2, torch.arange(400))
    assert found.mean == pytest.approx(0.25, abs=1e-3)
    assert (found.low, found.high) == pytest.approx(
        (0.25 - 1.96 * math.sqrt(0.1875 / 200), 0.25 + 1.96 * math.sqrt(0.1875 / 200)), abs=0.02
    )


def test_all_won_stays_finite():
    found = at_equal_length(torch.ones(20, dtype=torch.double), torch.linspace(-1, 1, 20, dtype=torch.double), torch.arange(20))
    assert 0.95 < found.mean <= 1.0
