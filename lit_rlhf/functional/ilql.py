"""ILQL: implicit Q-learning on language, from responses that were rewarded once and for all (Snell et al. 2022, arXiv:2206.11871)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_rlhf.functional.losses import Stats
from lit_rlhf.functional.masking import last_index, masked_mean


def ilql_loss(
    logprobs: Tensor,
    q: Tensor,
    target_q: Tensor,
    q_logprobs: Tensor,
    values: Tensor,
    rewards: Tensor,
    mask: Tensor,
    *,
    gamma: float = 0.99,
    tau: float = 0.7,
    cql_coef: float = 0.1,
    awac_coef: float = 1.0,
    awac_beta: float = 0.0,
    count: float | None = None,
) -> tuple[Tensor, Stats]:
    """sum_i (Q_i - y)^2 + expectile(Qbar - V) + cql_coef * sum_i -log softmax(Q_i)[a] + awac_coef * -exp(awac_beta (Qbar - V)) log p(a).

    Each is a mean over response tokens. y = r + gamma * V(next state), 0 after the last token; Qbar = min_i of the target heads; the
    expectile of u is tau u^2 where u >= 0 and (1 - tau) u^2 elsewhere. y, Qbar and the weight of the last term are constants.

    Shapes: logprobs, rewards, mask (N, R); q, target_q (heads, N, R) of the tokens taken; q_logprobs (heads, N, R), log softmax over the
    vocabulary of each head's Q, at the tokens taken; values (N, R + 1). Units of the reward; log-probs in nats. count: tokens.
    stats: loss, q_loss, value_loss, cql_loss, awac_loss; q_mean, value_mean, advantage_mean (Qbar - V).
    Source: trlX, modeling_ilql.py (CarperAI/trlx @ 3340c2f); awac_beta is its `beta`, 0 by default, so that the last term is the plain
    language-model loss.
    """
    taken = torch.where(mask, target_q.detach().float(), 0.0).amin(0)
    v = torch.where(mask, values[:, :-1].float(), 0.0)
    follows = F.pad(mask[:, 1:], (0, 1))  # a token comes after this one
    goal = rewards.float() + gamma * torch.where(follows, F.pad(values[:, 1:-1].detach().float(), (0, 1)), 0.0)
    u = taken - v
    weight = torch.where(mask, (awac_beta * u.detach()).exp(), 0.0)
    parts = {
        "q_loss": sum((masked_mean((head.float() - goal).square(), mask, count=count) for head in q), rewards.new_zeros(())),
        "value_loss": masked_mean(torch.where(u >= 0, tau, 1 - tau) * u.square(), mask, count=count),
        "cql_loss": sum((-masked_mean(head, mask, count=count) for head in q_logprobs), rewards.new_zeros(())),
        "awac_loss": -masked_mean(weight * torch.where(mask, logprobs.float(), 0.0), mask, count=count),
    }
    loss = parts["q_loss"] + parts["value_loss"] + cql_coef * parts["cql_loss"] + awac_coef * parts["awac_loss"]
    means = {"q_mean": q.detach().float().mean(0), "value_mean": v.detach(), "advantage_mean": u.detach()}
    stats = {"loss": loss} | parts | {name: masked_mean(x, mask, count=count) for name, x in means.items()}
    return loss, {name: x.detach() for name, x in stats.items()}


def last_token_rewards(scores: Tensor, mask: Tensor) -> Tensor:
    """Each response's score on its last token and 0 on the others. Shapes: (N,), mask (N, R); result (N, R) float32."""
    rewards = torch.zeros(mask.shape, device=mask.device)
    return rewards.scatter(1, last_index(mask)[:, None], scores.float()[:, None])


def move_towards(target: Tensor, source: Tensor, alpha: float) -> None:
    """target <- alpha * source + (1 - alpha) * target, in place (Polyak averaging)."""
    with torch.no_grad():
        target.lerp_(source.to(target.dtype), alpha)
