"""From scores to per-token rewards, advantages and returns."""

import torch
from torch import Tensor

from lit_rlhf.functional.kl import k1
from lit_rlhf.functional.masking import last_index


def token_rewards(logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """r_t = -kl_coef * (logprob_t - ref_logprob_t), plus the score on the last real token (the EOS of a finished response).

    Shapes: logprobs, ref_logprobs, mask (N, R), scores (N,); result (N, R) float32 in the units of the score, 0 outside the mask.
    Errors: ValueError for a row without any token.
    Source: Ziegler et al. 2019, eq. 1; the place of the score as in OpenRLHF (SFD ppo.py:684 puts it one past the EOS).
    """
    penalty = torch.where(mask, -kl_coef * k1(logprobs, ref_logprobs), 0.0)
    return penalty.scatter_add(1, last_index(mask).unsqueeze(1), scores.float().unsqueeze(1))


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates A_t and returns A_t + V_t, both constants (no gradient).

    delta_t = r_t + gamma * V_{t+1} - V_t ; A_t = delta_t + gamma * lam * A_{t+1} ; V and A after the last real token are 0.
    V_t is the value before token t is chosen. A gap inside a row is stepped over: t + 1 is the next token that counts.

    Shapes: rewards, values, mask (N, R); results (N, R) float32, 0 outside the mask; the returns are those of the unwhitened advantages.
    Source: Schulman et al. 2015, eq. 16 (arXiv:1506.02438).
    """
    rewards, values = rewards.float(), values.float()
    advantages = torch.zeros_like(rewards)
    running = next_value = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(mask[:, t], delta + gamma * lam * running, running)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(mask[:, t], running, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)
