import pytest
import torch

from lit_rlhf.functional import gae, token_rewards

T, F = True, False


def test_rewards_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, torch.nan]])
    ref = torch.tensor([[-1.5, -2.0, -2.0], [-2.0, -1.0, 5.0]])
    mask = torch.tensor([[T, T, T], [T, T, F]])
    # -0.1 * (logprob - ref): -.05, 0, .1 and -.1, 0; the score is added on the last token that counts (the EOS), not one past it
    expected = torch.tensor([[-0.05, 0.0, 10.1], [-0.1, 20.0, 0.0]])
    torch.testing.assert_close(token_rewards(logprobs, ref, torch.tensor([10.0, 20.0]), mask, kl_coef=0.1), expected)


def test_a_row_without_tokens_has_no_place_for_its_score():
    z = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        token_rewards(z, z, torch.ones(2), torch.tensor([[T, F, F], [F, F, F]]), kl_coef=0.1)


REWARDS, VALUES = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 1.5]])
ALL = torch.ones(1, 3, dtype=torch.bool)


def test_gae_by_hand():
    # gamma 1, lam .5. delta: 2 - 1.5 = .5 ; 0 + 1.5 - 1 = .5 ; 1 + 1 - .5 = 1.5. A: .5 ; .5 + .25 = .75 ; 1.5 + .375 = 1.875
    advantages, returns = gae(REWARDS, VALUES, ALL, gamma=1.0, lam=0.5)
    assert advantages.tolist() == [[1.875, 0.75, 0.5]]
    assert returns.tolist() == [[2.375, 1.75, 2.0]]
    # gamma .5, lam 1. delta: .5 ; .75 - 1 = -.25 ; 1 + .5 - .5 = 1. A: .5 ; -.25 + .25 = 0 ; 1
    assert gae(REWARDS, VALUES, ALL, gamma=0.5, lam=1.0)[0].tolist() == [[1.0, 0.0, 0.5]]


def test_gae_limits():
    # lam 1, gamma 1: the returns are the rewards to go, whatever the values
    assert gae(REWARDS, VALUES, ALL, lam=1.0)[1].tolist() == [[3.0, 2.0, 2.0]]
    # lam 0: the advantages are the TD errors
    assert gae(REWARDS, VALUES, ALL, lam=0.0)[0].tolist() == [[1.5, 0.5, 0.5]]


def test_gae_defaults_are_gamma_1_and_lam_95():
    # rewards 0, 1 and values 0: A_1 = 1, A_0 = 1 * .95
    advantages, _ = gae(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(advantages, torch.tensor([[0.95, 1.0]]))


def test_padding_and_batch_mates_change_nothing():
    junk = torch.nan
    rewards = torch.tensor([[1.0, 0.0, 2.0, junk, junk], [1.0, 1.0, 1.0, 1.0, 1.0]])
    values = torch.tensor([[0.5, 1.0, 1.5, 9.0, junk], [1.0, 1.0, 1.0, 1.0, 1.0]])
    mask = torch.tensor([[T, T, T, F, F], [T, T, T, T, T]])
    advantages, returns = gae(rewards, values, mask, lam=0.5)
    assert advantages[0].tolist() == [1.875, 0.75, 0.5, 0.0, 0.0]  # as above: the value after the last real token is 0, not 9
    assert returns[0].tolist() == [2.375, 1.75, 2.0, 0.0, 0.0]


def test_a_gap_is_stepped_over():
    rewards, values = torch.tensor([[1.0, 7.0, 0.0, 2.0]]), torch.tensor([[0.5, 7.0, 1.0, 1.5]])
    advantages, _ = gae(rewards, values, torch.tensor([[T, F, T, T]]), lam=0.5)
    assert advantages.tolist() == [[1.875, 0.0, 0.75, 0.5]]


def test_results_are_constants():
    values = VALUES.clone().requires_grad_()
    advantages, returns = gae(REWARDS, values, ALL)
    assert not advantages.requires_grad and not returns.requires_grad
    assert gae(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool))[0].shape == (2, 0)
