"""How long a run takes: its floating-point operations and weight reads, divided by what a device does in a second."""

import time
from collections.abc import Mapping

import torch
from torch import nn

from lit_rlhf.perf import Passed, Work, backward_work, forward_work
from lit_rlhf.planning.job import Job

FLOPS_PER_BYTE = 200.0  # of data-sheet GPUs: A100 312e12 / 2.0e12 = 156, H100 990e12 / 3.35e12 = 296


def steps_of(job: Job) -> int | None:
    """Optimiser steps of the whole run, None where the number of rows is not known."""
    limits = [job.max_steps] if job.max_steps is not None and job.max_steps >= 0 else []
    if job.max_epochs is not None and job.max_epochs >= 0:
        if job.stage == "ppo":
            limits.append(job.max_epochs * job.model.ppo_epochs * job.model.minibatches)
        elif job.rows is not None:
            limits.append(job.max_epochs * max(job.rows // job.batch_size, 1))
    return min(limits, default=None)


def seconds_per_step(job: Job, networks: Mapping[str, nn.Module], flops: float, bandwidth: float) -> dict[str, float]:
    """Seconds of one optimiser step on all devices together, by what takes them; PPO's sampling and scoring are shared among its steps.

    A step with gradient takes a forward pass and `backward_work`; the head one pass more, and the blocks one more with
    `activation_checkpointing`. Decoding takes the longer of its operations and of reading the weights once a token.
    """
    total, tokens = flops * job.world, job.prompts_per_step * job.tree_tokens
    scored = job.prompts_per_step * (job.responses * job.response_tokens + job.prompt_loss * job.prompt_tokens)
    seen = Passed(tokens=tokens, attended=tokens * (job.prompt_tokens + job.response_tokens) // 2, scored=scored)  # half a path on average
    again = seen if job.model.activation_checkpointing else Passed(scored=scored)
    forward, backward = ({role: make(n) for role, n in networks.items()} for make in (forward_work, backward_work))
    trained = {"sft": ["policy"], "reward": ["reward"], "ppo": ["policy", "value"]}[job.stage]
    training = sum(forward[role].of(seen) + backward[role].of(seen) + forward[role].of(again) for role in trained) / total
    if job.stage != "ppo":
        return {"training": training}
    steps = job.model.ppo_epochs * job.model.minibatches
    share = job.model.minibatches / steps  # an iteration's responses are minibatches x a step's
    scoring = sum(w.of(seen) for w in forward.values()) + (forward["policy"].of(seen) if "reference" not in networks else 0)
    read = sum(p.numel() for p in networks["policy"].parameters()) * (4 if job.precision == "32-true" else 2)
    sampling = _sampling(job, forward["policy"], read, flops, bandwidth)
    return {"training": training, "scoring": scoring / total * share, "sampling": sampling / steps}


def _sampling(job: Job, w: Work, read: float, flops: float, bandwidth: float) -> float:
    """Seconds in which every rank samples its share of an iteration's responses; `read`: the bytes of weights that a token takes."""
    rows = -(-job.batch_size // job.world)
    prompts = rows / job.responses * job.prompt_tokens
    prefill = prompts * (w.per_token + w.attention * (job.prompt_tokens + job.response_tokens) / 2)
    groups = -(-rows // 256)
    decoded = rows * job.response_tokens * (w.per_token + w.head + w.attention * (job.prompt_tokens + job.response_tokens / 2))
    return prefill / flops + max(decoded / flops, groups * job.response_tokens * read / bandwidth)


def measured_flops(accelerator: str, precision: str) -> tuple[float, str]:
    """Operations per second of a large matrix product on this machine, and on what."""
    device = torch.device("cuda" if accelerator == "gpu" and torch.cuda.is_available() else "cpu")
    size, dtype = (8192 if device.type == "cuda" else 1024), torch.float32 if precision == "32-true" else torch.bfloat16
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"this CPU with {torch.get_num_threads()} thread(s)"
    return 2.0 * size**3 / best, f"measured: a product of {size} x {size} {str(dtype).removeprefix('torch.')} matrices on {name}"
