"""Every expected number is worked by hand; softplus(-d) = -log sigmoid(d)."""

import math

import pytest
import torch

from lit_rlhf.functional import dpo_loss

LN2, LN3 = math.log(2), math.log(3)


def ratios(*numbers):
    return torch.tensor(numbers, dtype=torch.float32, requires_grad=True)


def test_sigmoid_by_hand():
    # beta .5: d = .5 (2 ln 3 - 0) = ln 3, whose sigmoid is 3/4; and d = .5 (1 - 1) = 0
    loss, stats = dpo_loss(ratios(2 * LN3, 1.0), ratios(0.0, 1.0), beta=0.5)
    torch.testing.assert_close(loss, torch.tensor((math.log(4 / 3) + LN2) / 2))
    assert stats["accuracy"].item() == 0.5  # a tie is wrong
    for name, value in {"margin": LN3 / 2, "chosen_reward": (LN3 + 0.5) / 2, "rejected_reward": 0.25, "loss": loss.item()}.items():
        assert stats[name].item() == pytest.approx(value), name
    assert stats.keys() == {"loss", "accuracy", "margin", "chosen_reward", "rejected_reward"}


def test_the_gradient_is_rafailovs():
    """-beta sigmoid(r_rejected - r_chosen) on the chosen log-prob and its opposite on the rejected one (their section 4)."""
    chosen, rejected = ratios(0.0), ratios(2 * LN3)  # beta .5: r_rejected - r_chosen = ln 3
    dpo_loss(chosen, rejected, beta=0.5)[0].backward()
    assert chosen.grad.item() == pytest.approx(-0.5 * 0.75) and rejected.grad.item() == pytest.approx(0.5 * 0.75)


def test_ipo_by_hand():
    """(h - 1 / (2 beta))^2 with beta .25, h = 3 and -1: (3 - 2)^2 and (-1 - 2)^2; it is least at h = 2."""
    loss, stats = dpo_loss(ratios(4.0, 0.0), ratios(1.0, 1.0), beta=0.25, kind="ipo")
    assert loss.item() == stats["loss"].item() == (1 + 9) / 2
    assert stats["margin"].item() == pytest.approx(0.25 * (3 - 1) / 2) and stats["accuracy"].item() == 0.5
    best = ratios(2.0)
    dpo_loss(best, ratios(0.0), beta=0.25, kind="ipo")[0].backward()
    assert best.grad.item() == 0.0


def test_conservative_dpo():
    """epsilon .25 at d = ln 3: -(.75 ln .75 + .25 ln .25) = .5623351, and there the loss has its minimum: sigmoid(d) = 1 - epsilon."""
    chosen = ratios(LN3)
    loss, stats = dpo_loss(chosen, ratios(0.0), beta=1.0, label_smoothing=0.25)
    loss.backward()
    assert loss.item() == pytest.approx(0.5623351) and abs(chosen.grad.item()) < 1e-6
    assert stats["accuracy"].item() == 1.0
    # IPO: .75 (h - 2)^2 + .25 (h + 2)^2 = .75 + 6.25 at h = 3, beta .25; d/dh = 1.5 (h - 2) + .5 (h + 2) is 0 at h = 1
    chosen = ratios(3.0, 1.0)
    loss, _ = dpo_loss(chosen, ratios(0.0, 0.0), beta=0.25, kind="ipo", label_smoothing=0.25)
    loss.backward()
    assert loss.item() == pytest.approx((7.0 + 0.75 + 2.25) / 2) and chosen.grad[1].item() == pytest.approx(0.0, abs=1e-6)


def test_targets_and_margins():
    """A tie has its minimum where the two are equal; t .2 smoothed by .25 is .75 * .2 + .25 * .8 = .35; a margin of ln 3 takes d to 0."""
    chosen = ratios(0.0)
    dpo_loss(chosen, ratios(0.0), target=torch.tensor([0.5]))[0].backward()
    assert chosen.grad.item() == 0.0
    loss, stats = dpo_loss(ratios(LN3), ratios(0.0), beta=1.0, target=torch.tensor([0.2]), label_smoothing=0.25)
    assert loss.item() == pytest.approx(-(0.35 * math.log(0.75) + 0.65 * math.log(0.25)))
    assert stats["accuracy"].item() == 0.0  # the rejected one is preferred here
    margin = torch.tensor([LN3])
    assert dpo_loss(ratios(2 * LN3), ratios(0.0), beta=0.5, margin=margin)[0].item() == pytest.approx(LN2)
    # IPO, beta .25: h = 3 - .5 / .25 = 1, (1 - 2)^2
    assert dpo_loss(ratios(3.0), ratios(0.0), beta=0.25, kind="ipo", margin=torch.tensor([0.5]))[0].item() == pytest.approx(1.0)


def test_far_apart_is_finite():
    loss, _ = dpo_loss(ratios(-2000.0), ratios(0.0), beta=0.1)
    assert loss.item() == 200.0


def test_count_is_the_divisor():
    for kind in ("sigmoid", "ipo"):
        whole, stats = dpo_loss(ratios(1.0, 2.0, 3.0), ratios(0.0, 1.0, 5.0), kind=kind)
        parts = [dpo_loss(ratios(*a), ratios(*b), kind=kind, count=3) for a, b in (((1.0, 2.0), (0.0, 1.0)), ((3.0,), (5.0,)))]
        assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), rel=1e-6)
        for name, value in stats.items():
            assert sum(s[name].item() for _, s in parts) == pytest.approx(value.item(), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"label_smoothing": 0.5}, {"label_smoothing": -0.1}])
def test_what_is_refused(wrong):
    with pytest.raises(ValueError, match="must be above 0 and label_smoothing"):
        dpo_loss(ratios(1.0), ratios(0.0), **wrong)
