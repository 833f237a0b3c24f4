"""`lit-rlhf plan`: memory and hours of a run before it starts, from the YAML files that will run it."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch._subclasses import FakeTensorMode

import lit_rlhf.callbacks
import lit_rlhf.data
import lit_rlhf.modules
from lit_rlhf import cli
from lit_rlhf.cli_errors import one_line, parameter_names
from lit_rlhf.planning import hours, report
from lit_rlhf.planning.depth import is_uniform
from lit_rlhf.planning.job import Job, read_job
from lit_rlhf.planning.search import Trial, Trials, overlays, table
from lit_rlhf.planning.shells import Shells, Source, build, read_source
from lit_rlhf.planning.simulate import simulate

UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
DESCRIPTION = (
    "What a run takes in memory and hours, by strategy and precision, before anything is loaded: `--config` files and options as in `fit`. "
    "A directory needs nothing but its config.json. Exit codes: 0 it fits, 1 it does not, 2 refused."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `lit-rlhf plan` with these arguments and returns its exit code."""
    options, args = _parser().parse_known_args(argv)
    cli.quiet()
    try:
        return plan(options, args)
    except (ValueError, FileNotFoundError, cli.Refused, RuntimeError) as error:
        if not (isinstance(error, cli.Refused) or cli.raised_here(error)):
            raise
        return cli.report(one_line(error, args, parameter_names(lit_rlhf.modules, lit_rlhf.data)), error, debug=False, code=2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lit-rlhf plan", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--devices", type=int, help="of each node (default: trainer.devices, 1 where that is auto)")
    parser.add_argument("--nodes", type=int, help="default: trainer.num_nodes")
    parser.add_argument("--device_memory", metavar="80GiB", help="of one device; without it nothing is said to fit")
    parser.add_argument(
        "--reserve",
        type=float,
        default=0.1,
        help="share of it for what tensors do not count: context, workspaces, fragmentation (%(default)s)",
    )
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), help="default: trainer.accelerator, else gpu")
    parser.add_argument("--prompt_tokens", type=int, help="of every prompt (default: data.max_prompt_tokens)")
    parser.add_argument("--response_tokens", type=int, help="of every response (default: what the files allow)")
    parser.add_argument("--responses", type=int, help="per prompt, reward models only (default: 2)")
    parser.add_argument("--rows", type=int, help="training rows (default: limit_train_rows or the lines of a local jsonl file)")
    parser.add_argument("--flops", type=float, help="operations a second of one device while training; about 40%% of a data sheet's")
    parser.add_argument("--bandwidth", type=float, help="bytes a second that one device reads; bounds sampling (default: flops / 200)")
    parser.add_argument("--table", action="store_true", help="every strategy in every precision too, as markdown")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="the same as JSON, to FILE or instead of the text")
    return parser


def plan(options: Any, args: Sequence[str]) -> int:
    """Plans, prints, and returns 0 where the asked combination fits, else 1; raises ValueError for what cannot be planned."""
    limit = None if options.device_memory is None else parse_bytes(options.device_memory) * (1 - options.reserve)
    for name in ("prompt_tokens", "response_tokens", "responses", "rows", "flops", "bandwidth"):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise ValueError(f"--{name} must be above 0, got {value}")
    job = read_job(args, options)
    sources = read_sources(job)
    if not job.splits:
        raise ValueError(
            f"the {job.prompts_per_step} prompts of an optimiser step cannot be split into accumulate_grad_batches {job.accumulate} x "
            f"{job.world} devices; lower --trainer.accumulate_grad_batches to at most {max(job.prompts_per_step // job.world, 1)}, "
            "or raise batch_size"
        )
    with FakeTensorMode():
        shells = build(replace(job, strategy="single"), sources)
    trials = Trials(partial(simulate, uniform=is_uniform(job, sources, shells)), sources, limit)
    asked = trials(job)
    found = list(overlays(job, trials)) if limit is not None else []
    cells = list(table(job, trials)) if options.table else []
    size = sizes(job, shells)
    hour = estimate(job, shells, options)
    out = {"asked": report.as_json(asked), "limit": limit, "parameters": size["parameters"], "checkpoint": checkpoint(asked, size)}
    out |= {"hours": hour, "overlays": [report.as_json(t) for t in found], "table": [report.as_json(t) for t in cells], "notes": job.notes}
    if options.json == "-":
        print(json.dumps(out, indent=1))
    else:
        print("\n".join(text(job, asked, found, cells, out)))
    if options.json not in (None, "-"):
        Path(options.json).write_text(json.dumps(out, indent=1) + "\n")
    return 1 if asked.fits is False else 0


