"""Directories: what is saved is what was trained, for every family and adapter, and what cannot be loaded says so."""

import peft
import pytest
import torch
from families import PACKED, PLAIN, TOKENIZER, build
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, T5Config

from lit_rlhf.networks import CausalPolicy, ScalarModel
from lit_rlhf.pretrained import add_adapter, check_source, disable_dropout, freeze, load_model, load_tokenizer

IDS = torch.arange(2, 30)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def stub(monkeypatch):
    """The families' tokenizer, which writes no files."""
    monkeypatch.setattr(TOKENIZER, "save_pretrained", lambda directory: None, raising=False)
    return TOKENIZER


@pytest.mark.parametrize("family", [*PACKED, *PLAIN])
def test_saved_directories_give_the_same_numbers(family, tmp_path, stub):
    lm = build(AutoModelForCausalLM, family)
    CausalPolicy(lm, stub).save(tmp_path / "lm")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    torch.testing.assert_close(logits(disable_dropout(again) or again), logits(lm), atol=1e-5, rtol=0)
    model = build(AutoModelForSequenceClassification, family, num_labels=1)
    ScalarModel(model, stub).save(tmp_path / "scalar")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scalar")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=0)
    freeze(lm, 1)
    frozen = {name for name, p in lm.named_parameters() if not p.requires_grad}
    assert any(".0." in name for name in frozen) and not any(".1." in name for name in frozen)
    assert not lm.get_input_embeddings().weight.requires_grad


ADAPTERS = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_alpha": 7},
    "bias": {"bias": "lora_only"},
    "patterns": {"rank_pattern": {"q_proj": 2}},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_merged_adapters(kind, tmp_path, stub):
    lm = build(AutoModelForCausalLM, "llama", tie_word_embeddings=False)
    before = logits(lm)
    add_adapter(lm, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]} | ADAPTERS[kind]))
    torch.manual_seed(5)
    with torch.no_grad():
        for p in lm.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    CausalPolicy(lm, stub).save(tmp_path)
    assert (logits(lm) - before).abs().max() > 0.1
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(lm), atol=1e-4, rtol=0)


def test_adapters_that_no_export_could_hold_are_refused():
    for config in (
        peft.LoraConfig(use_dora=True),
        peft.LoraConfig(modules_to_save=["lm_head"]),
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    ):
        with pytest.raises(ValueError, match="cannot be merged into an exported directory"):
            add_adapter(build(AutoModelForCausalLM, "llama"), config)


def test_gpt2s_transposed_layers_merge_too(tmp_path, stub):
    lm = build(AutoModelForCausalLM, "gpt2")
    add_adapter(lm, peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False))
    CausalPolicy(lm, stub).save(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(lm), atol=1e-4, rtol=0)


def test_dropout_is_off_unless_asked(tmp_path, tokenizer):
    GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.5, resid_pdrop=0.5).save_pretrained(tmp_path)
    lm = AutoModelForCausalLM.from_config(GPT2Config.from_pretrained(tmp_path))
    lm.save_pretrained(tmp_path)
    off, on = (load_model(AutoModelForCausalLM, str(tmp_path), tokenizer, dropout=dropout).train() for dropout in (False, True))
    assert torch.equal(logits(off), logits(off)) and not torch.equal(logits(on), logits(on))
    assert off.config.attn_pdrop == 0.5  # the directory that is written keeps its config


def test_what_cannot_be_loaded_says_why(tmp_path, sft_dir, tokenizer):
    T5Config(vocab_size=300).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"encoder-decoder \(t5\); lit_rlhf works on causal decoders only"):
        load_model(AutoModelForCausalLM, str(tmp_path / "t5"), tokenizer)
    with pytest.raises(FileNotFoundError, match="run the stage that writes it first"):
        check_source("runs/x/sft/hf")
    assert check_source("EleutherAI/pythia-160m") and check_source("gpt2")
    build(AutoModelForCausalLM, "llama").save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="ids up to 299, the model's table has 100 rows"):
        load_model(AutoModelForCausalLM, str(tmp_path / "small"), tokenizer)
    with pytest.raises(ValueError, match="frozen_layers is 3, the model has 2 blocks"):
        CausalPolicy.load(sft_dir, frozen_layers=3)
    tokenizer.save_pretrained(tmp_path / "noeos")
    (tmp_path / "noeos" / "config.json").write_text("{}")
    other = load_tokenizer(str(tmp_path / "noeos"))
    other.eos_token = None
    other.save_pretrained(tmp_path / "noeos")
    with pytest.raises(ValueError, match="has no EOS token, so no response could end"):
        load_tokenizer(str(tmp_path / "noeos"))


def test_weights_train_in_float32_unless_asked(tmp_path, sft_dir, tokenizer):
    AutoModelForCausalLM.from_pretrained(sft_dir).bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert CausalPolicy.load(str(tmp_path)).lm.dtype == torch.float32
    assert CausalPolicy.load(str(tmp_path), dtype="bfloat16").lm.dtype == torch.bfloat16


def test_new_heads(sft_dir, reward_dir):
    """std = 1 / sqrt(H + 1) = 0.174 for H = 32; zero for a value network; never in place of a saved one."""
    torch.manual_seed(0)
    weights = torch.cat([ScalarModel.load(sft_dir, head="new").head.weight for _ in range(20)])
    assert float(weights.std()) == pytest.approx(0.174, rel=0.1) and abs(float(weights.mean())) < 0.03
    assert (ScalarModel.load(sft_dir, head="zero").head.weight == 0).all()
    saved = AutoModelForSequenceClassification.from_pretrained(reward_dir).score.weight
    assert all(torch.equal(ScalarModel.load(reward_dir, head=head).head.weight, saved) for head in ("saved", "new", "zero"))
