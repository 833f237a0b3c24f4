"""What choices between two responses say: how far people agree, what length alone explains, and how far off calibration is by chance."""

import torch
from torch import Tensor

from lit_rlhf.functional.statistics import Estimate, confidence_bin, grouped_share


def label_agreement(items: Tensor, first: Tensor) -> Estimate | None:
    """The share of pairs of labels of one item that agree, with its interval; None where no item has two labels.

    Of an item with a labels for the one response and b for the other, a(a-1)/2 + b(b-1)/2 of its (a+b)(a+b-1)/2 pairs of labels agree. It
    is how well one person predicts another, the ceiling that reward models are compared with.
    Shapes: items (n,) int64, the same number for the same two responses; first (n,) bool, whether the label is for the item's first one.
    """
    labels: dict[int, list[bool]] = {}
    for item, label in zip(items.tolist(), first.tolist(), strict=True):
        labels.setdefault(item, []).append(label)
    agree, owner = [], []
    for item, own in labels.items():
        pairs = [a == b for i, a in enumerate(own) for b in own[:i]]
        agree += pairs
        owner += [item] * len(pairs)
    return grouped_share(torch.tensor(agree), torch.tensor(owner)) if agree else None


def difference_correlation(x: Tensor, y: Tensor) -> float:
    """sum(xy) / sqrt(sum(x^2) sum(y^2)): the correlation of two differences within pairs, whichever response is taken from the other.

    It is Pearson's correlation over both orders of every pair, whose means are 0. 0 where one of the two is always 0.
    Shapes: (n,) both.
    """
    x, y = x.double(), y.double()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 1e-12 else 0.0


def calibration_floor(confidence: Tensor, bins: int = 10, *, draws: int = 200, seed: int = 0) -> float:
    """The mean ECE of a perfectly calibrated model with these confidences: bins of few pairs are off by chance alone.

    Each draw makes every pair right with its own confidence. Shapes: confidence (n,) in .5..1; `bins` as in `reliability`.
    """
    generator = torch.Generator().manual_seed(seed)
    which, confidence = confidence_bin(confidence, bins), confidence.double()
    expected, total = torch.bincount(which, confidence), 0.0
    for _ in range(draws):
        right = torch.rand(len(confidence), generator=generator, dtype=torch.double) < confidence
        total += float((torch.bincount(which, right.double()) - expected).abs().sum())
    return total / len(confidence) / draws
