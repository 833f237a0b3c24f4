"""How much a run computes and how fast: operations and padding of the networks' passes, seconds of its phases, what a GPU can do.

Operations are those of matrix products, two for each multiplication and addition, counted from shapes: of real tokens (padding is no
work), of the pairs of tokens that attention joins, and once (what activation checkpointing and the head's tiles compute again is no
progress). So operations per second over the GPU's peak are the MFU of Chowdhery et al. 2022 (PaLM, appendix B).
"""

import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers.pytorch_utils import Conv1D

from lit_rlhf.batch import Batch
from lit_rlhf.sharding import decoder_blocks

# Dense bfloat16, TF32 and float32 (no tensor cores), 10^12 operations a second, by words of the card's name; the first that fits holds.
# NVIDIA's data sheets, whose figures with sparsity are twice these. (Lightning's table has those for the H200 and the H100 NVL.)
PEAKS = {
    "B200": (2250.0, 1125.0, 75.0),
    "H200 NVL": (835.5, 417.7, 60.0),
    "H200": (989.4, 494.7, 66.9),
    "H100 NVL": (835.5, 417.7, 60.0),
    "H100 PCIe": (756.0, 378.0, 51.2),
    "H100": (989.4, 494.7, 66.9),
    "A100": (312.0, 156.0, 19.5),
    "L40S": (362.1, 183.2, 91.6),
    "L40": (181.1, 90.5, 90.5),
    "L4": (121.0, 60.0, 30.3),
    "A40": (149.7, 74.8, 37.4),
    "A30": (165.0, 82.0, 10.3),
    "A10G": (70.0, 35.0, 35.0),
    "A10": (125.0, 62.5, 31.2),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71.0, 35.6, 35.6),
}


def peak_flops(card: str, dtype: torch.dtype) -> float | None:
    """Operations a second that a GPU of that name can do at most with matrices of that type; None where it is not known.

    float32 is TF32 where `torch.set_float32_matmul_precision` allows it.
    """
    found = next((peaks for name, peaks in PEAKS.items() if re.search(rf"\b{name}\b", card)), None)
    if found is None or "MIG" in card or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    single = found[2] if torch.get_float32_matmul_precision() == "highest" else found[1]
    return 1e12 * (single if dtype == torch.float32 else found[0])


