"""Active choice against spreads worked by hand."""

import pytest
import torch

from lit_rlhf.functional.active_choice import difference_spread, disputed_pairs

# Three models' scores of four responses. The second is the first + 10 (it agrees in every difference); the third sees response 2 otherwise.
SCORES = torch.tensor([[0.0, 1.0, 4.0, 4.0], [10.0, 11.0, 14.0, 14.0], [0.0, 1.0, 1.0, 10.0]])
PAIRS = torch.tensor([[0, 1], [0, 2], [0, 3], [2, 3], [2, 1]])


def test_spread_by_hand():
    # differences by model: (-1, -1, -1); (-4, -4, -1): mean -3, variance (1 + 1 + 4)/3 = 2; (-4, -4, -10): mean -6, (4 + 4 + 16)/3 = 8;
    # (0, 0, -9): mean -3, (9 + 9 + 36)/3 = 18; (3, 3, 0): mean 2, (1 + 1 + 4)/3 = 2
    assert difference_spread(SCORES, PAIRS).square().tolist() == pytest.approx([0, 2, 8, 18, 2])


def test_the_most_disputed_first_and_of_equal_ones_the_earlier():
    assert disputed_pairs(SCORES, PAIRS, 4).tolist() == [3, 2, 1, 4]
    assert disputed_pairs(SCORES, PAIRS, 9).tolist() == [3, 2, 1, 4, 0]


def test_the_order_within_a_pair_and_half_precision_change_nothing():
    assert torch.equal(difference_spread(SCORES, PAIRS.flip(1)), difference_spread(SCORES, PAIRS))
    # differences 256.25 and 0.25 of float32 scores, which bfloat16 would round to 256: the spread is 128 exactly
    assert difference_spread(torch.tensor([[256.25, 0.0], [0.25, 0.0]]), torch.tensor([[0, 1]])).tolist() == [128.0]


def test_one_model_has_no_spread():
    with pytest.raises(ValueError, match="two or more models"):
        difference_spread(SCORES[:1], PAIRS)
