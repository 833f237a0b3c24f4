"""ILQL's loss by hand: one response of two tokens, gamma 0.5, tau 0.8."""

import math

import pytest
import torch

from lit_rlhf.functional import ilql_loss, last_token_rewards, lm_loss, move_towards

Q = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]])
TARGET = torch.tensor([[[2.0, 1.0]], [[1.0, 3.0]]])  # their minimum is 1, 1
Q_LOGPROBS = torch.tensor([[[-1.0, -2.0]], [[-3.0, -4.0]]])
VALUES = torch.tensor([[0.5, 2.0, 7.0]])
REWARDS, LOGPROBS, MASK = torch.tensor([[0.0, 4.0]]), torch.tensor([[-1.0, -3.0]]), torch.ones(1, 2, dtype=torch.bool)
SETTING = {"gamma": 0.5, "tau": 0.8}


def test_by_hand():
    """Goals 0 + 0.5 * 2 = 1 and 4 (nothing follows the last token, so the 7 is not read).

    Q: (0 + 4)/2 + (4 + 16)/2 = 12. Qbar - V = 0.5, -1: (0.8 * 0.25 + 0.2 * 1)/2 = 0.2. CQL 1.5 + 3.5 = 5. AWAC (1 + 3)/2 = 2.
    """
    loss, stats = ilql_loss(LOGPROBS, Q, TARGET, Q_LOGPROBS, VALUES, REWARDS, MASK, **SETTING)
    wanted = {"q_loss": 12.0, "value_loss": 0.2, "cql_loss": 5.0, "awac_loss": 2.0, "loss": 12 + 0.2 + 0.1 * 5 + 2}
    wanted |= {"q_mean": 1.5, "value_mean": 1.25, "advantage_mean": -0.25}
    assert {name: float(x) for name, x in stats.items()} == pytest.approx(wanted) and float(loss) == pytest.approx(14.7)


def test_the_weight_of_the_language_model_term():
    """exp(beta u) with beta log 2: sqrt 2 and 1/2, so (1.41421 * 1 + 0.5 * 3)/2."""
    _, stats = ilql_loss(LOGPROBS, Q, TARGET, Q_LOGPROBS, VALUES, REWARDS, MASK, **SETTING, awac_beta=math.log(2))
    assert float(stats["awac_loss"]) == pytest.approx((math.sqrt(2) + 1.5) / 2)


def test_what_is_learnt_from_what():
    """Q from V and the reward, V from the targets alone: dV = -2 * 0.8 * 0.5 / 2, -2 * 0.2 * -1 / 2, and 0 for the state at the end."""
    q, values, target = Q.clone().requires_grad_(), VALUES.clone().requires_grad_(), TARGET.clone().requires_grad_()
    logprobs = LOGPROBS.clone().requires_grad_()
    ilql_loss(logprobs, q, target, Q_LOGPROBS, values, REWARDS, MASK, **SETTING, awac_beta=0.5, awac_coef=0.0)[0].backward()
    assert values.grad.tolist() == [pytest.approx([-0.4, 0.2, 0.0])] and target.grad is None
    assert q.grad.flatten().tolist() == pytest.approx([0.0, -2.0, 2.0, -4.0])  # 2 (Q - y) / 2
    assert logprobs.grad.tolist() == [[0.0, 0.0]]


def test_padding_and_micro_batches():
    """A second response of one token: what stands behind it counts nowhere, and two parts with the step's count add up to the whole."""
    nan = math.nan

    def twice(x, filler=nan):
        other = x.clone()
        other[..., 1:] = filler
        return torch.cat([x, other], dim=-2)

    mask = torch.tensor([[True, True], [True, False]])
    arguments = [twice(LOGPROBS), twice(Q), twice(TARGET), twice(Q_LOGPROBS), twice(VALUES), twice(REWARDS, 0.0)]
    whole, stats = ilql_loss(*arguments, mask, **SETTING)
    parts = [ilql_loss(*(x[..., i : i + 1, :] for x in arguments), mask[i : i + 1], **SETTING, count=3)[0] for i in (0, 1)]
    assert float(whole) == pytest.approx(float(sum(parts)))
    assert float(stats["q_loss"]) == pytest.approx((24 + 1 + 9) / 3)  # the new token's goal is its reward, 0


def test_without_rewards_it_is_the_language_model_loss():
    zero = torch.zeros(2, 1, 2)
    loss, _ = ilql_loss(LOGPROBS, zero, zero, Q_LOGPROBS, torch.zeros(1, 3), torch.zeros(1, 2), MASK, cql_coef=0.0)
    assert float(loss) == float(lm_loss(LOGPROBS, MASK)[0])


def test_rewards_stand_on_last_tokens():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert last_token_rewards(torch.tensor([2.0, -1.0]), mask).tolist() == [[0, 0, 2], [-1, 0, 0]]


def test_targets_follow():
    target = torch.tensor([1.0, 2.0])
    move_towards(target, torch.tensor([3.0, 0.0]), 0.25)
    assert target.tolist() == [1.5, 1.5]
