"""The check before all timing: both sides do equal work. It fails loudly."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

TOLERANCE, LOSS_TOLERANCE = 1e-4, 1e-5


def stop(message: str) -> None:
    sys.exit(f"make bench: the two sides do not do equal work: {message}")


def check_first_step(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """The same token ids, the same loss tokens and the same loss of the first step."""
    stage = f"{ours['stage']} on {ours['rows']}"
    if ours["first"]["ids"] != theirs["first"]["ids"]:
        stop(f"{stage}: the first batch has other token ids ({ours['first']['tokens']} tokens here, {theirs['first']['tokens']} there)")
    if ours["stage"] == "sft" and ours["first"]["loss_tokens"] != theirs["first"]["loss_tokens"]:
        stop(f"{stage}: {ours['first']['loss_tokens']} tokens count in our first loss, {theirs['first']['loss_tokens']} in theirs")
    gap = abs(ours["losses"][0] - theirs["losses"][0])
    if not gap <= TOLERANCE:
        stop(f"{stage}: the first loss is {ours['losses'][0]:.6f} here and {theirs['losses'][0]:.6f} there")
    later = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=False))
    return {"first_loss": ours["losses"][0], "first_loss_gap": gap, "largest_loss_gap": later, "tokens": ours["first"]["tokens"]}


def check_ppo(ours: Path, theirs: Path) -> dict[str, float]:
    """The same log-probs, values and scores of the same responses, as dumped by the two `check` processes."""
    a, b = (torch.load(path, weights_only=True) for path in (ours, theirs))
    if not torch.equal(a["mask"], b["mask"]):
        stop("ppo: the responses differ")
    gaps = {name: float((a[name] - b[name]).abs().max()) for name in ("logprobs", "values", "scores")}
    for name, gap in gaps.items():
        if not gap <= TOLERANCE:
            stop(f"ppo: the largest difference of {name} is {gap:.3g}, over {TOLERANCE:g}")
    gaps["logprobs_without_pad"] = float((a["logprobs_without_pad"] - b["logprobs"]).abs().max())
    return gaps


def check_losses(ours: Path, theirs: Path, stage: str) -> dict[str, float]:
    """The same losses (and advantages) of the same responses by a policy that differs from its reference, as dumped by both."""
    a, b = (torch.load(path, weights_only=True) for path in (ours, theirs))
    gaps = {name: float((a[name].double() - b[name].double()).abs().max()) for name in b}
    for name, gap in gaps.items():
        limit = LOSS_TOLERANCE if name not in ("logprobs", "advantages") else TOLERANCE
        if not gap <= limit * max(1.0, float(b[name].double().abs().max())):
            stop(f"{stage}: the largest difference of {name} is {gap:.3g}, over {limit:g} of {float(b[name].double().abs().max()):.4g}")
    return gaps


def last_line(output: str) -> dict[str, Any]:
    """The JSON that a measuring process printed last."""
    return json.loads(output.strip().splitlines()[-1])  # type: ignore[no-any-return]
