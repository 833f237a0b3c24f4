"""What `lit-rlhf plan` prints, and the same as JSON."""

from typing import Any

from lit_rlhf.planning.job import Job
from lit_rlhf.planning.search import Trial
from lit_rlhf.planning.simulate import Memory

GIB = 1 << 30


def gib(n: float) -> str:
    """Bytes as GiB with three digits that count."""
    n = n / GIB
    return f"{n:.0f}" if n >= 100 else f"{n:.1f}" if n >= 10 else f"{n:.2f}" if n >= 0.1 else f"{n:.3f}"


def devices(job: Job) -> str:
    count = f"{job.devices} device{'s' if job.devices > 1 else ''}"
    return count if job.nodes == 1 else f"{job.nodes} nodes x {count}"


def memory_lines(job: Job, memory: Memory) -> list[str]:
    """The asked combination: what is there all the time, then each phase."""
    lines = [f"Memory of each device, GiB: {job.strategy} on {devices(job)}, {job.precision}, {job.accelerator}, "]
    lines[0] += f"accumulate_grad_batches {job.accumulate} ({job.micro_prompts} prompt{'s' * (job.micro_prompts > 1)} of {job.tree_tokens} "
    lines[0] += f"tokens with {job.responses} response{'s' * (job.responses > 1)} a micro-batch)"
    rows = [(f"weights, {role}", n) for role, n in memory.weights.items()]
    rows += [("gradients", memory.gradients), ("DDP's gradient buckets", memory.buckets), ("optimizer", memory.optimizer)]
    lines += [f"  {name:<28}{gib(n):>9}" for name, n in rows if n]
    for phase, peak in memory.peaks.items():
        more = f"of it keys and values {gib(memory.cache)}" if phase == "sampling" else ""
        if phase == "training":
            more = f"of it activations, logits and what else passes {gib(max(peak - memory.lasting, 0))}"
            more += " (blocks keep their inputs alone: activation_checkpointing)" * job.model.activation_checkpointing
        mark = "  <- peak" if phase == memory.phase else ""
        lines.append(f"  {phase + ', all in all':<28}{gib(peak):>9}{mark:<10}{more}")
    return lines


def overlay_lines(trials: list[Trial]) -> list[str]:
    lines = ["Which overlay fits:" if trials and trials[0].limit else "Overlays:"]
    for t in trials:
        if t.memory is None:
            verdict = f"batch of {t.job.prompts_per_step} prompts cannot be split over {t.job.world} ranks"
        else:
            verdict = {True: "fits", False: "does not fit", None: ""}[t.fits]
            verdict = f"{gib(t.memory.peak):>8} GiB in {t.memory.phase:<15}{verdict}"
            verdict += f", accumulate_grad_batches {t.job.accumulate}"
        lines.append(f"  {t.overlay:<46}{devices(t.job):<22}{t.job.precision:<12}{verdict}")
    return lines


def table_lines(trials: list[Trial]) -> list[str]:
    """Markdown: a row for each strategy and precision."""
    head = "| strategy | precision | weights | gradients | optimizer | " + "sampling | scoring | training | peak |"
    lines = [head, "| --- | --- |" + " ---: |" * 7]
    for t in trials:
        if t.memory is None:
            lines.append(f"| {t.job.strategy}, {devices(t.job)} | {t.job.precision} |" + " – |" * 7)
            continue
        m = t.memory
        phases = [gib(m.peaks[p]) if p in m.peaks else "–" for p in ("sampling", "scoring", "training")]
        cells = [gib(sum(m.weights.values())), gib(m.gradients + m.buckets), gib(m.optimizer), *phases, f"**{gib(m.peak)}**"]
        lines.append(f"| {t.job.strategy}, {devices(t.job)} | {t.job.precision} | {' | '.join(cells)} |")
    return lines


def as_json(trial: Trial) -> dict[str, Any]:
    """A trial in plain data; bytes."""
    job = trial.job
    out = {name: getattr(job, name) for name in ("stage", "strategy", "precision", "devices", "nodes", "accumulate", "accelerator")}
    out |= {"micro_prompts": job.micro_prompts, "tree_tokens": job.tree_tokens, "overlay": trial.overlay, "fits": trial.fits}
    if trial.memory is not None:
        out |= vars(trial.memory) | {"lasting": trial.memory.lasting, "peak": trial.memory.peak, "phase": trial.memory.phase}
    return out
