"""collect(): prompts -> Experience. All of PPO that needs no gradient.

Each rank samples and scores its own prompts; then the ranks exchange what they made, so that every rank holds the whole experience and
whitening, KL and minibatches are global without another word. (The experience is ids and floats per token: megabytes.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_rlhf.batch import Batch, Experience, join, pad_cat
from lit_rlhf.data.text import tidy_response
from lit_rlhf.decoding import can_share_rows, like_lengths
from lit_rlhf.functional import gae, k1, masked_mean, token_rewards, whiten
from lit_rlhf.generation import Sampling, sample
from lit_rlhf.networks import CausalPolicy, ScalarModel, in_parts
from lit_rlhf.perf import Clock
from lit_rlhf.sharding import most

T = TypeVar("T")
CACHED_FORWARDS = 8
"""Sampling holds the keys and values of as many tokens as this many forward passes may hold."""


@dataclass
class Actors:
    """The four networks of PPO; `reference` is None where it is the policy with its adapter off."""

    policy: CausalPolicy
    reference: CausalPolicy | None
    value: ScalarModel | None
    scorer: nn.Module

    def ref_logprobs(self, batch: Batch, temperature: float) -> Tensor:
        network, adapter = (self.policy, False) if self.reference is None else (self.reference, True)
        return network(batch, temperature=temperature, ban=True, adapter=adapter)[0]


@dataclass
class Rollout:
    """Responses and what the networks say of them; (N,) or (N, R), on the CPU."""

    batch: Batch
    texts: list[str]
    finished: Tensor
    """(N,) bool: ended by EOS or a stop string."""
    logprobs: Tensor
    sampled_logprobs: Tensor
    """(N, R) nats, as seen while sampling."""
    ref_logprobs: Tensor
    values: Tensor
    entropy: Tensor
    scores: Tensor
    """(N,) the scorer's, minus the reference's score where that is the baseline."""


@dataclass(frozen=True)
class Shaping:
    """How scores become rewards and advantages.

    Args:
        no_eos_score: replaces the score of a response that did not end (None: leave it).
        score_clip: scores are cut to +-score_clip, before any scaling (trlX's order).
        whiten_rewards: whiten the rewards, keeping their mean. whiten_advantages: whiten the advantages.
        gamma, lam: GAE's discount and decay.
    """

    no_eos_score: float | None = None
    score_clip: float | None = None
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    gamma: float = 1.0
    lam: float = 0.95


@torch.no_grad()
def collect(
    actors: Actors,
    prompts: Batch,
    sampling: Sampling,
    *,
    num_responses: int = 1,
    key: Sequence[int] = (0,),
    rows: Sequence[int] | None = None,
    subtract_reference: bool = False,
    tokens_per_forward: int = 16384,
    clock: Clock | None = None,
) -> Rollout:
    """Samples responses for this rank's prompts and runs every network on them.

    Args:
        rows: the prompts' global numbers (the noise depends on them); default those of the batch.
        subtract_reference: score minus the score of the prompt's own reference response (column "reference").
        tokens_per_forward: how many tokens one forward pass may hold; sampling may hold the keys and values of 8 times as many.
        clock: is told where sampling and where scoring begin.
    """
    clock = clock or Clock()
    rows = list((prompts.rows or range(prompts.num_prompts)) if rows is None else rows)
    device = next(actors.policy.parameters()).device
    groups, parts = _groups(actors.policy, prompts, num_responses, sampling, CACHED_FORWARDS * tokens_per_forward), []
    clock.begin("sampling")
    for turn in range(most(actors.policy, len(groups))):
        index = groups[turn] if turn < len(groups) else groups[0][:1]  # keeps step with the ranks that have more groups
        part = prompts.select_prompts(index).to(device)
        parts.append(sample(actors.policy, part, sampling, num_responses=num_responses, key=key, rows=[rows[i] for i in index]))
    clock.begin("scoring")
    temperature = sampling.temperature or 1.0
    rollouts = []
    for sampled in parts:
        batch, mask = sampled.batch, sampled.batch.response_mask
        logprobs = in_parts(actors.policy, batch, tokens_per_forward, lambda b: actors.policy(b, temperature=temperature, ban=True)[0])
        ref = in_parts(actors.reference or actors.policy, batch, tokens_per_forward, lambda b: actors.ref_logprobs(b, temperature))
        values = torch.zeros_like(ref) if actors.value is None else in_parts(actors.value, batch, tokens_per_forward)[:, :-1] * mask
        made = (sampled.finished, logprobs, sampled.logprobs, ref, values, sampled.entropy * mask, logprobs.new_zeros(len(mask)))
        rollouts.append(Rollout(batch.to("cpu"), sampled.texts, *(x.float().cpu() if x.is_floating_point() else x.cpu() for x in made)))
    rollout = in_order(join_rollouts(rollouts[: len(groups)]), [m for group in groups for m in group])
    # Last and once: a reward that raises on one rank leaves no other rank waiting in a network's forward.
    rollout.scores = score_texts(actors.scorer, rollout.batch, rollout.texts, subtract_reference).float().cpu()
    clock.begin()
    return rollout


def score_texts(scorer: nn.Module, batch: Batch, texts: list[str], subtract_reference: bool = False) -> Tensor:
    """The scorer's scores (N,) of response texts, minus the references' where asked.

    Raises ValueError where a reference is asked for and the data has none.
    """
    prompts, columns = batch.column("prompt"), {name: batch.column(name) for name in batch.columns if name != "prompt"}
    scores = scorer(prompts, texts, columns)
    if not subtract_reference:
        return scores
    references = columns.get("reference")
    if references is None or any(r is None for r in references):
        raise ValueError(
            "reward_baseline is 'reference', but the prompts have no reference; give data with a label, or use reward_baseline: mean"
        )
    texts = [
        tidy_response(r) if p.endswith("TL;DR:") else r for p, r in zip(prompts, references, strict=True)
    ]  # as reward training reads them
    return scores - scorer(prompts, texts, columns)


def _groups(policy: CausalPolicy, prompts: Batch, num_responses: int, sampling: Sampling, budget: int) -> list[list[int]]:
    """The prompts in groups of like length whose sampling holds at most `budget` tokens; one group, in order, wherever that suffices."""
    copies = 1 if can_share_rows(policy) else num_responses
    held = [copies * n + num_responses * sampling.max_new_tokens for n in prompts.prompt_mask.sum(1).tolist()]
    return [list(range(len(held)))] if max(held) * len(held) <= budget else like_lengths(held, budget)


def in_order(rollout: Rollout, prompts: Sequence[int]) -> Rollout:
    """The rollout with its prompts, which are numbered so, in ascending order."""
    if list(prompts) == sorted(prompts):
        return rollout
    order = torch.tensor(prompts).argsort()
    rows = torch.tensor(prompts)[rollout.batch.prompt_of].argsort(stable=True)
    place = torch.tensor(prompts)[rollout.batch.prompt_of[rows]]
    batch = rollout.batch.select_prompts(order).with_responses(rollout.batch.response_ids[rows], rollout.batch.response_mask[rows], place)
    picked = {f.name: getattr(rollout, f.name)[rows] for f in fields(Rollout) if f.name not in ("batch", "texts")}
    return Rollout(batch, [rollout.texts[n] for n in rows.tolist()], **picked)


def join_rollouts(rollouts: Sequence[Rollout]) -> Rollout:
    """One rollout of all, in order."""
    joined = {f.name: [getattr(r, f.name) for r in rollouts] for f in fields(Rollout)}
    texts = [t for part in joined.pop("texts") for t in part]
    return Rollout(join(joined.pop("batch")), texts, **{name: pad_cat(parts) for name, parts in joined.items()})


def agree(make: Callable[[], T]) -> T:
    """What this rank makes; what one rank raises, all raise: the others would wait for it until a time-out."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return make()
    failure, cause = None, None
    try:
        made = make()
    except Exception as error:
        failure, cause = f"on rank {dist.get_rank()}: {type(error).__name__}: {error}", error
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    if any(failures):
        raise RuntimeError(next(f for f in failures if f)) from cause
    return made


def gather_parts(make: Callable[[], T]) -> list[T]:
    """What every rank makes, in the order of ranks, on every rank; errors as in `agree`."""
    made = agree(make)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [made]
    parts = [made] * dist.get_world_size()
    dist.all_gather_object(parts, made)
    return parts


def gather(make: Callable[[], Rollout]) -> Rollout:
    """Every rank's rollout, made by `make` and joined in the order of ranks, on every rank; errors as in `agree`."""
    parts = gather_parts(make)
    return parts[0] if len(parts) == 1 else join_rollouts(parts)


def shape(
    rollout: Rollout, kl_coef: float, shaping: Shaping, scale: Callable[[Tensor], Tensor] | None = None, *, center_values: bool = False
) -> tuple[Experience, dict[str, Tensor]]:
    """Scores and KL -> rewards -> advantages and returns, and the iteration's statistics.

    Args:
        scale: divides clipped scores, e.g. by their running standard deviation.
        center_values: first subtracts from all values how much their mean lies above that of the rewards still to come; the statistics
            say it as `value_offset`.
    """
    batch, mask = rollout.batch, rollout.batch.response_mask
    scores = shaped_scores(rollout, shaping)
    if scale is not None:
        scores = scale(scores)
    rewards = token_rewards(rollout.logprobs, rollout.ref_logprobs, scores, mask, kl_coef=kl_coef)
    if shaping.whiten_rewards:
        rewards = whiten(rewards, mask, keep_mean=True)
    offset = torch.tensor(0.0)
    if center_values:
        to_come = gae(rewards, torch.zeros_like(rewards), mask, gamma=shaping.gamma, lam=1.0)[1]
        offset = masked_mean(rollout.values - to_come, mask)
        rollout = replace(rollout, values=(rollout.values - offset) * mask)
    advantages, returns = gae(rewards, rollout.values, mask, gamma=shaping.gamma, lam=shaping.lam)
    raw = advantages
    if shaping.whiten_advantages:
        advantages = whiten(advantages, mask)
    experience = Experience(batch, rollout.logprobs, rollout.ref_logprobs, rollout.values, scores, rewards, advantages, returns)
    residual, spread = (returns - rollout.values)[mask], returns[mask].var(unbiased=False).clamp(min=1e-8)
    return experience, statistics(rollout, scores, rewards) | {
        "value": masked_mean(rollout.values, mask),
        "value_offset": offset,
        "advantage_std": raw[mask].std(unbiased=False),
        "explained_variance": 1 - residual.var(unbiased=False) / spread,
    }


def shaped_scores(rollout: Rollout, shaping: Shaping) -> Tensor:
    """The scores (N,) with that of responses that did not end replaced, then clipped."""
    scores = rollout.scores
    if shaping.no_eos_score is not None:
        scores = torch.where(rollout.finished, scores, torch.full_like(scores, shaping.no_eos_score))
    return scores if shaping.score_clip is None else scores.clamp(-shaping.score_clip, shaping.score_clip)


def statistics(rollout: Rollout, scores: Tensor, rewards: Tensor) -> dict[str, Tensor]:
    """The iteration's numbers that need no value network, of its shaped scores (N,) and rewards (N, R); formulas: tutorials/metrics.md."""
    mask = rollout.batch.response_mask
    kl = (k1(rollout.logprobs, rollout.ref_logprobs) * mask).sum(1)
    return {
        "score": rollout.scores.mean(),
        "score_std": rollout.scores.std(unbiased=False),
        "shaped_score": scores.mean(),
        "kl": kl.mean(),
        "reward": rewards.sum(1).mean(),
        "length": mask.sum(1).float().mean(),
        "eos_rate": rollout.finished.float().mean(),
        "entropy": masked_mean(rollout.entropy, mask),
        "sampling_gap_max": ((rollout.logprobs - rollout.sampled_logprobs) * mask).abs().max(),
    }


class RunningMoments:
    """Running mean and variance of the scores (Chan et al.'s update); called with scores it takes them in and divides them by the std."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0

    def __call__(self, scores: Tensor) -> Tensor:
        n, mean = float(len(scores)), float(scores.mean())
        delta, total = mean - self.mean, self.count + n
        self.squares += float((scores - mean).square().sum()) + delta**2 * self.count * n / total
        self.mean, self.count = self.mean + delta * n / total, total
        return scores / max(self.std, 1e-8)

    @property
    def std(self) -> float:
        return (self.squares / self.count) ** 0.5 if self.count else 1.0
