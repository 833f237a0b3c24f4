"""Directories, one file of which is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_rlhf.doctor import examine
from lit_rlhf.doctor.files import dropout, eos, lineage, loads, merged, pad, sampling, tokenizer
from lit_rlhf.doctor.finding import NotMeasurable

PAD_IS_EOS = {"tokenizer_config.json": {"pad_token": "<eos>"}}


@pytest.mark.parametrize("check", [merged, loads, tokenizer, pad, eos, dropout, sampling])
def test_passes_on_what_is_whole(case, check):
    found = check(case())
    assert (found.status, found.reason, found.remedy) == ("pass", "", "") and found.measured


def test_adapter_beside_the_weights(case, changed, reward_dir):
    found = merged(case(reward=changed(reward_dir, {"adapter_config.json": {"peft_type": "LORA"}})))
    assert found.status == "fail" and "reward: adapter_config.json" in found.measured and "merge" in found.remedy


def test_adapter_inside_the_weights(case, changed, sft_dir):
    path = changed(sft_dir, {})
    weights = load_file(f"{path}/model.safetensors")
    save_file(weights | {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(2, 32)}, f"{path}/model.safetensors")
    found = merged(case(sft=path))
    assert found.status == "fail" and "lora_A" in found.measured


def test_a_directory_that_does_not_load(case, changed, reward_dir):
    path = changed(reward_dir, {})
    weights = load_file(f"{path}/model.safetensors")
    save_file({name: w for name, w in weights.items() if "score" not in name}, f"{path}/model.safetensors")
    broken = case(reward=path)
    found = loads(broken)
    assert found.status == "fail" and "no reward head" in found.measured
    kinds = {f.name: f.status for f in examine(broken, ("loads", "pad", "accuracy"))}
    assert kinds == {"loads": "fail", "pad": "pass", "accuracy": "skip"}


def test_another_tokenizer(case, changed, reward_dir, other_tokenizer):
    path = changed(reward_dir, {})
    other_tokenizer.save_pretrained(path)
    found = tokenizer(case(reward=path))
    assert found.status == "fail" and found.numbers["reward_other_ids"] > 0.9
    (allowed,) = examine(case(reward=path), ["tokenizer"], allow=["tokenizer"])
    assert allowed.status == "warn"


def test_pad_is_eos(case, changed, sft_dir, reward_dir):
    found = pad(case(sft=changed(sft_dir, PAD_IS_EOS), reward=changed(reward_dir, PAD_IS_EOS)))
    assert found.status == "fail" and found.numbers["pad_is_eos"] == 2 and "sft: pad = EOS = '<eos>' (id 1)" in found.measured
    found = pad(case(reward=changed(reward_dir, {"config.json": {"pad_token_id": 1}})))
    assert found.status == "fail" and "reward" in found.measured and "sft" not in found.measured


def test_pad_of_config_is_another(case, changed, reward_dir):
    assert pad(case(reward=changed(reward_dir, {"config.json": {"pad_token_id": 2}}))).status == "warn"


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_eos_of_config_is_another(case, changed, sft_dir, file):
    found = eos(case(sft=changed(sft_dir, {file: {"eos_token_id": 2}})))
    assert found.status == "fail" and f"sft: the tokenizer's EOS is 1, {file} has 2" in found.measured
    assert eos(case(sft=changed(sft_dir, {file: {"eos_token_id": [1, 2]}}))).status == "pass"


def test_eos_of_the_reward_is_another(case, changed, reward_dir):
    path = changed(reward_dir, {"tokenizer_config.json": {"eos_token": "<extra>"}, "config.json": {"eos_token_id": 2}})
    assert "EOS is '<eos>' in sft, '<extra>' in reward" in eos(case(reward=path)).measured


def test_lineage(case, stages):
    found = lineage(case(sft=stages["sft"], reward=stages["reward"], base=stages["base"]))
    assert found.status == "pass" and found.numbers["reward_share"] == pytest.approx(1, abs=0.05)
    found = lineage(case(sft=stages["sft"], reward=stages["raw"], base=stages["base"]))
    assert found.status == "fail" and found.numbers["reward_share"] == pytest.approx(0, abs=0.05) and "from the base" in found.measured


def test_stages_that_did_not_move(case, stages):
    found = lineage(case(sft=stages["base"], reward=stages["reward"], base=stages["base"]))
    assert found.status == "fail" and "the SFT model is the base, bit for bit" in found.measured
    found = lineage(case(sft=stages["sft"], policy=stages["sft"]))
    assert found.status == "fail" and "the policy is the SFT model, bit for bit" in found.measured
    with pytest.raises(NotMeasurable, match="--base"):
        lineage(case())


def test_dropout_in_a_config(case, changed, sft_dir):
    found = dropout(case(sft=changed(sft_dir, {"config.json": {"attention_dropout": 0.3}})))
    assert found.status == "warn" and "attention_dropout 0.3" in found.measured and found.numbers["gap"] > 0.01


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.5}, {"repetition_penalty": 1.5}, {"num_beams": 4}])
def test_a_sampler_with_settings(case, changed, sft_dir, settings):
    found = sampling(case(sft=changed(sft_dir, {"generation_config.json": settings})))
    (name,) = settings
    assert found.status == "fail" and name in found.measured and found.numbers["gap"] > 0.01


def test_top_k_by_hand(case, changed, sft_dir):
    """With top_k = 1 the processed log-prob is 0, so the gap is what we give to the likeliest token."""
    greedy = sampling(case(sft=changed(sft_dir, {"generation_config.json": {"top_k": 1}}), rows=4))
    assert greedy.numbers["gap"] > 0.3
    assert json.dumps(greedy.numbers)
