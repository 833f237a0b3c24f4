"""What the doctor's tests build hand-overs of: texts, tiny networks a step of noise apart, files of rows."""

import json
import random
from pathlib import Path

import torch
from transformers import LlamaConfig

WORDS = "the cat sat on a mat and then it ate my hat so I was sad but the dog ran far away into rain".split()


def text(number: int, words: int) -> str:
    """`words` words, drawn by `number`."""
    return " ".join(random.Random(number).choices(WORDS, k=words))


def llama(auto: type, tokenizer, seed: int, **more):
    """A 2-layer Llama of hidden size 32 with weights large enough to tell its inputs apart."""
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 96}
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return auto(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.15, **size, **special, **more))


def moved(network, source, by: float, seed: int):
    """The network with the source's body, each weight moved by normal noise."""
    network.load_state_dict(source.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(by * torch.randn(weight.shape, generator=generator))
    return network


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def save(network, tokenizer, path: Path) -> str:
    """A Hugging Face directory of both."""
    network.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
