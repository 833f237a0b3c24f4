"""Counted operations against torch's own counter, tallies against the attention mask, peaks, and a clock by hand."""

import resource
from pathlib import Path

import peft
import pytest
import torch
from families import policy_of, scalar_of
from test_networks import batch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lit_rlhf import perf
from lit_rlhf.batch import Batch
from lit_rlhf.layout import pack
from lit_rlhf.perf import Clock, Passed, Tally, backward_work, forward_work, peak_flops, peak_memory
from lit_rlhf.pretrained import add_adapter, freeze

ROWS, TOKENS, HIDDEN, VOCABULARY = 3, 20, 32, 100
PASSED = Passed(ROWS * TOKENS, ROWS * TOKENS, ROWS * TOKENS * TOKENS, ROWS * (TOKENS - 1))  # dense: all pairs


def plain_passes(model, head=None) -> tuple[dict, dict]:
    """Operations by torch's counter of a plain transformers forward and backward pass: products apart from attention (eager, without a
    mask's savings), which are the only batched ones. The head sees all tokens but each row's last."""
    model.set_attn_implementation("eager")
    ids = torch.randint(2, VOCABULARY, (ROWS, TOKENS))
    counted = []
    with FlopCounterMode(display=False) as forward:
        hidden = model.base_model(input_ids=ids).last_hidden_state
        loss = hidden.sum() if head is None else F.cross_entropy(head(hidden[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    for counter in (forward, backward):
        by_op = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
        attention = sum(n for op, n in by_op.items() if "bmm" in op)
        counted.append({"attention": attention, "products": sum(by_op.values()) - attention})
    return counted[0], counted[1]


def split(work, passed) -> dict:
    return {"attention": work.attention * passed.attended, "products": work.per_token * passed.tokens + work.head * passed.scored}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3", "opt"])
def test_all_weights_train(family):
    """The backward pass is exactly twice the forward pass."""
    policy = policy_of(family)
    forward, backward = plain_passes(policy.lm, policy.lm.get_output_embeddings())
    assert split(forward_work(policy), PASSED) == forward
    assert split(backward_work(policy), PASSED) == backward == {name: 2 * n for name, n in forward.items()}
    assert forward["attention"] > 0 and forward_work(policy).of(PASSED) == sum(forward.values())


def test_a_scalar_model_has_no_head_to_speak_of():
    network = scalar_of("llama")
    forward, backward = plain_passes(network.model)
    assert (split(forward_work(network), PASSED), split(backward_work(network), PASSED)) == (forward, backward)


def test_what_is_frozen_takes_less():
    """The lowest of two blocks is not reached by the backward pass, nor are the embeddings."""
    policy = policy_of("llama")
    freeze(policy.lm, 1)
    forward, backward = plain_passes(policy.lm, policy.lm.lm_head)
    assert split(forward_work(policy), PASSED) == forward
    assert split(backward_work(policy), PASSED) == backward
    assert backward["attention"] == forward["attention"]  # twice the forward pass of one block of two


def test_an_adapted_layer_has_no_gradient_of_its_weight():
    """All but the first block's q, k, v, whose input needs none either: the embeddings below them are frozen."""
    policy = policy_of("llama")
    add_adapter(policy.lm, peft.LoraConfig(r=4, target_modules="all-linear"))
    forward, backward = (sum(counts.values()) for counts in plain_passes(policy.lm, policy.lm.lm_head))
    assert forward_work(policy).of(PASSED) == forward
    first = 2 * ROWS * TOKENS * (32 * 32 + 2 * 32 * 16 + 3 * 32 * 4)  # q, k, v of 4 and 2 heads of 8, and their adapters' A
    assert backward_work(policy).of(PASSED) - first == backward < 1.2 * forward


def test_packed_and_plain_rows_are_tallied_as_their_masks_say():
    """The mask of the packed form joins exactly the counted pairs; plain rows hold each prompt once a response."""
    rows, packed = batch(), pack(batch(), "rows")
    tally = Tally()
    tally.add(rows, packed.input_ids.numel(), shared=True)
    found = tally.pop()
    real = torch.zeros(packed.input_ids.shape, dtype=torch.bool).flatten()
    real[packed.state_index] = True
    real[packed.prompt_index] = True
    pairs = packed.attention_mask[:, 0] & real.view_as(packed.input_ids)[:, :, None]
    # prompts of 12, 5, 9 and 1 tokens, responses of 7, 3, 9, 1 and 6
    assert found == Passed(27 + 26, packed.input_ids.numel(), int(pairs.sum()), 26)
    assert int(real.sum()) == 53 and tally.pop() == Passed()

    plain = pack(rows, "plain")
    tally.add(rows, plain.input_ids.numel(), shared=False)
    lengths = [12 + 7, 12 + 3, 5 + 9, 9 + 1, 1 + 6]
    assert tally.pop() == Passed(sum(lengths), 5 * 19, sum(n * (n + 1) // 2 for n in lengths), 26)
    assert plain.input_ids.shape == (5, 19) and int(plain.attention_mask.sum()) == sum(lengths)


def test_prompt_tokens_that_count_meet_the_vocabulary_too():
    rows = Batch.of([[5, 6, 7], [8, 9]], [[3, 1], [4, 4, 1]])
    rows.prompt_loss_mask = torch.tensor([[False, True, True], [False, True, False]])
    tally = Tally()
    tally.add(rows, 10, shared=True)
    tally.add(Batch.of([[5, 6]]), 4, shared=False)  # a prompt without responses
    assert tally.pop() == Passed(10 + 2, 14, (6 + 3 + (6 + 3) + (6 + 6)) + 3, 5 + 3)


def test_networks_fill_their_tallies():
    policy, network = policy_of("llama"), scalar_of("gptj")
    policy.tally, network.tally = Tally(), Tally()
    policy(batch()), network(batch())
    assert policy.form != "plain" == network.form
    assert policy.tally.pop().tokens == 53 and network.tally.pop() == Passed(65, 95, 190 + 120 + 105 + 55 + 28, 26)


@pytest.mark.parametrize(
    ("card", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H200", torch.float32, 66.9e12),
        ("NVIDIA A100-SXM4-80GB", torch.float16, 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", torch.bfloat16, None),
        ("NVIDIA RTX A4000", torch.bfloat16, None),
        ("NVIDIA GH200 480GB", torch.bfloat16, None),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA L40S", torch.bfloat16, 362.1e12),
        ("NVIDIA A100-SXM4-80GB", torch.float64, None),
    ],
)
def test_peaks_by_the_cards_name(card, dtype, expected):
    assert peak_flops(card, dtype) == (expected and pytest.approx(expected))


def test_float32_is_tf32_where_that_is_allowed():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 156e12
    finally:
        torch.set_float32_matmul_precision(before)
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12


def test_phases_tile_the_time(monkeypatch):
    times = iter([10.0, 12.0, 15.0, 15.5, 20.0])
    monkeypatch.setattr(perf.time, "perf_counter", lambda: next(times))
    clock, tally, rows = Clock(), Tally(), Batch.of([[5, 6, 7]], [[3, 1]])
    clock.begin("sampling")  # nobody listens yet
    assert not clock.seconds
    clock.start({"policy": tally})
    tally.add(rows, 100, shared=True)  # before any phase: a validation, say
    clock.begin("sampling")  # 10
    clock.begin("scoring")  # 12
    tally.add(rows, 8, shared=True)
    clock.begin()  # 15
    clock.begin("scoring")  # 15.5
    tally.add(rows, 8, shared=True)
    clock.begin()  # 20
    assert dict(clock.seconds) == {"sampling": 2.0, "scoring": 7.5}
    assert clock.passed == {("sampling", "policy"): Passed(), ("scoring", "policy"): Passed(10, 16, 30, 4)}
    clock.clear()
    assert not clock.seconds and not clock.passed


def test_peak_memory_lies_between_what_is_there_now_and_the_kernels_other_count():
    what, peak = peak_memory()
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    assert what == "rss" and now <= peak + 1e6 and peak <= 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + 1e6
    block = torch.ones(10_000_000)  # 40 MB more than now
    assert peak_memory()[1] >= now + 35e6 and len(block)
