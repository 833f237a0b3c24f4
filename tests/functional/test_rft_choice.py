"""Which responses best-of-n distillation keeps."""

import pytest
import torch

from lit_rlhf.functional import best_of_each, first_of_equal

SCORES = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.5, -1.0, -2.0, 0.0]])
ALL = torch.ones(2, 4, dtype=torch.bool)


def kept(**setting) -> list[list[int]]:
    allowed = setting.pop("allowed", ALL)
    return [row.nonzero().squeeze(1).tolist() for row in best_of_each(SCORES, allowed, **setting)]


def test_the_best_of_each_row():
    assert kept() == [[1], [0]]  # of the two threes the first
    assert kept(keep=3) == [[1, 2, 3], [0, 1, 3]]


def test_what_is_not_allowed_or_too_low_is_never_kept():
    allowed = torch.tensor([[True, False, True, False], [False] * 4])
    assert kept(allowed=allowed) == [[2], []]
    assert kept(allowed=allowed, keep=4) == [[0, 2], []]
    assert kept(keep=4, min_score=0.5) == [[0, 1, 2, 3], [0]]
    assert kept(min_score=3.5) == [[], []]
    with pytest.raises(ValueError, match="keep must be at least 1"):
        kept(keep=0)


def test_first_of_equal():
    assert first_of_equal([["a", "b", "a", "b"], ["", "", "c", "d"]]).tolist() == [[True, True, False, False], [True, False, True, True]]