@dataclass(frozen=True)
class Passed:
    """What passed through a network."""

    tokens: int = 0
    """Real tokens of its rows; a prompt that its responses share is one."""
    size: int = 0
    """Tokens of its rows with their padding."""
    attended: int = 0
    """Pairs of a token and one that it attends to, itself included."""
    scored: int = 0
    """Tokens whose log-probability was asked for: those that meet the vocabulary."""

    def __add__(self, other: "Passed") -> "Passed":
        return Passed(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


class Tally:
    """Counts what passes through a network; `Throughput` gives each network one (its attribute `tally`)."""

    def __init__(self) -> None:
        self.counts: Tensor | None = None

    def add(self, batch: Batch, size: int, shared: bool) -> None:
        """A forward pass over rows of `size` tokens in all; `shared`: prompts stand in them once. Nothing waits for the GPU here."""
        prompts, lengths, owner = batch.prompt_mask.sum(1), batch.response_mask.sum(1), batch.prompt_of
        copies = torch.ones_like(prompts) if shared else torch.zeros_like(prompts).index_add(0, owner, owner.new_ones(len(owner))).clamp(1)
        tokens = (copies * prompts).sum() + lengths.sum()
        attended = (copies * prompts * (prompts + 1)).sum() // 2 + (lengths * prompts[owner] + lengths * (lengths + 1) // 2).sum()
        scored = lengths.sum() + (0 if batch.prompt_loss_mask is None else batch.prompt_loss_mask.sum())
        counts = torch.stack([tokens, torch.full_like(tokens, size), attended, scored])
        self.counts = counts if self.counts is None else self.counts + counts

    def pop(self) -> Passed:
        """What has passed since the last call."""
        counts, self.counts = self.counts, None
        return Passed() if counts is None else Passed(*counts.tolist())


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a pass through a network."""

    per_token: float
    """Of one token: 2 for every weight of a matrix product, the language-model head's not counted."""
    head: float
    """Of the language-model head on one token."""
    attention: float
    """Of one token for each token that it attends to."""

    def of(self, passed: Passed) -> float:
        """The operations for what passed."""
        return self.per_token * passed.tokens + self.head * passed.scored + self.attention * passed.attended


def forward_work(network: Any) -> Work:
    """The Work of a CausalPolicy's or ScalarModel's forward pass: from its linear layers (transformers' Conv1D too) and its config.

    Experts that are no linear layers are not seen, nor a scalar head, which is a vector.
    """
    model, head = _parts(network)
    text = model.config.get_text_config()
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    sizes = sum(_size(m) for m in model.base_model.modules() if m is not head)
    return Work(2.0 * sizes, 2.0 * _size(head), 4.0 * text.num_hidden_layers * width)


def backward_work(network: Any) -> Work:
    """The Work of the backward pass: a product for each gradient that is needed, twice the forward pass where all weights train.

    A frozen or adapted layer has no gradient of its weight, and what lies below all weights that train is not reached.
    """
    model, head = _parts(network)
    blocks = decoder_blocks(model.base_model)
    trains = [any(p.requires_grad for p in part.parameters()) for part in (model.get_input_embeddings(), *blocks)]
    lowest = max(trains.index(True) - 1, 0) if any(trains) else len(blocks)
    unreached = {id(m) for block in blocks[:lowest] for m in block.modules()}
    reached = [m for m in model.base_model.modules() if _size(m) and id(m) not in unreached and m is not head]
    products = sum(_size(m) * (1 + m.weight.requires_grad) for m in reached)
    at_head = _size(head) * (any(trains) + head.weight.requires_grad) if head is not None else 0
    share = (len(blocks) - lowest) / max(len(blocks), 1)
    return Work(2.0 * products, 2.0 * at_head, 2 * share * forward_work(network).attention)


def _parts(network: Any) -> tuple[Any, Any]:
    """The Hugging Face model of a network, and its language-model head or None."""
    return (network.lm, network.lm.get_output_embeddings()) if hasattr(network, "lm") else (network.model, None)


def _size(module: nn.Module | None) -> int:
    """Weights of a linear layer, whole even where it is sharded; 0 for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    return module.nx * module.nf if isinstance(module, Conv1D) else 0


class Clock:
    """Seconds and passes of a run's phases, which follow each other and are spans in a torch profile; it does nothing until `start`."""

    def __init__(self) -> None:
        self.running = False
        self.tallies: dict[str, Tally] = {}
        self.clear()
        self._phase, self._since = "", 0.0
        self._span: record_function | None = None

    def start(self, tallies: dict[str, Tally]) -> None:
        """Counts from now on, with these networks' tallies."""
        self.running, self.tallies, self._phase = True, tallies, ""
        self.clear()

    def begin(self, phase: str = "") -> None:
        """The phase so far ends and this one begins, on a GPU when what was launched is done; without a name nothing is counted."""
        if not self.running:
            return
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._mark(phase)
        passed = {role: tally.pop() for role, tally in self.tallies.items()}
        if self._phase:
            self.seconds[self._phase] += now - self._since
            for role, more in passed.items():
                self.passed[self._phase, role] = self.passed.get((self._phase, role), Passed()) + more
        self._phase, self._since = phase, now

    def _mark(self, phase: str) -> None:
        if self._span is not None:
            self._span.__exit__(None, None, None)
        self._span = record_function(phase) if phase else None
        if self._span is not None:
            self._span.__enter__()

    def clear(self) -> None:
        """Forgets what was counted."""
        self.seconds: Counter[str] = Counter()
        self.passed: dict[tuple[str, str], Passed] = {}


def peak_memory() -> tuple[str, float] | None:
    """The most bytes so far: of this process's tensors on its GPU ("cuda"), or of all its memory ("rss"); None where unknown."""
    if torch.cuda.is_initialized():
        return "cuda", float(torch.cuda.max_memory_allocated())
    try:
        with open("/proc/self/status", encoding="ascii") as lines:  # getrusage would give the parent's, where that was larger
            return "rss", 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        if sys.platform != "darwin":
            return None
        import resource

        return "rss", float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
