"""Values worked by hand."""

import math

import pytest
import torch

from lit_rlhf.functional import calibration_floor, difference_correlation, label_agreement


def test_agreement_of_labels():
    # item 7: two labels that agree, 1 of 1; item 3: labels 1, 1, 0: 1 of 3 pairs agree; item 5: one label, no pair. Together 2 of 4.
    items = torch.tensor([7, 3, 7, 3, 5, 3])
    first = torch.tensor([True, True, True, True, False, False])
    found = label_agreement(items, first)
    assert found.mean == pytest.approx(0.5)
    # deviations: item 7 +.5; item 3 (1/2 - 1/2 - 1/2) = -.5; error^2 = 2/1 (.25 + .25) / 16
    assert found.error == pytest.approx(0.25)
    assert found.low < 0.5 < found.high
    assert label_agreement(torch.tensor([1, 2]), torch.tensor([True, True])) is None


def test_agreement_does_not_depend_on_which_is_first():
    items, first = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([True, False, True, True, True])
    assert label_agreement(items, first) == label_agreement(items, ~first)


def test_correlation_of_differences():
    # 1x2 + (-2)x1 + 3x4 = 12; squares 14 and 21
    x, y = torch.tensor([1.0, -2, 3]), torch.tensor([2.0, 1, 4])
    assert difference_correlation(x, y) == pytest.approx(12 / math.sqrt(14 * 21))
    flip = torch.tensor([1.0, -1, -1])
    assert difference_correlation(x * flip, y * flip) == pytest.approx(difference_correlation(x, y))
    both = torch.corrcoef(torch.stack([torch.cat([x, -x]), torch.cat([y, -y])]))[0, 1]  # Pearson's, over both orders
    assert difference_correlation(x, y) == pytest.approx(float(both))
    assert difference_correlation(x, torch.zeros(3)) == 0.0


def test_calibration_floor():
    # one bin of n pairs at confidence p: |share - p| has mean sqrt(2 p (1-p) / (pi n)) for large n; p = .75, n = 400: .01727
    assert calibration_floor(torch.full((400,), 0.75), bins=1, draws=2000) == pytest.approx(0.01727, rel=0.05)
    assert calibration_floor(torch.ones(10)) == 0.0  # always right, and says so
    confidence = torch.rand(300) / 2 + 0.5
    assert calibration_floor(confidence) > calibration_floor(confidence.repeat(9))
    assert calibration_floor(confidence, seed=1) != calibration_floor(confidence) == calibration_floor(confidence)
