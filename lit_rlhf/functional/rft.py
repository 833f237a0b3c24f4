"""Which of several responses to a prompt are worth learning from."""

import torch
from torch import Tensor


def best_of_each(scores: Tensor, allowed: Tensor, keep: int = 1, min_score: float | None = None) -> Tensor:
    """The mask of each row's `keep` highest scores among those allowed (and at least `min_score`); the first of equal ones.

    With keep = 1 and no floor it is best-of-n distillation (RAFT, Dong et al. 2023, arXiv:2304.06767); with a floor and a large keep it is
    rejection sampling: all that are good enough (RFT, Yuan et al. 2023, arXiv:2308.01825). A row may keep none.

    Shapes: scores, allowed (bool) (M, n); result (M, n) bool. Errors: ValueError for keep < 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1 of the responses to a prompt, got {keep}")
    allowed = allowed if min_score is None else allowed & (scores >= min_score)
    order = torch.where(allowed, scores.double(), -torch.inf).argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(allowed).scatter(1, order[:, :keep], True)
    return chosen & allowed


def first_of_equal(names: list[list[str]]) -> Tensor:
    """(M, n) bool: the entries of each row that do not repeat an earlier one of it."""
    return torch.tensor([[name not in row[:i] for i, name in enumerate(row)] for row in names])
