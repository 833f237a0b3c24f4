"""Every expected number is worked by hand."""

import math

import pytest
import torch

from lit_rlhf.functional import group_normalised, leave_one_out, policy_loss, rloo_loss

LN2 = math.log(2)
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_leave_one_out_by_hand():
    # 1, 2, 6: minus (2 + 6) / 2, (1 + 6) / 2, (1 + 2) / 2; and -1, 3 of another prompt: minus each other
    assert leave_one_out(torch.tensor([1.0, 2.0, 6.0]), 3).tolist() == [-3.0, -1.5, 4.5]
    assert leave_one_out(torch.tensor([1.0, 2.0, -1.0, 3.0]), 2).tolist() == [-1.0, 1.0, -4.0, 4.0]


def test_leave_one_out_is_k_over_k_minus_1_times_the_distance_from_the_mean():
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0))
    mean = rewards.view(3, 4).mean(1).repeat_interleave(4)
    torch.testing.assert_close(leave_one_out(rewards, 4), 4 / 3 * (rewards - mean))


def test_group_normalised_by_hand():
    # 1, 2, 6: mean 3, unbiased variance (4 + 1 + 9) / 2 = 7
    expected = [-2 / (7**0.5 + 1e-4), -1 / (7**0.5 + 1e-4), 3 / (7**0.5 + 1e-4)]
    assert group_normalised(torch.tensor([1.0, 2.0, 6.0]), 3).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("compare", [leave_one_out, group_normalised])
def test_equal_rewards_teach_nothing(compare):
    assert compare(torch.full((4,), 0.7), 2).abs().max() < 1e-3
    assert compare(torch.tensor([2.0, 2.0, 2.0, 2.0]), 4).tolist() == [0.0] * 4


@pytest.mark.parametrize("compare", [leave_one_out, group_normalised])
@pytest.mark.parametrize(("n", "size"), [(4, 1), (5, 2)])
def test_groups_that_cannot_be(compare, n, size):
    with pytest.raises(ValueError, match=f"{n} rewards in groups of {size}"):
        compare(torch.zeros(n), size)


def test_the_first_gradient_is_reinforces():
    """At rho = 1 the loss is -mean A, and its gradient at each token's log-prob -A / N; outside the mask 0."""
    old = torch.tensor([[-1.0, -2.0, 9.0], [-0.5, 9.0, 9.0]])
    logprobs, advantages = old.clone().requires_grad_(), torch.tensor([3.0, -1.0])
    loss, stats = rloo_loss(logprobs, old, advantages, MASK)
    loss.backward()
    assert loss.item() == -1.0
    assert logprobs.grad.tolist() == [[-1.5, -1.5, 0.0], [0.5, 0.0, 0.0]]
    assert stats["clip_fraction"].item() == stats["approx_kl"].item() == stats["ratio_max_dev"].item() == 0.0
    assert stats["ratio_mean"].item() == 1.0


def test_the_sequence_ratio_by_hand():
    """Ratios 2 * 2 = 4 and 1/2. A = 1: the clipped -1.2; A = 1 at 1/2: -1/2, not clipped. A = -1: 4 (no clip) and the clipped .8."""
    old = torch.zeros(2, 3)
    new = torch.tensor([[LN2, LN2, 5.0], [-LN2, 5.0, 5.0]])
    loss, stats = rloo_loss(new, old, torch.tensor([1.0, 1.0]), MASK)
    assert loss.item() == pytest.approx((-1.2 - 0.5) / 2)
    assert stats["clip_fraction"].item() == 0.5 and stats["ratio_mean"].item() == pytest.approx(2.25)
    assert stats["approx_kl"].item() == pytest.approx((2 * LN2**2 + LN2**2 / 2) / 2)  # (2 ln 2)^2 / 2 and (ln 2)^2 / 2
    assert stats["ratio_max_dev"].item() == pytest.approx(3.0)
    assert rloo_loss(new, old, torch.tensor([-1.0, -1.0]), MASK)[0].item() == pytest.approx((4 + 0.8) / 2)
    assert rloo_loss(new, old, torch.tensor([1.0, 1.0]), MASK, clip=10.0)[0].item() == pytest.approx((-4 - 0.5) / 2)


def test_the_token_ratio_by_hand():
    """Ratios 2 and 1.1 of the first response, A = 1: (-1.2 - 1.1) / 2; 1/2 of the second, A = -1: .8."""
    new = torch.tensor([[LN2, math.log(1.1), 5.0], [-LN2, 5.0, 5.0]])
    loss, stats = rloo_loss(new, torch.zeros(2, 3), torch.tensor([1.0, -1.0]), MASK, ratio="token")
    assert loss.item() == pytest.approx((-1.15 + 0.8) / 2)
    assert stats["clip_fraction"].item() == pytest.approx((0.5 + 1) / 2)
    assert stats["ratio_mean"].item() == pytest.approx((1.55 + 0.5) / 2)


def test_of_one_token_each_all_ratios_are_ppos():
    draw = torch.Generator().manual_seed(0)
    new, old, a = (torch.randn(8, 1, generator=draw) for _ in range(3))
    mask = torch.ones(8, 1, dtype=torch.bool)
    expected = policy_loss(new, old, a, mask)[0]
    for ratio in ("sequence", "token"):
        torch.testing.assert_close(rloo_loss(new, old, a[:, 0], mask, ratio=ratio)[0], expected)
