"""REINFORCE, RLOO and GRPO: advantages of whole responses from the other responses to the same prompt, without a value network."""

from typing import Literal

import torch
from torch import Tensor

from lit_rlhf.functional.kl import k2
from lit_rlhf.functional.losses import Stats
from lit_rlhf.functional.masking import divisor

Ratio = Literal["sequence", "token"]


def leave_one_out(rewards: Tensor, size: int) -> Tensor:
    """A_i = r_i - the mean of the other rewards of its group: a baseline that does not depend on response i, so no bias.

    Shapes: rewards (N,), groups of `size` responses to one prompt after each other; result (N,) float32, units of the reward.
    Errors: ValueError for a size under 2 or an N that is no multiple of it.
    Source: Kool et al. 2019; Ahmadian et al. 2024, eq. 7 (arXiv:2402.14740).
    """
    groups = _groups(rewards, size)
    return ((groups * size - groups.sum(1, keepdim=True)) / (size - 1)).flatten()


def group_normalised(rewards: Tensor, size: int, *, epsilon: float = 1e-4) -> Tensor:
    """A_i = (r_i - the group's mean) / (the group's standard deviation + epsilon), GRPO's advantage; the standard deviation is unbiased.

    Shapes and errors: as leave_one_out; result in standard deviations.
    Source: Shao et al. 2024, 4.1.2 (arXiv:2402.03300), which names neither epsilon nor the estimator: both are TRL's.
    """
    groups = _groups(rewards, size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + epsilon)).flatten()


def rloo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ratio: Ratio = "sequence",
    clip: float = 0.2,
    count: float | None = None,
) -> tuple[Tensor, Stats]:
    """The mean over responses of max(-A rho, -A clamp(rho, 1 - clip, 1 + clip)), rho the ratio of the whole response's probabilities.

    At rho = 1 (the first step on an experience) its gradient is that of REINFORCE, -A sum_t log p_t. With ratio="token" there is a ratio
    for every token and the mean over a response's tokens is taken first, as in GRPO.

    Shapes: logprobs, old_logprobs and mask (N, R), nats at the sampling temperature; advantages (N,); the last two are constants.
    count: responses. Every row needs a token.
    Source: sequence: Ahmadian et al. 2024, eq. 6, with the clip of TRL 1.16's RLOOTrainer; token: Shao et al. 2024, eq. 3.
    stats: policy_loss; clip_fraction (where the clipped term is the larger); approx_kl (k2 of log rho); ratio_mean, all means over
        responses as the loss; ratio_max_dev (the largest |rho - 1|, a maximum).
    """
    log_ratio = torch.where(mask, logprobs.float() - old_logprobs.detach().float(), 0.0)
    weight = mask.float()
    if ratio == "sequence":
        log_ratio, weight = log_ratio.sum(1, keepdim=True), torch.ones_like(log_ratio[:, :1])
    weight = weight / weight.sum(1, keepdim=True) / divisor(len(advantages), count)
    rho, a = log_ratio.exp(), advantages.detach().float()[:, None]
    plain, clipped = -a * rho, -a * rho.clamp(1 - clip, 1 + clip)
    loss = (weight * torch.maximum(plain, clipped)).sum()
    rho, log_ratio = rho.detach(), log_ratio.detach()
    return loss, {
        "policy_loss": loss.detach(),
        "clip_fraction": (weight * (clipped.detach() > plain.detach())).sum(),
        "approx_kl": (weight * k2(log_ratio, torch.zeros_like(log_ratio))).sum(),
        "ratio_mean": (weight * rho).sum(),
        "ratio_max_dev": (rho - 1).abs().max() if rho.numel() else loss.new_zeros(()),
    }


def _groups(rewards: Tensor, size: int) -> Tensor:
    """(N,) -> (N / size, size)."""
    if size < 2 or len(rewards) % size:
        raise ValueError(f"{len(rewards)} rewards in groups of {size}: a group needs at least 2 responses, and all groups equally many")
    return rewards.float().view(-1, size)
