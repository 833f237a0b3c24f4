"""The losses. Each returns (loss, stats): a float32 scalar to minimise, and detached float32 scalars to log.

`count` is the divisor of the loss: the number of tokens, pairs or prompts of the whole optimiser step over all its micro-batches and
ranks. Losses of the micro-batches then add up to the loss of the step, however it is split, and so do the stats, which are means with
the same divisor (a name with `max` in it is a maximum instead). `count=None` takes the local number and raises ValueError when it is 0.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_rlhf.functional.kl import k2
from lit_rlhf.functional.masking import divisor, last_index, masked_mean, through_first

Stats = dict[str, Tensor]


def lm_loss(logprobs: Tensor, mask: Tensor, *, count: float | None = None) -> tuple[Tensor, Stats]:
    """-sum(logprobs over the mask) / count: the negative log-likelihood per token that counts.

    Shapes: logprobs, mask (N, R), or any that are equal; nats. count: tokens.
    stats: loss.
    """
    loss = -masked_mean(logprobs, mask, count=count)
    return loss, {"loss": loss.detach()}


def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    target: Tensor | None = None,
    center_coef: float = 0.0,
    weight: Tensor | None = None,
    count: float | None = None,
) -> tuple[Tensor, Stats]:
    """-[t log sigmoid(d) + (1 - t) log sigmoid(-d)] + center_coef * (chosen + rejected)^2 with d = chosen - rejected - margin.

    Shapes: all (Q,); scores in the model's units. count: pairs.
    margin: what the chosen score must be ahead by (Llama 2, arXiv:2307.09288 eq. 2); None = 0.
    target: t, the probability that `chosen` is the preferred one, .5 for a tie; None = 1 (Bradley-Terry; Stiennon et al. 2020, sec. 3.4).
    center_coef: pulls the scores towards a mean of 0 (Eisenstein et al. 2023, arXiv:2312.09244). weight: of each pair, in loss and stats.
    stats: loss; accuracy (the preferred one scores strictly higher, a tie of scores is wrong; where t < .5 the preferred one is
        `rejected`, where t = .5 it counts as `chosen`); margin (chosen - rejected); chosen_score; rejected_score.
    """
    chosen, rejected = chosen.float(), rejected.float()
    difference = chosen - rejected
    d = difference if margin is None else difference - margin.float()
    per_pair = -F.logsigmoid(d)
    right = difference > 0
    if target is not None:
        t = target.float()
        per_pair = -(t * F.logsigmoid(d) + (1 - t) * F.logsigmoid(-d))
        right = torch.where(t < 0.5, difference < 0, right)
    per_pair = per_pair + center_coef * (chosen + rejected).square()
    n = divisor(len(chosen), count)
    w = torch.ones_like(chosen) if weight is None else weight.float()
    loss = (w * per_pair).sum() / n
    logged = {"loss": per_pair, "accuracy": right, "margin": difference, "chosen_score": chosen, "rejected_score": rejected}
    return loss, {name: (w * x.detach()).sum() / n for name, x in logged.items()}


def ranking_loss(
    scores: Tensor,
    pairs: Tensor,
    prompt_of: Tensor,
    *,
    margin: Tensor | None = None,
    target: Tensor | None = None,
    center_coef: float = 0.0,
    count: float | None = None,
) -> tuple[Tensor, Stats]:
    """pairwise_loss averaged over the pairs of one prompt, then over prompts: a prompt with K responses weighs as much as one with 2.

    Shapes: scores (N,), pairs (Q, 2) int64 rows of `scores` (preferred, other), prompt_of (N,) int64, margin and target (Q,).
    count: prompts that have pairs. All pairs of a prompt must stand in one micro-batch.
    stats: as pairwise_loss, averaged the same way.
    Errors: ValueError for a pair across two prompts. Source: Ouyang et al. 2022, eq. 1 (arXiv:2203.02155).
    """
    prompts = prompt_of[pairs]
    if bool((prompts[:, 0] != prompts[:, 1]).any()):
        q = int((prompts[:, 0] != prompts[:, 1]).nonzero()[0])
        raise ValueError(f"pair {q} compares responses {pairs[q].tolist()} of two prompts, {prompts[q].tolist()}; pairs need one prompt")
    _, which, sizes = torch.unique(prompts[:, 0], return_inverse=True, return_counts=True)
    return pairwise_loss(
        scores[pairs[:, 0]],
        scores[pairs[:, 1]],
        margin=margin,
        target=target,
        center_coef=center_coef,
        weight=1.0 / sizes[which].float(),
        count=divisor(len(sizes), count),
    )


def _hold_last(scores: Tensor, last: Tensor) -> Tensor:
    """Each row's scores, with the last real one repeated after it. Shapes: (Q, R), (Q,) -> (Q, R)."""
    positions = torch.arange(scores.shape[1], device=scores.device)
    return scores.float().gather(1, torch.minimum(positions, last.unsqueeze(1)))


