"""What every stage is worth on held-out posts: the exact gold reward, the reward model's score, KL to SFT, length and ROUGE."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from lit_rlhf.batch import Batch
from lit_rlhf.data.text import format_tldr
from lit_rlhf.data.tokenise import Encoder
from lit_rlhf.functional import k1
from lit_rlhf.generation import Sampling
from lit_rlhf.metrics import Rouge
from lit_rlhf.networks import CausalPolicy, ScalarModel
from lit_rlhf.quickstart.world import exact_pair, gold
from lit_rlhf.rollout import Actors, collect
from lit_rlhf.scoring import ModelScorer

STAGES = {"untrained": "init", "SFT": "sft/hf", "PPO": "ppo/hf/policy"}
FRESH_PAIRS = 1000
NOISE = 0x71  # key of the sampling noise, the same for all stages


@dataclass
class Summaries:
    """One stage's summaries of the held-out posts, and its numbers per post."""

    texts: list[str]
    gold: list[float]
    scores: list[float]
    kl: list[float]
    lengths: list[int]


class Judge:
    """What policies are worth on the held-out posts of the quickstart in `out`: one summary a post, by gold reward, reward model and KL.

    All are asked at the training temperature with the same noise, which depends on the seed.
    """

    def __init__(self, out: Path, sampling: Sampling, seed: int) -> None:
        rows = [json.loads(line) for line in (out / "data" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
        self.prompts = [format_tldr(row["subreddit"], row["title"], row["post"]) for row in rows]
        self.references = [row["summary"] for row in rows]
        self.scorer = ModelScorer(ScalarModel.load(str(out / "reward" / "hf")).eval())
        self.sft = CausalPolicy.load(str(out / STAGES["SFT"])).eval()
        self.sampling, self.seed = sampling, seed

    def batch(self) -> Batch:
        """The posts, tokenised, with the column "prompt"."""
        encoder = Encoder(self.sft.tokenizer)
        return Batch.of([encoder.prompt(ids) for ids in encoder.ids(self.prompts)], columns={"prompt": self.prompts})

    def __call__(self, policy: Any) -> Summaries:
        """Of a policy's directory, of a policy, or of what samples and gives log-probs as one."""
        policy = CausalPolicy.load(str(policy)) if isinstance(policy, Path) else policy
        with torch.no_grad():
            made = collect(Actors(policy.eval(), self.sft, None, self.scorer), self.batch(), self.sampling, key=(self.seed, NOISE))
        mask = made.batch.response_mask
        kl = (k1(made.logprobs, made.ref_logprobs) * mask).sum(1)
        return Summaries(made.texts, gold(self.prompts, made.texts), made.scores.tolist(), kl.tolist(), mask.sum(1).tolist())


def evaluate(out: Path, sampling: Sampling, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report's numbers, and one row per held-out post: its prompt, and a person's and each stage's summary with the gold reward."""
    judge = Judge(out, sampling, seed)
    prompts, references = judge.prompts, judge.references
    people = gold(prompts, references)
    made = {name: judge(out / where) for name, where in STAGES.items()}
    report = {
        "seed": seed,
        "posts": len(prompts),
        "stages": [stage_row(name, summaries, references) for name, summaries in made.items()],
        "people": {"gold": fmean(people)},
        "ppo_minus_sft": paired(made["PPO"].gold, made["SFT"].gold),
        "reward_accuracy": reward_accuracy(judge.scorer, seed),
    }
    shown = {"a person": (references, people)} | {name: (s.texts, s.gold) for name, s in made.items()}
    samples = [
        {"prompt": prompts[i], "summaries": {name: (texts[i], worth[i]) for name, (texts, worth) in shown.items()}}
        for i in range(len(prompts))
    ]
    return report, samples


def stage_row(name: str, made: Summaries, references: list[str]) -> dict[str, Any]:
    """One line of the stage table: means over the held-out posts."""
    rouge = Rouge()
    rouge.update(made.texts, references)
    found = {key: float(value) for key, value in rouge.compute().items() if key != "rouge_mean"}
    return {
        "name": name,
        "gold": fmean(made.gold),
        "gold_stderr": standard_error(made.gold),
        "score": fmean(made.scores),
        "kl": fmean(made.kl),
        "length": fmean(made.lengths),
        **found,
    }


def paired(after: list[float], before: list[float]) -> dict[str, float]:
    """The mean difference of two stages on the same posts, its standard error, and their ratio."""
    differences = [a - b for a, b in zip(after, before, strict=True)]
    gain, error = fmean(differences), standard_error(differences)
    return {"gold": gain, "gold_stderr": error, "standard_errors": gain / error if error else 0.0}


def standard_error(values: list[float]) -> float:
    """The standard error of the mean, with the unbiased variance; 0 for a single value."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def reward_accuracy(scorer: ModelScorer, seed: int) -> float:
    """The share of fresh pairs of people's summaries that the reward model orders as the gold reward does, equal gold left out."""
    rng = random.Random(f"{seed} fresh pairs")
    prompts, better, worse = map(list, zip(*(exact_pair(rng) for _ in range(FRESH_PAIRS)), strict=True))
    return float((scorer(prompts, better, {}) > scorer(prompts, worse, {})).float().mean())
