"""The tokenizer and the untrained model."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_rlhf.networks import CausalPolicy, load_tokenizer
from lit_rlhf.quickstart import words
from lit_rlhf.quickstart.model import train_tokenizer, write_untrained
from lit_rlhf.quickstart.world import raw_row


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    return train_tokenizer(text for _ in range(500) for text in (lambda row: (" " + row["summary"], "POST: " + row["post"]))(raw_row(rng)))


@pytest.mark.parametrize("text", [" my uncle sold my bike. should I move out?", "POST: Wörter, 日本語, \t\n <eos?> 🙂", ""])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_single_word_value_is_one_token(tokenizer):
    for values in words.VALUES.values():
        for value in values:
            assert len(tokenizer(f" {value}")["input_ids"]) == len(value.split()), value
    assert len(tokenizer) <= 800


def test_untrained_directory_loads_as_any_other(tokenizer, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_untrained(tmp_path / name, tokenizer, seed)
    first, again, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name).model.embed_tokens.weight for name in "abc")
    assert torch.equal(first, again) and not torch.equal(first, other)
    loaded = load_tokenizer(str(tmp_path / "a"))
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.bos_token_id) == (0, 1, None)
    policy = CausalPolicy.load(str(tmp_path / "a"))
    assert policy.form == "trees" and policy.context_length == 160
    assert sum(p.numel() for p in policy.parameters()) < 600_000
