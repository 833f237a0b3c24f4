"""Fixtures that several test files share: a tiny tokenizer and model directory, quiet trainers, a data sets' cache of the tests' own."""

import logging
import random
from pathlib import Path

import datasets
import lightning as L
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

WORDS = "the cat sat on a mat and then it ate my hat so I was sad but the dog ran far away into rain".split()
CONTEXT = 96


def text(number: int, words: int) -> str:
    """`words` words, drawn by `number`."""
    return " ".join(random.Random(number).choices(WORDS, k=words))


@pytest.fixture(autouse=True)
def quiet(tmp_path_factory, monkeypatch):
    """No seed, rank, address, port or logger's level left behind by another test, and no files in the user's cache."""
    lightning = logging.getLogger("lightning.pytorch")
    lightning.setLevel(logging.INFO)
    monkeypatch.setattr(lightning, "propagate", True)  # for caplog
    for name in ("PL_GLOBAL_SEED", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "hf-cache"))
    datasets.disable_progress_bars()
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens; <pad> 0, <eos> 1, <extra> 2 (a special token that has no job)."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>", "<extra>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text(i, 30) for i in range(20)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", model_max_length=CONTEXT)


def llama(auto: type, tokenizer: PreTrainedTokenizerFast, seed: int, **more):
    """A 2-layer Llama of hidden size 32 with weights large enough to tell its inputs apart."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )
    return auto(config)


@pytest.fixture(scope="session")
def sft_dir(tmp_path_factory, tokenizer) -> str:
    """A language model's directory; the policy ends about one response in six at each token, so that lengths differ."""
    path = tmp_path_factory.mktemp("sft")
    lm = llama(LlamaForCausalLM, tokenizer, seed=1)
    with torch.no_grad():
        lm.lm_head.weight[tokenizer.eos_token_id] *= 4
    lm.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def reward_dir(tmp_path_factory, tokenizer) -> str:
    """A reward model's directory, whose reference mean is 0.5."""
    path = tmp_path_factory.mktemp("reward")
    model = llama(LlamaForSequenceClassification, tokenizer, seed=2, num_labels=1, reward_mean=0.5)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def sft_rows() -> list[dict]:
    return [{"prompt": text(i, 3 + i % 5), "label": text(100 + i, 1 + i % 6)} for i in range(16)]


@pytest.fixture
def pair_rows() -> list[dict]:
    rows = [{"prompt": text(i, 3 + i % 5), "chosen": text(200 + i, 1 + i % 6), "rejected": text(300 + i, 1 + i % 4)} for i in range(16)]
    return [row | {"worker": "ab"[i % 2]} for i, row in enumerate(rows)]


@pytest.fixture
def make_trainer(tmp_path):
    """make_trainer(**arguments) -> a CPU Trainer without bars, logs or checkpoints unless asked."""

    def make(**kwargs) -> L.Trainer:
        plain = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": Path(tmp_path),
        }
        return L.Trainer(**(plain | kwargs))

    return make
