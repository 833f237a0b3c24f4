"""The peak memory of log-probs and of the losses on them, forward and backward, is not tokens x vocabulary."""

import gc
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from families import TOKENIZER
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lit_rlhf.batch import Batch
from lit_rlhf.functional import lm_loss, logprobs, policy_loss, token_logprobs
from lit_rlhf.networks import CausalPolicy, check_layout
from lit_rlhf.planning.tracker import Tracker

HIDDEN, VOCABULARY, CHUNK = 8, 4096, 256
LENGTHS = (1024, 4096, 16384)


def peak(there: Iterable[Tensor], run: Callable[[], Tensor]) -> int:
    """The most bytes that are alive in run() and its backward pass, above those of the tensors that were there.

    Without the garbage collector, whose moments depend on what other tests left.
    """
    gc.collect()
    gc.disable()
    try:
        with Tracker() as tracker:
            tracker.watch(there)
            before = tracker.live
            with tracker.phase("both"):
                run().sum().backward()
    finally:
        gc.enable()
    return tracker.peaks()["both"] - before


class Other(nn.Module):
    """A head that is no linear layer, as a sharded or adapted one: it goes in chunks of tokens."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("setting", ["plain", "bias, temperature, banned", "bfloat16", "autocast"])
@pytest.mark.parametrize("kind", ["linear", "other"])
def test_of_token_logprobs(kind, setting, monkeypatch):
    """At a fixed chunk it grows by what belongs to a token alone: some numbers of its own, and its state's gradient.

    All logits of 16,384 tokens in float32 would be 268 MB, a chunk's are 4.2 MB.
    """
    monkeypatch.setitem(logprobs.TILE, "cpu", CHUNK * VOCABULARY // 4)
    linear = nn.Linear(HIDDEN, VOCABULARY, bias=setting.startswith("bias"), dtype=torch.bfloat16 if setting == "bfloat16" else None)
    banned = torch.zeros(VOCABULARY, dtype=torch.bool)
    banned[7] = True
    more = {"temperature": 0.7, "banned": banned} if setting.startswith("bias") else {}
    head, found = linear if kind == "linear" else Other(linear), {}
    for tokens in LENGTHS:
        states = torch.randn(tokens, HIDDEN, dtype=linear.weight.dtype, requires_grad=True)
        targets = torch.randint(8, VOCABULARY, (tokens,))
        linear.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
            found[tokens] = peak(
                [states, targets, banned, *linear.parameters()], partial(token_logprobs, states, targets, head, chunk_size=CHUNK, **more)
            )
    print(f"\n{kind}, {setting}: " + ", ".join(f"{n} tokens {b / 1e6:.2f} MB" for n, b in found.items()))
    chunk = 4 * CHUNK * VOCABULARY
    assert found[1024] < 5 * chunk
    assert found[16384] < found[1024] + 16384 * (12 * HIDDEN + 200)  # bytes a token; its logits would be 16,384
    assert found[16384] < 0.1 * 4 * 16384 * VOCABULARY


@pytest.fixture(scope="module")
def policies() -> dict[int, CausalPolicy]:
    """One-block Llamas that differ in their vocabulary alone."""
    made = {}
    for vocabulary in (1024, 8192):
        shape = {"hidden_size": HIDDEN, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        made[vocabulary] = CausalPolicy(
            LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=96, **shape)), TOKENIZER
        )
        check_layout(made[vocabulary])
    return made


def sft_loss(policy: CausalPolicy, rows: Batch) -> Tensor:
    return lm_loss(policy(rows)[0], rows.response_mask)[0]


def ppo_loss(policy: CausalPolicy, rows: Batch) -> Tensor:
    shape = rows.response_mask.shape
    found, _ = policy(rows, temperature=0.7, ban=True)
    return policy_loss(found, torch.full(shape, -6.0), torch.ones(shape), rows.response_mask, count=float(rows.response_mask.sum()))[0]


@pytest.mark.parametrize("loss", [sft_loss, ppo_loss])
def test_of_the_losses(loss, policies, monkeypatch):
    """What a vocabulary of 8,192 takes more than one of 1,024 is the same for 1,024 response tokens and for 16,384, but for a tile."""
    monkeypatch.setitem(logprobs.TILE, "cpu", 1 << 18)
    more = []
    for responses in (16, 256):
        rows = Batch.of([[5] * 4] * responses, [[6] * 64] * responses)
        by_size = {}
        for vocabulary, policy in policies.items():
            policy.zero_grad()
            by_size[vocabulary] = peak([*policy.parameters(), policy.banned], partial(loss, policy, rows))
        more.append(by_size[8192] - by_size[1024])
        print(f"\n{loss.__name__}, {64 * responses} tokens: " + ", ".join(f"vocabulary {v}: {b / 1e6:.2f} MB" for v, b in by_size.items()))
    assert abs(more[1] - more[0]) < 4 * (1 << 18)  # the logits of 16,384 tokens would be 470 MB more, those of 1,024 29 MB more
