"""How long a run takes: its floating-point operations and weight reads, divided by what a device does in a second."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lit_rlhf.planning.job import Job

FLOPS_PER_BYTE = 200.0  # of data-sheet GPUs: A100 312e12 / 2.0e12 = 156, H100 990e12 / 3.35e12 = 296


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes of weights that one forward pass of a network takes."""

    per_token: float
    """Operations of one token: 2 for every weight of a matrix product, the language-model head's not counted."""
    head: float
    """Operations of the head on one token."""
    attention: float
    """Operations of one token per token that it attends to."""
    read: float
    """Bytes of weights read by one decoding step."""


def work(network: nn.Module, config: Any, precision: str) -> Work:
    """The Work of a network: built from its linear layers (transformers' Conv1D too) and its config."""
    head = network.lm.get_output_embeddings() if hasattr(network, "lm") else None
    sizes = [m.weight.numel() for m in network.modules() if m is not head and type(m).__name__ in ("Linear", "Conv1D")]
    head_size = head.weight.numel() if head is not None else 0
    text = config.get_text_config()
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    read = sum(p.numel() for p in network.parameters()) * (4 if precision == "32-true" else 2)
    return Work(2.0 * sum(sizes), 2.0 * head_size, 4.0 * text.num_hidden_layers * width, float(read))


def steps_of(job: Job) -> int | None:
    """Optimiser steps of the whole run, None where the number of rows is not known."""
    limits = [job.max_steps] if job.max_steps is not None and job.max_steps >= 0 else []
    if job.max_epochs is not None and job.max_epochs >= 0:
        if job.stage == "ppo":
            limits.append(job.max_epochs * job.model.ppo_epochs * job.model.minibatches)
        elif job.rows is not None:
            limits.append(job.max_epochs * max(job.rows // job.batch_size, 1))
    return min(limits, default=None)


def seconds_per_step(job: Job, works: dict[str, Work], flops: float, bandwidth: float) -> dict[str, float]:
    """Seconds of one optimiser step on all devices together, by what takes them; PPO's sampling and scoring are shared among its steps.

    A step with gradient takes three forward passes (backward is two), frozen layers and adapters too; the chunked head one more, and the
    blocks one more with `activation_checkpointing`. Decoding takes the longer of its operations and of reading the weights once a token.
    """
    total = flops * job.world
    trees, paths = job.prompts_per_step, job.prompts_per_step * job.responses
    trained = {"sft": ["policy"], "reward": ["reward"], "ppo": ["policy", "value"]}[job.stage]
    scored = paths * job.response_tokens + (trees * job.prompt_tokens if job.prompt_loss else 0)
    passes = {role: trees * job.tree_tokens * _token(job, w) for role, w in works.items()}
    through = 4 if job.model.activation_checkpointing else 3
    training = sum(through * passes[role] + 4 * scored * works[role].head for role in trained) / total
    if job.stage != "ppo":
        return {"training": training}
    steps = job.model.ppo_epochs * job.model.minibatches
    share = job.model.minibatches / steps  # an iteration's responses are minibatches x a step's
    scoring = sum(passes[role] + scored * w.head for role, w in works.items())
    scoring += passes["policy"] + scored * works["policy"].head if "reference" not in works else 0
    return {"training": training, "scoring": scoring / total * share, "sampling": _sampling(job, works["policy"], flops, bandwidth) / steps}


def _token(job: Job, w: Work) -> float:
    """Operations of one token of a tree in one forward pass; it attends to half a path on average."""
    return w.per_token + w.attention * (job.prompt_tokens + job.response_tokens) / 2


def _sampling(job: Job, w: Work, flops: float, bandwidth: float) -> float:
    """Seconds in which every rank samples its share of an iteration's responses."""
    rows = -(-job.batch_size // job.world)
    prefill = rows / job.responses * job.prompt_tokens * _token(job, w)
    groups = -(-rows // 256)
    decoded = rows * job.response_tokens * (w.per_token + w.head + w.attention * (job.prompt_tokens + job.response_tokens / 2))
    return prefill / flops + max(decoded / flops, groups * job.response_tokens * w.read / bandwidth)


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
