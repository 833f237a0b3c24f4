"""Quark's quantiles and loss by hand."""

import math

import pytest
import torch

from lit_rlhf.functional import logprobs_kl_entropy, quantiles, quark_loss


def test_quantiles_are_equal_shares():
    assert quantiles(torch.tensor([5.0, 1.0, 3.0, 2.0, 4.0, 0.0]), 3).tolist() == [2, 0, 1, 1, 2, 0]
    assert quantiles(torch.tensor([0.0, 0.0, 0.0, 0.0]), 2).tolist() == [0, 0, 1, 1]  # of equal ones the earlier is the lower
    assert quantiles(torch.tensor([7.0, 8.0]), 5).tolist() == [2, 4] and quantiles(torch.tensor([1.0]), 5).tolist() == [4]
    counts = torch.bincount(quantiles(torch.randn(103), 5)).tolist()
    assert sum(counts) == 103 and max(counts) - min(counts) <= 1
    with pytest.raises(ValueError, match="at least 2 quantiles"):
        quantiles(torch.zeros(3), 1)


def test_kl_and_entropy_by_hand():
    """p = (1/2, 1/2), q = (1/4, 3/4): KL = (log 2 + log 2/3)/2, H = log 2; the policy's third id, which the reference lacks, and a
    banned one count for nothing."""
    states = torch.tensor([[0.0, 0.0, 50.0, 9.0], [math.log(3), 0.0, 0.0, 0.0]], requires_grad=True)
    ref = torch.tensor([[math.log(1 / 4), math.log(3 / 4), 70.0], [math.log(3), 0.0, 1.0]])
    banned = torch.tensor([False, False, True, False])
    same = lambda x: x  # noqa: E731
    for chunk in (1, 2):
        logprobs, kl, entropy = logprobs_kl_entropy(
            states, torch.tensor([0, 1]), ref, same, lambda x: x[:, :3], banned=banned, chunk_size=chunk
        )
        assert logprobs.tolist() == pytest.approx([math.log(1 / 2), math.log(1 / 4)])
        assert kl.tolist() == pytest.approx([(math.log(2) + math.log(2 / 3)) / 2, 0.0], abs=1e-6)
        assert entropy.tolist() == pytest.approx([math.log(2), -0.75 * math.log(0.75) - 0.25 * math.log(0.25)], rel=1e-5)
    kl.sum().backward()
    # d KL / d logit_i = p_i (log p_i/q_i - KL)
    log_ratio = math.log(2)
    assert states.grad[0, 0].item() == pytest.approx(0.5 * (log_ratio - float(kl[0].detach())), abs=1e-6) and states.grad[
        0, 2:
    ].tolist() == [0, 0]


def test_the_loss_by_hand():
    """Two tokens count: 1.5 + 0.5 * 0.3 - 0.1 * 2."""
    mask = torch.tensor([[True, True, False]])
    logprobs, kl, entropy = (torch.tensor([x]) for x in ([-1.0, -2.0, math.nan], [0.2, 0.4, math.nan], [3.0, 1.0, math.nan]))
    loss, stats = quark_loss(logprobs, kl, entropy, mask, kl_coef=0.5, entropy_coef=0.1)
    wanted = {"loss": 1.45, "lm_loss": 1.5, "kl": 0.3, "entropy": 2.0}
    assert {name: float(x) for name, x in stats.items()} == pytest.approx(wanted) and float(loss) == pytest.approx(1.45)
    assert float(quark_loss(logprobs, kl, entropy, mask, kl_coef=0.5, entropy_coef=0.1, count=4)[0]) == pytest.approx(0.725)
