"""The nucleus and log-probs within it, by hand."""

import math

import pytest
import torch

from lit_rlhf.functional import masked_token_logprobs, nucleus, token_logprobs

P = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.1, 0.1, 0.7]])


def kept(top_p: float, **setting) -> list[list[int]]:
    return [row.nonzero().squeeze(1).tolist() for row in nucleus(P.log(), top_p, **setting)]


def test_the_nucleus():
    assert kept(0.45) == [[0], [3]]
    assert kept(0.6) == [[0, 1], [3]]
    assert kept(0.9) == [[0, 1, 2], [0, 1, 3]]  # of equal ones the first; 0.7 + 0.1 + 0.1 reaches it
    assert kept(1.0) == [[0, 1, 2, 3]] * 2
    assert kept(0.45, min_tokens=2) == [[0, 1], [0, 3]]
    assert kept(0.45, min_tokens=9) == [[0, 1, 2, 3]] * 2


def test_temperature_and_banned_tokens():
    """Halving the temperature squares the probabilities: 0.25, 0.09, 0.0225, 0.0025 of 0.365, the first 0.685 of it."""
    assert kept(0.65) == [[0, 1], [3]] and kept(0.65, temperature=0.5)[0] == [0]
    banned = torch.tensor([True, False, False, False])
    assert kept(0.65, banned=banned) == [[1, 2], [3]]  # 0.3 of 0.5 is 0.6, with 0.15 of it 0.9
    assert kept(0.1, banned=banned, min_tokens=4) == [[1, 2, 3]] * 2
    for wrong in ({"top_p": 0.0}, {"top_p": 1.1}, {"top_p": 0.5, "min_tokens": 0}):
        with pytest.raises(ValueError, match="top_p must be"):
            nucleus(P, **wrong)


def test_log_probs_within_the_mask():
    """The guide's nucleus is {0, 1}: 0.2 and 0.6 of the policy become 1/4 and 3/4. A token outside counts where it was the one taken."""
    policy, same = torch.tensor([[0.2, 0.6, 0.1, 0.1]] * 3).log().requires_grad_(), lambda x: x
    guide, targets = P[:1].log().expand(3, 4), torch.tensor([0, 1, 3])
    for chunk in (2, 8):
        found = masked_token_logprobs(policy, targets, guide, same, same, top_p=0.6, chunk_size=chunk)
        assert found.exp().tolist() == pytest.approx([0.25, 0.75, 0.1 / 0.9])
    found[0].backward()  # d log p_0 / d logits = (1, 0, 0, 0) - (1/4, 3/4, 0, 0)
    assert policy.grad[0].tolist() == pytest.approx([0.75, -0.75, 0, 0])
    hot = masked_token_logprobs(policy, targets, guide, same, same, top_p=0.6, temperature=2.0)
    assert hot[0].item() == pytest.approx(-math.log(1 + math.sqrt(3)))  # square roots: 1 to sqrt 3; at T = 2 the nucleus is {0, 1} still


def test_without_a_mask_they_are_the_policys():
    states, targets, banned = torch.randn(5, 7), torch.tensor([0, 1, 2, 3, 4]), torch.tensor([False] * 6 + [True])
    head = torch.nn.Identity()
    found = masked_token_logprobs(states, targets, torch.randn(5, 7), head, head, top_p=1.0, temperature=0.7, banned=banned)
    torch.testing.assert_close(found, token_logprobs(states, targets, head, temperature=0.7, banned=banned))
