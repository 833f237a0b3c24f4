"""The quickstart's report: the stage table, the training curves and summaries side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_rlhf.data.text import split_post
from lit_rlhf.functional.statistics import Estimate
from lit_rlhf.report import Answer, Plot, Report, Sample, Samples, Table, Text, lines, smoothed
from lit_rlhf.report.figures import Points
from lit_rlhf.report.tensorboard import read_curves

SHOWN_POSTS = 12
Z = 1.96
COLUMNS = {
    "gold": "gold reward",
    "score": "reward model's score",
    "kl": "KL to SFT (nats)",
    "length": "length (tokens)",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}
DIGITS = {COLUMNS[name]: digits for name, digits in {"gold": 2, "score": 2, "kl": 2, "length": 1}.items()}


def make_report(numbers: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], logs: Path) -> Report:
    """The report of `evaluate`'s numbers and samples, with the curves of the TensorBoard files below `logs`."""
    lead = f"Seed {numbers['seed']}, {numbers['posts']} held-out posts, {numbers['seconds']['total']:.0f} seconds in all."
    report = Report("lit_rlhf quickstart", lead, data=dict(numbers))
    report.add("Stages", Text(_verdict(numbers)), _stages(numbers))
    report.add("Training", *curves({stage: read_curves(logs / stage) for stage in ("sft", "reward", "ppo")}, numbers["kl_target"]))
    side = Samples([_sample(sample) for sample in samples[:SHOWN_POSTS]], "gold rewards; ROUGE compares with the person's summary")
    report.add("Summaries side by side", side)
    report.add("Time", Table("", ["stage", "seconds"], [[name, value] for name, value in numbers["seconds"].items()], digits=0))
    return report


def stage_table(report: Mapping[str, Any]) -> str:
    """The stage table and the two other headline numbers as plain text."""
    lines = [f"{'stage':10} {'gold':>14} {'score':>7} {'KL':>7} {'length':>7} {'ROUGE-1':>8} {'ROUGE-2':>8} {'ROUGE-L':>8}"]
    for row in report["stages"]:
        first = f"{row['name']:10} {row['gold']:6.2f} ± {row['gold_stderr']:.2f}  {row['score']:7.2f} {row['kl']:7.2f} {row['length']:7.1f}"
        lines.append(first + "".join(f" {row[key]:8.3f}" for key in ("rouge1", "rouge2", "rougeL")))
    gain = report["ppo_minus_sft"]
    difference = f"{gain['gold']:+.2f} ± {gain['gold_stderr']:.2f} ({gain['standard_errors']:.0f} standard errors)"
    lines.append(f"\nPPO - SFT: gold {difference} on {report['posts']} posts")
    lines.append(f"reward model: orders {report['reward_accuracy']:.1%} of fresh pairs as the gold reward does")
    return "\n".join(lines)


def curves(read: Mapping[str, Mapping[str, Points]], kl_target: float | None) -> list[Plot]:
    """The training curves, from every stage's scalars: tag -> (step, value)."""
    sft, reward, ppo = (lambda tag, found=read[stage]: found.get(tag, []) for stage in ("sft", "reward", "ppo"))
    step, target = "optimiser step", {} if kl_target is None else {"target": kl_target}
    accuracy = {"training": smoothed(reward("train/accuracy"), 10), "validation": reward("val/accuracy")}
    return [
        lines("SFT: loss", step, "nats per token", {"training": sft("train/loss"), "validation": sft("val/loss")}),
        lines("SFT: ROUGE", step, "F-measure", {f"ROUGE-{key[5:]}": sft(f"val/{key}") for key in ("rouge1", "rouge2", "rougeL")}),
        lines("Reward: loss", step, "nats per pair", {"training": smoothed(reward("train/loss"), 5), "validation": reward("val/loss")}),
        lines("Reward: accuracy", step, "share of noisy choices", accuracy),
        lines("PPO: score", step, "reward model's score", {"rollout": ppo("rollout/score"), "validation": ppo("val/score")}),
        lines("PPO: KL", step, "nats per response", {"": ppo("rollout/kl")}, levels=target),
        lines("PPO: length", step, "tokens per response", {"": ppo("rollout/length")}),
        lines("PPO: entropy", step, "nats per token", {"": ppo("rollout/entropy")}),
        lines("PPO: value loss", step, "squared score", {"": ppo("ppo/value_loss")}),
    ]


def _verdict(report: Mapping[str, Any]) -> str:
    gain, kl = report["ppo_minus_sft"], report["stages"][-1]["kl"]
    target = "" if report["kl_target"] is None else f" of a target of {report['kl_target']:g}"
    return (
        f"On the same posts the gold reward of PPO's summaries is {gain['gold']:+.2f} ± {gain['gold_stderr']:.2f} from SFT's "
        f"({gain['standard_errors']:.0f} standard errors), at a KL of {kl:.1f} nats{target}. The reward model, which saw nothing but noisy "
        f"choices, orders {report['reward_accuracy']:.1%} of fresh pairs of summaries as the gold reward does."
    )


def _stages(report: Mapping[str, Any]) -> Table:
    note = (
        "Gold reward: +1 per key fact that the summary states, -1 per false one and per filler, a little off for length or "
        f"a missing end; {report['people']['gold']:.2f} for the people's own summaries; in brackets its 95% interval. All stages sample "
        "at the training temperature. ROUGE compares with one person's summary, good or bad, so it need not rise with the gold reward."
    )
    rows = []
    for row in report["stages"]:
        mean, error = row["gold"], row["gold_stderr"]
        gold = Estimate(mean, error, mean - Z * error, mean + Z * error)
        rows.append([row["name"], gold, *(float(row[key]) for key in list(COLUMNS)[1:])])
    return Table("", ["stage", *COLUMNS.values()], rows, digits=DIGITS, note=note)


def _sample(sample: Mapping[str, Any]) -> Sample:
    """One post, and a person's and every stage's summary with its gold reward."""
    post = split_post(sample["prompt"])
    text = sample["prompt"] if post is None else post.post
    title = "" if post is None else post.head.partition("TITLE:")[2].removesuffix("POST: ").strip()
    return Sample(text, [Answer(name, summary, worth) for name, (summary, worth) in sample["summaries"].items()], title)