def pairwise_token_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_ids: Tensor,
    rejected_ids: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    count: float | None = None,
) -> tuple[Tensor, Stats]:
    """The mean over t = first..end of -log sigmoid(chosen_t - rejected_t), then the mean over pairs.

    first: the first token in which the two responses differ; end: the last real token of the longer one. A response that has ended goes
    on with the score of its own last token, so the term at `end` compares the two scores that are read at inference. trlX
    (reward_model.py of its summarize example) reads the shorter response inside its padding instead, and leaves out the EOS (issue #442).
    Two equal responses give log 2 and no gradient.

    Shapes: all (Q, R); scores are those of the states after each response token; masks are True through the last token of each row.
    count: pairs. stats: as pairwise_loss, of each row's own last score.
    Errors: ValueError for a row without any token.
    """
    positions = torch.arange(chosen.shape[1], device=chosen.device)
    chosen_last, rejected_last = last_index(chosen_mask), last_index(rejected_mask)
    end = torch.maximum(chosen_last, rejected_last)
    differs = (chosen_ids != rejected_ids) | (chosen_mask != rejected_mask)
    first = torch.minimum(through_first(differs).sum(-1) - 1, end)
    counts = (positions >= first.unsqueeze(1)) & (positions <= end.unsqueeze(1))
    chosen, rejected = _hold_last(chosen, chosen_last), _hold_last(rejected, rejected_last)
    per_pair = (-F.logsigmoid(chosen - rejected) * counts).sum(-1) / counts.sum(-1)
    loss = per_pair.sum() / divisor(len(per_pair), count)
    _, stats = pairwise_loss(chosen[:, -1].detach(), rejected[:, -1].detach(), count=count)
    return loss, stats | {"loss": loss.detach()}


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip: float = 0.2, count: float | None = None
) -> tuple[Tensor, Stats]:
    """PPO's clipped objective: the masked mean of max(-A rho, -A clamp(rho, 1 - clip, 1 + clip)), rho = exp(logprobs - old_logprobs).

    Shapes: all (N, R); log-probs in nats, of the sampled tokens at the sampling temperature; old_logprobs and advantages are constants.
    count: tokens. Source: Schulman et al. 2017, eq. 7 (arXiv:1707.06347).
    stats: policy_loss; clip_fraction (tokens where the clipped term is the larger); approx_kl (k2, masked); ratio_mean; ratio_max_dev
        (the largest |rho - 1|, a maximum).
    """
    log_ratio = torch.where(mask, logprobs.float() - old_logprobs.detach().float(), 0.0)
    ratio = log_ratio.exp()
    a = advantages.detach().float()
    plain, clipped = -a * ratio, -a * ratio.clamp(1 - clip, 1 + clip)
    loss = masked_mean(torch.maximum(plain, clipped), mask, count=count)
    ratio, log_ratio = ratio.detach(), log_ratio.detach()
    deviation = (ratio - 1).abs()
    return loss, {
        "policy_loss": loss.detach(),
        "clip_fraction": masked_mean(clipped.detach() > plain.detach(), mask, count=count),
        "approx_kl": masked_mean(k2(log_ratio, torch.zeros_like(log_ratio)), mask, count=count),
        "ratio_mean": masked_mean(ratio, mask, count=count),
        "ratio_max_dev": deviation.max() if deviation.numel() else loss.new_zeros(()),
    }


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = 0.2, count: float | None = None
) -> tuple[Tensor, Stats]:
    """0.5 * the masked mean of max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2); clip=None leaves the first term alone.

    Shapes: all (N, R); units of the score; old_values and returns are constants. count: tokens.
    Source: Ziegler et al. 2019's code (lm-human-preferences, train_policy.py), after OpenAI baselines' ppo2.
    stats: value_loss; value_clip_fraction (tokens where the clipped term is the larger); value_mean; return_mean.
    """
    values, old, returns = (torch.where(mask, x.float(), 0.0) for x in (values, old_values.detach(), returns.detach()))
    plain = clipped = (values - returns).square()
    if clip is not None:
        clipped = (old + (values - old).clamp(-clip, clip) - returns).square()
    loss = 0.5 * masked_mean(torch.maximum(plain, clipped), mask, count=count)
    return loss, {
        "value_loss": loss.detach(),
        "value_clip_fraction": masked_mean(clipped.detach() > plain.detach(), mask, count=count),
        "value_mean": masked_mean(values.detach(), mask, count=count),
        "return_mean": masked_mean(returns, mask, count=count),
    }
