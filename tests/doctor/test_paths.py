"""One text, many paths: plain networks agree, and what reads padding does not."""

import pytest
import torch
from families import GPT2
from transformers import AutoConfig, AutoModelForSequenceClassification

from lit_rlhf.doctor.paths import paths


def test_all_paths_agree(case):
    found = paths(case())
    assert found.status == "pass" and max(found.numbers.values()) < 1e-4
    assert {"transformers, alone", "transformers, right padded", "transformers, left padded", "left padded", "alone"} <= set(found.numbers)


def test_pad_is_eos(case, changed, reward_dir):
    broken = {"tokenizer_config.json": {"pad_token": "<eos>"}, "config.json": {"pad_token_id": 1}}
    found = paths(case(reward=changed(reward_dir, broken)))
    assert found.status == "fail" and "plain transformers finds another last token" in found.reason
    assert found.numbers["left padded"] < 1e-4 and found.numbers["transformers, right padded"] > 0.01


@pytest.fixture
def gpt2(tmp_path, tokenizer) -> str:
    """A GPT-2 reward model, whose positions are learnt."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", **GPT2 | {"vocab_size": len(tokenizer)}, num_labels=1, pad_token_id=0, eos_token_id=1)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(50)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_gpt2_by_our_paths(case, gpt2):
    found = paths(case(reward=gpt2))
    assert found.status == "pass" and found.numbers["left padded without position ids"] > 0.01
    assert "left padding without position ids would differ" in found.measured


@pytest.mark.parametrize(("positions", "status"), [(True, "pass"), (False, "fail")])
def test_a_function_that_pads_on_the_left(case, gpt2, tokenizer, positions, status):
    model = AutoModelForSequenceClassification.from_pretrained(gpt2).eval()
    left = type(tokenizer).from_pretrained(gpt2, padding_side="left")

    def reward(prompts, responses):
        rows = left([p + r + "<eos>" for p, r in zip(prompts, responses, strict=True)], return_tensors="pt", padding=True)
        where = {"position_ids": (rows["attention_mask"].cumsum(1) - 1).clamp(min=0)} if positions else {}
        with torch.no_grad():
            return model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], **where).logits[:, 0].tolist()

    found = paths(case(reward=reward))
    assert found.status == status
    assert positions or "wrong positions" in found.reason


def test_a_function_of_the_order(case):
    found = paths(case(reward=lambda prompts, responses: [float(i) for i in range(len(responses))]))
    assert found.status == "fail" and "in the opposite order" in found.measured