def parse_bytes(given: str) -> float:
    """ "80GiB", "24 GB" or a plain number of bytes; raises ValueError for anything else."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", given)
    if not found or found[2].upper() not in UNITS or found[1].count(".") > 1 or not float(found[1]) > 0:
        raise ValueError(f"--device_memory is {given!r}; give a number and a unit such as 80GiB, 24GB or 512MiB")
    return float(found[1]) * UNITS[found[2].upper()]


def read_sources(job: Job) -> dict[str, Source]:
    """The configs of the job's networks; what an earlier stage has not written yet is taken to have the policy's shape.

    Raises FileNotFoundError or ValueError for a model that cannot be planned.
    """
    args = job.model
    policy = read_source(args.model, args.revision, args.trust_remote_code)
    if job.stage != "ppo":
        return {"policy": policy}
    sources = {"policy": policy}
    if args.reward_model is not None:
        sources["reward"] = _or_policy(args.reward_model, policy, args, job.notes)
    elif args.reward_fn is not None:
        job.notes.append("reward_fn takes no device memory (a model inside of it would)")
    start = args.value_init or ("reward" if args.reward_model else "sft")
    sources["value"] = policy if start == "sft" else sources["reward"] if start == "reward" else _or_policy(start, policy, args, job.notes)
    return sources


def _or_policy(path: str, policy: Source, args: Any, notes: list[str]) -> Source:
    if path.count("/") != 1 and not Path(path).exists():
        notes.append(f"{path} is not there yet: taken to have the shape of {args.model}")
        return policy
    return read_source(path, args.revision, args.trust_remote_code)


def sizes(job: Job, shells: Shells) -> dict[str, Any]:
    """Parameters of each network and bytes of the trained ones' weights, on one device."""
    counts = {
        role: {"all": sum(p.numel() for p in n.parameters()), "training": sum(p.numel() for p in n.parameters() if p.requires_grad)}
        for role, n in shells.present().items()
    }
    size = 2 if job.precision == "bf16-true" else 4 if job.model.dtype == "float32" else 2
    return {"parameters": counts, "weights": size * sum(c["all"] for c in counts.values() if c["training"])}


def checkpoint(asked: Trial, size: dict[str, Any]) -> int:
    """Bytes of one whole checkpoint: the trained networks' weights and the optimizer's state; frozen networks are left out."""
    ranks = asked.job.world if asked.job.strategy == "fsdp" else 1
    return int(size["weights"] + (asked.memory.optimizer if asked.memory else 0) * ranks)


def estimate(job: Job, shells: Shells, options: Any) -> dict[str, Any]:
    """Seconds of a step and hours of the run, with where the figures come from."""
    flops, where = (options.flops, "given") if options.flops else hours.measured_flops(job.accelerator, job.precision)
    bandwidth = options.bandwidth or flops / hours.FLOPS_PER_BYTE
    seconds = hours.seconds_per_step(job, shells.present(), flops, bandwidth)
    steps = hours.steps_of(job)
    total = None if steps is None else steps * sum(seconds.values()) / 3600
    return {"flops": flops, "from": where, "bandwidth": bandwidth, "seconds_per_step": seconds, "steps": steps, "hours": total}


def text(job: Job, asked: Trial, found: list[Trial], cells: list[Trial], out: dict[str, Any]) -> list[str]:
    """The lines of the report."""
    counted = (
        f"{role} {c['all'] / 1e6:,.1f}M" + (f" ({c['training'] / 1e6:,.1f}M train)" * bool(c["training"]))
        for role, c in out["parameters"].items()
    )
    lines = [f"{job.stage.upper()} with {job.model.model}: " + ", ".join(counted), ""]
    lines += report.memory_lines(job, asked.memory) + [""]
    if found:
        lines += [*report.overlay_lines(found), ""]
    if cells:
        lines += [*report.table_lines(cells), ""]
    lines += [f"A checkpoint: {out['checkpoint'] / 1e9:.2f} GB (weights and optimizer state of the networks that train)."]
    lines += hour_lines(out["hours"]) + [""]
    lines += ["Assumed:", *(f"  {note}" for note in job.notes)]
    lines += ["  only tensors are counted, as autograd keeps them; all rows are as long as said, so real peaks are lower", ""]
    return lines + [verdict(asked, found)]


def hour_lines(hour: dict[str, Any]) -> list[str]:
    each = ", ".join(f"{name} {s:.3g} s" for name, s in hour["seconds_per_step"].items())
    rate = f"{hour['flops']:.3g} FLOP/s a device ({hour['from']}), {hour['bandwidth']:.3g} bytes/s"
    if hour["hours"] is None:
        return [f"One optimiser step: {each} at {rate}; how many there are is not known: give --rows or trainer.max_steps."]
    return [f"{hour['steps']:,} optimiser steps, {hour['hours']:.3g} hours at {rate}; one step: {each}."]


def verdict(asked: Trial, found: list[Trial]) -> str:
    """The last line: fits or not, and what to change."""
    if asked.limit is None or asked.memory is None:
        return "Give --device_memory (80GiB, say) to see what fits."
    peak, limit = report.gib(asked.memory.peak), report.gib(asked.limit)
    if asked.fits:
        return f"FITS: {peak} GiB at the peak ({asked.memory.phase}) of {limit} GiB for tensors."
    good = [t for t in found if t.fits]
    best = min(good, key=lambda t: (t.job.world, t.job.strategy != asked.job.strategy), default=None)
    line = f"DOES NOT FIT: {peak} GiB at the peak ({asked.memory.phase}), {limit} GiB are there for tensors. "
    if best is None:
        return line + advice(asked)
    line += f"What fits: {best.overlay} on {report.devices(best.job)} with --trainer.accumulate_grad_batches {best.job.accumulate}"
    if best.job.precision != asked.job.precision:
        line += f" --trainer.precision {best.job.precision} (a learning rate of some 1e-6 is lost in bf16 weights)"
    return line + "."


def advice(asked: Trial) -> str:
    """What is left to try where no overlay fits."""
    if asked.limit is not None and asked.memory is not None and asked.memory.lasting > asked.limit:
        return "Weights, gradients and optimizer state alone are too much: use LoRA (model.peft), frozen_layers or more devices."
    if asked.memory is not None and asked.memory.phase == "training" and not asked.job.model.activation_checkpointing:
        return "Use --model.activation_checkpointing true, shorter prompts or responses, a smaller batch_size or more devices."
    return "Use shorter prompts or responses, a smaller batch_size or tokens_per_forward, LoRA (model.peft) or more devices."


if __name__ == "__main__":
    sys.exit(main())
