"""Policies that are not what PPO believes, or not what SFT should leave."""

from functools import wraps

import pytest
import torch
from families import GPT2
from handover import llama, moved, save
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Model, LlamaForCausalLM

from lit_rlhf.doctor.policy import drift, ends, kl, length, ratio, repetition
from lit_rlhf.networks import CausalPolicy


@pytest.mark.parametrize("check", [kl, ratio, repetition])
def test_passes_on_what_is_whole(case, check):
    found = check(case(temperature=1.0, max_new_tokens=80))
    assert found.status == "pass", found


def test_responses_that_mostly_end(case):
    """EOS is about one in 40 tokens of this untrained policy, so some 87% of 80 tokens hold one: no failure."""
    found = ends(case(temperature=1.0, max_new_tokens=80))
    assert found.status in ("pass", "warn") and 0.75 < found.numbers["eos_rate"] < 0.97


def test_responses_as_long_as_references(case, reference_rows):
    written = length(case()).numbers["sample"]
    rows = [row | {"label": " cat" * round(written)} for row in reference_rows]  # " cat" is one token
    found = length(case(data=[rows]))
    assert found.status == "pass" and found.numbers["reference"] == round(written)


def test_dropout_on(case, changed, sft_dir):
    live = CausalPolicy.load(changed(sft_dir, {"config.json": {"attention_dropout": 0.3}}), dropout=True)
    broken = case(sft=live)
    assert kl(broken).status == ratio(broken).status == "fail"
    assert "dropout" in ratio(broken).reason and ratio(broken).numbers["ratio_update"] > 0.05


def test_position_ids_dropped_under_left_padding(case, tmp_path, tokenizer, monkeypatch):
    config = AutoConfig.for_model("gpt2", **GPT2 | {"vocab_size": len(tokenizer)}, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        lm.transformer.wpe.weight.mul_(50)
    save(lm, tokenizer, tmp_path)
    assert ratio(case(sft=str(tmp_path))).status == "pass"
    forward = GPT2Model.forward

    @wraps(forward)
    def without(self, *args, position_ids=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GPT2Model, "forward", without)
    found = ratio(case(sft=str(tmp_path)))
    assert found.status == "fail" and "position ids" in found.reason


def test_responses_that_do_not_end(case):
    found = ends(case(max_new_tokens=1))
    assert found.status == "fail" and found.numbers["eos_rate"] < 0.5 and "EOS" in found.reason


def test_responses_much_shorter_than_references(case, reference_rows):
    found = length(case(data=[[row | {"label": "cat dog " * 12} for row in reference_rows]]))
    assert found.status == "fail" and found.numbers["share"] < 0.6 and "shorter" in found.reason


def test_degenerate_samples(case, tmp_path, tokenizer):
    lm = llama(LlamaForCausalLM, tokenizer, seed=1)
    with torch.no_grad():
        lm.lm_head.weight.zero_()
        lm.model.norm.weight.zero_()
    save(lm, tokenizer, tmp_path)
    found = repetition(case(sft=str(tmp_path), temperature=0.0))  # all logits are equal: id 0 is banned, so id 1, EOS, ends each at once
    assert found.status == "fail" and found.numbers["empty_rate"] == 1.0


def test_a_policy_far_from_sft(case, sft_dir, tmp_path, tokenizer):
    far = moved(LlamaForCausalLM.from_pretrained(sft_dir), LlamaForCausalLM.from_pretrained(sft_dir), 1.0, seed=5)
    found = drift(case(policy=save(far, tokenizer, tmp_path)))
    assert found.status == "fail" and found.numbers["kl"] > 50


def test_a_policy_that_lost_what_it_was_to_gain(case, sft_dir, reward_dir, tmp_path, tokenizer):
    near = moved(LlamaForCausalLM.from_pretrained(sft_dir), LlamaForCausalLM.from_pretrained(sft_dir), 0.05, seed=5)
    broken = case(policy=save(near, tokenizer, tmp_path))
    sft_texts = set(broken.rollout.texts)
    broken.reward = lambda prompts, responses: [float(r in sft_texts) for r in responses]
    found = drift(broken)
    assert found.status == "fail" and found.reason == "PPO lowered the score" and 0 < found.numbers["kl"] < 20
