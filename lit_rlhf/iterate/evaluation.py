"""What a round brought: its reward models on pairs that none of them learnt from, and its policy on the validation prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lit_rlhf.functional import grouped_mean, grouped_share, k1
from lit_rlhf.functional.statistics import Estimate
from lit_rlhf.iterate.fits import rewarded
from lit_rlhf.iterate.rounds import Round, Row, read_rows
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.rollout import Actors, collect, score_texts
from lit_rlhf.scorers import load_scorer

NOISE = 0x4959  # key of the sampling noise, the same for every policy
NUMBERS = ("score", "gold", "kl", "length")


def hits(rewards: Sequence[str], rows: Sequence[Row], device: Any = "cpu") -> list[bool]:
    """Whether the mean score of the reward models orders each labelled pair as its label does; ties of scores are wrong.

    Pairs without a label, or with a label of 0.5, are left out.
    """
    known = [row for row in rows if row["preferred"] is not None and row["preferred"] != 0.5]
    if not known:
        return []
    prompts, margin = [row["prompt"] for row in known], torch.zeros(len(known), dtype=torch.double)
    for where in rewards:
        scorer = load_scorer(where).to(device)
        first, second = (scorer(prompts, [row[side] for row in known], {}).double().cpu() for side in ("first", "second"))
        margin += first - second
    sign = torch.tensor([1.0 if row["preferred"] > 0.5 else -1.0 for row in known], dtype=torch.double)
    return (margin * sign > 0).tolist()


def tested(now: Round) -> list[Row]:
    """The round's labelled pairs that no reward model learns from."""
    return [row for row in read_rows(now.labels) if row["held_out"]]


@torch.no_grad()
def measure(run: Any, where: str, sft: CausalPolicy, reward: Any, gold: Any, key: Sequence[int]) -> dict[str, list[float]]:
    """One response of the policy in `where` to each validation prompt: score, gold (where there is one), KL from SFT in nats, length."""
    module, device = run.model, run.trainer.strategy.root_device
    policy = CausalPolicy.load(where, tokenizer=module.tokenizer, **module.loading, **module.source).eval().to(device)
    scorer, exact = load_scorer(reward).to(device), None if gold is None else load_scorer(gold).to(device)
    found: dict[str, list[float]] = {name: [] for name in NUMBERS if exact is not None or name != "gold"}
    first = 0
    for batch in run.datamodule.val_dataloader():
        rows = list(range(first, first := first + batch.num_prompts))
        with run.trainer.precision_plugin.forward_context():
            made = collect(Actors(policy, sft, None, scorer), batch.to(device), module.sampling, key=(*key, NOISE), rows=rows)
        mask = made.batch.response_mask
        found["score"] += made.scores.tolist()
        found["kl"] += (k1(made.logprobs, made.ref_logprobs) * mask).sum(1).tolist()
        found["length"] += mask.sum(1).double().tolist()
        if exact is not None:
            found["gold"] += score_texts(exact, made.batch, made.texts).tolist()
    return found


def evaluate(run: Any, now: Round, options: Any) -> dict[str, Any]:
    """The round's numbers, as they stand in evaluation.json: hits by the round that the pairs are of, and lists of a number a prompt.

    `before` are the hits of the round before's reward models on this round's pairs; policies are measured only where there are validation
    prompts.
    """
    device = run.trainer.strategy.root_device
    rewards = [str(now.reward(member) / "hf") for member in range(options.members)]
    earlier = [] if now.before is None else [str(now.before.reward(member) / "hf") for member in range(options.members)]
    found: dict[str, Any] = {
        "after": {str(known.number): hits(rewards, tested(known), device) for known in now.so_far},
        "before": hits(earlier, tested(now), device) if earlier else [],
        "policies": {},
    }
    if "val" in run.datamodule.tables:
        module = run.model
        sft = CausalPolicy.load(options.sft, tokenizer=module.tokenizer, **module.loading, **module.source).eval().to(device)
        policies = {"SFT": options.sft, "PPO": str(now.ppo / "hf" / "policy")}
        key = (options.seed,)
        reward = rewarded(options, now)
        found["policies"] = {name: measure(run, where, sft, reward, options.gold, key) for name, where in policies.items()}
    return found


@dataclass
class Gain:
    """PPO against SFT on the same prompts."""

    kl: Estimate
    length: Estimate
    score: Estimate
    """PPO's minus SFT's, by what PPO learnt from."""
    gold: Estimate | None
    sft_gold: Estimate | None
    gold_gain: Estimate | None


def gain(policies: Mapping[str, Mapping[str, list[float]]]) -> Gain | None:
    """None where nothing was measured."""
    if not policies:
        return None
    sft, ppo = ({name: torch.tensor(values) for name, values in policies[who].items()} for who in ("SFT", "PPO"))
    golds = [grouped_mean(x) for x in (ppo["gold"], sft["gold"], ppo["gold"] - sft["gold"])] if "gold" in ppo else [None] * 3
    return Gain(grouped_mean(ppo["kl"]), grouped_mean(ppo["length"]), grouped_mean(ppo["score"] - sft["score"]), *golds)


def share(found: Sequence[bool]) -> Estimate | None:
    """The share of hits with its interval; None for no pairs."""
    return grouped_share(torch.tensor(found)) if found else None


def preferred_rates(rows: Sequence[Row]) -> dict[str, Estimate]:
    """For each policy how often its response was preferred to one of another policy, ties as a half.

    Pairs of two responses of one policy, and pairs without a label, are left out.
    """
    won: dict[str, list[float]] = {}
    for row in rows:
        one, other = row["policies"]
        if row["preferred"] is not None and one != other:
            won.setdefault(one, []).append(row["preferred"])
            won.setdefault(other, []).append(1 - row["preferred"])
    return {name: grouped_mean(torch.tensor(values)) for name, values in sorted(won.items())}
