"""The losses and stats of the micro-batches of one step, each divided by the step's count, add up to those of the whole batch."""

import pytest
import torch

from lit_rlhf.functional import dpo_loss, lm_loss, pairwise_loss, pairwise_token_loss, policy_loss, ranking_loss, rloo_loss, value_loss

N, R = 12, 7
SPLITS = [[12], [1, 11], [6, 6], [3, 4, 5], [1] * 12]


def draw(seed):
    return torch.randn(N, R, generator=torch.Generator().manual_seed(seed))


LENGTHS = torch.tensor([1, 7, 3, 5, 2, 7, 1, 1, 4, 6, 7, 2])
MASK = torch.arange(R) < LENGTHS.unsqueeze(1)
OTHER_MASK = MASK.flip(0)
TOKENS = float(MASK.sum())
IDS = torch.arange(N * R).reshape(N, R) % 3
OTHER, CONST = draw(1), draw(2)


def ranking(x, i, count):
    prompt_of = torch.arange(len(x)).repeat_interleave(3)
    pairs = torch.cat([torch.tensor([[3 * m, 3 * m + 1], [3 * m + 1, 3 * m + 2]]) for m in range(len(x))])
    return ranking_loss(x[:, :3].flatten(), pairs, prompt_of, center_coef=0.1, count=count)


CASES = {
    "lm": (TOKENS, lambda x, i, n: lm_loss(x, MASK[i], count=n)),
    "policy": (TOKENS, lambda x, i, n: policy_loss(x, OTHER[i], CONST[i], MASK[i], count=n)),
    "rloo": (N, lambda x, i, n: rloo_loss(x, OTHER[i], CONST[i, 0], MASK[i], count=n)),
    "rloo, token": (N, lambda x, i, n: rloo_loss(x, OTHER[i], CONST[i, 0], MASK[i], ratio="token", count=n)),
    "value": (TOKENS, lambda x, i, n: value_loss(x, OTHER[i], CONST[i], MASK[i], count=n)),
    "pairwise": (N, lambda x, i, n: pairwise_loss(x[:, 0], OTHER[i, 0], target=CONST[i, 0].sigmoid(), center_coef=0.1, count=n)),
    "ranking": (N, ranking),
    "dpo": (N, lambda x, i, n: dpo_loss(x[:, 0], OTHER[i, 0], target=CONST[i, 0].sigmoid(), label_smoothing=0.1, count=n)),
    "ipo": (N, lambda x, i, n: dpo_loss(x[:, 0], OTHER[i, 0], kind="ipo", margin=CONST[i, 0], count=n)),
    "token": (N, lambda x, i, n: pairwise_token_loss(x, OTHER[i], IDS[i], IDS.flip(0)[i], MASK[i], OTHER_MASK[i], count=n)),
}


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_any_split_adds_up(name, split):
    count, function = CASES[name]
    x = draw(0).requires_grad_()
    loss, stats = function(x, slice(None), None)  # the local count of the whole batch is the step's
    loss.backward()
    whole, x.grad = x.grad, None
    total, sums, largest, at = 0.0, dict.fromkeys(stats, 0.0), dict.fromkeys(stats, 0.0), 0
    for size in split:
        rows = slice(at, at + size)
        part, part_stats = function(x[rows], rows, count)
        part.backward()
        total, at = total + part.detach(), at + size
        for key, value in part_stats.items():
            sums[key] += value.item()
            largest[key] = max(largest[key], value.item())
    torch.testing.assert_close(total, loss.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(x.grad, whole, rtol=1e-6, atol=1e-7)
    for key, value in stats.items():
        assert (largest if "max" in key else sums)[key] == pytest.approx(value.item(), rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", CASES)
def test_loss_and_stats_are_float32_scalars_and_the_stats_detached(name):
    loss, stats = CASES[name][1](draw(0).bfloat16().requires_grad_(), slice(None), None)
    assert loss.dtype == torch.float32 and loss.ndim == 0 and loss.requires_grad
    for key, value in stats.items():
        assert value.dtype == torch.float32 and value.ndim == 0 and not value.requires_grad, key
