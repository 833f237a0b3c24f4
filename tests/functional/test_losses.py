"""Every expected number is worked by hand; softplus(-d) = -log sigmoid(d)."""

import math

import pytest
import torch

from lit_rlhf.functional import lm_loss, policy_loss, value_loss

T, F = True, False


def test_lm_loss_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, torch.nan], [-6.0, torch.nan, -torch.inf]], requires_grad=True)
    mask = torch.tensor([[T, T, F], [T, F, F]])
    loss, stats = lm_loss(logprobs, mask)
    assert loss.item() == 3.0 and stats["loss"].item() == 3.0  # (1 + 2 + 6) / 3 tokens, not the mean of the rows' means (3.75)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-1.0, -1.0, 0.0], [-1.0, 0.0, 0.0]]) / 3)
    assert lm_loss(logprobs, mask, count=9)[0].item() == 1.0


def test_lm_loss_of_nothing():
    logprobs, empty = torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="empty"):
        lm_loss(logprobs, empty)
    loss, _ = lm_loss(logprobs, empty, count=4)
    loss.backward()
    assert loss.item() == 0.0 and logprobs.grad.tolist() == [[0.0, 0.0]]


OLD = torch.zeros(1, 4)
LOGPROBS = torch.tensor([[1.5, 1.5, 0.5, 0.5]]).log()
ADVANTAGES = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
ALL = torch.ones(1, 4, dtype=torch.bool)


def test_policy_loss_by_hand():
    # ratio 1.5, A 1: max(-1.5, -1.2) = -1.2 | 1.5, -1: max(1.5, 1.2) = 1.5 | .5, 1: max(-.5, -.8) = -.5 | .5, -1: max(.5, .8) = .8
    loss, stats = policy_loss(LOGPROBS, OLD, ADVANTAGES, ALL)
    torch.testing.assert_close(loss, torch.tensor(0.15))  # .6 / 4
    assert stats["clip_fraction"].item() == 0.5  # the first and the last
    k2 = (math.log(1.5) ** 2 + math.log(0.5) ** 2) / 4  # two of each, halved, over 4
    torch.testing.assert_close(stats["approx_kl"], torch.tensor(k2))
    torch.testing.assert_close(stats["ratio_mean"], torch.tensor(1.0))
    torch.testing.assert_close(stats["ratio_max_dev"], torch.tensor(0.5))
    # clip .4: (-1.4 + 1.5 - .5 + .6) / 4
    torch.testing.assert_close(policy_loss(LOGPROBS, OLD, ADVANTAGES, ALL, clip=0.4)[0], torch.tensor(0.05))
    # clip 1 cuts nothing here: (-1.5 + 1.5 - .5 + .5) / 4
    torch.testing.assert_close(policy_loss(LOGPROBS, OLD, ADVANTAGES, ALL, clip=1.0)[0], torch.tensor(0.0))


def test_policy_gradient_is_that_of_the_unclipped_tokens():
    logprobs = LOGPROBS.clone().requires_grad_()
    policy_loss(logprobs, OLD, ADVANTAGES, ALL)[0].backward()
    # d/dlogprob of -A ratio / 4 = -A ratio / 4 ; the clipped first and last have none
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 1.5, -0.5, 0.0]]) / 4)


def test_first_update_is_on_policy():
    torch.manual_seed(0)
    logprobs = torch.randn(3, 5).sub(3).requires_grad_()
    advantages, mask = torch.randn(3, 5), torch.ones(3, 5, dtype=torch.bool)
    loss, stats = policy_loss(logprobs, logprobs.detach(), advantages - advantages.mean(), mask)
    assert abs(loss.item()) < 1e-6  # minus the mean of whitened advantages
    expected = {"clip_fraction": 0.0, "approx_kl": 0.0, "ratio_mean": 1.0, "ratio_max_dev": 0.0}
    assert {name: stats[name].item() for name in expected} == expected


def test_policy_loss_outside_the_mask():
    junk = torch.tensor([[torch.nan, torch.inf, -torch.inf]])
    mask = torch.tensor([[T, T, T, T, F, F, F]])
    logprobs = torch.cat([LOGPROBS, junk], 1).requires_grad_()
    loss, stats = policy_loss(logprobs, torch.cat([OLD, junk], 1), torch.cat([ADVANTAGES, junk], 1), mask)
    torch.testing.assert_close(loss, torch.tensor(0.15))  # as without the padding: pads do not dilute
    assert stats["clip_fraction"].item() == 0.5
    torch.testing.assert_close(stats["ratio_max_dev"], torch.tensor(0.5))
    loss.backward()
    torch.testing.assert_close(logprobs.grad[0], torch.tensor([0.0, 1.5, -0.5, 0.0, 0.0, 0.0, 0.0]) / 4)


def test_old_logprobs_and_advantages_are_constants():
    inputs = [LOGPROBS.clone().requires_grad_(), OLD.clone().requires_grad_(), ADVANTAGES.clone().requires_grad_()]
    policy_loss(*inputs, ALL)[0].backward()
    assert inputs[0].grad is not None and inputs[1].grad is None and inputs[2].grad is None


VALUES, RETURNS = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 0.0]])
OLD_VALUES, BOTH = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)


def test_value_loss_by_hand():
    # R 2: max((1 - 2)^2, (.2 - 2)^2) = 3.24 ; R 0: max(1, .04) = 1
    loss, stats = value_loss(VALUES, OLD_VALUES, RETURNS, BOTH)
    torch.testing.assert_close(loss, torch.tensor(1.06))  # .5 * 4.24 / 2
    got = {name: value.item() for name, value in stats.items() if name != "value_loss"}
    assert got == {"value_clip_fraction": 0.5, "value_mean": 1.0, "return_mean": 1.0}
    loss, stats = value_loss(VALUES, OLD_VALUES, RETURNS, BOTH, clip=None)
    assert loss.item() == 0.5 and stats["value_clip_fraction"].item() == 0.0
    # clip .5: max(1, (.5 - 2)^2 = 2.25) and 1 -> .5 * 3.25 / 2
    assert value_loss(VALUES, OLD_VALUES, RETURNS, BOTH, clip=0.5)[0].item() == 0.8125
    # downwards: V -1 of 0, clip .5: R -2: max(1, 2.25), R 0: max(1, .25)
    assert value_loss(-VALUES, OLD_VALUES, -RETURNS, BOTH, clip=0.5)[0].item() == 0.8125


def test_value_loss_at_the_first_update_is_half_the_squared_error():
    loss, stats = value_loss(VALUES, VALUES, RETURNS, BOTH)
    assert loss.item() == 0.5 and stats["value_clip_fraction"].item() == 0.0


def test_value_loss_outside_the_mask_and_its_constants():
    junk = torch.tensor([[torch.nan, torch.inf]])
    inputs = [torch.cat([x, junk], 1).requires_grad_() for x in (VALUES, OLD_VALUES, RETURNS)]
    loss, _ = value_loss(*inputs, torch.tensor([[T, T, F, F]]))
    torch.testing.assert_close(loss, torch.tensor(1.06))
    loss.backward()
    # the clipped first has no gradient; the second .5 * 2 * (1 - 0) / 2
    assert inputs[0].grad.tolist() == [[0.0, 0.5, 0.0, 0.0]]
    assert inputs[1].grad is None and inputs[2].grad is None
