"""Writes the tables of tutorials/memory.md: `lit-rlhf plan --table` for known public shapes, of which only a config.json is needed.

    python tutorials/memory/tables.py

The shapes are those of SmolLM2-135M, Llama-3.2-1B, Llama-2-7B and LLaMA-30B as their authors published them; no weights are involved.
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from lit_rlhf import cli
from lit_rlhf.planning.run import main as plan

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "30B": {
        "hidden_size": 6656,
        "intermediate_size": 17920,
        "num_hidden_layers": 60,
        "num_attention_heads": 52,
        "num_key_value_heads": 52,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
}
RUNS = {  # PPO with the settings of configs/tldr/ppo.yaml, one prompt a micro-batch where a model is large
    "135M": ["--devices=1"],
    "1B": ["--devices=8"],
    "7B": ["--devices=8", "--trainer.accumulate_grad_batches=64"],
    "30B": ["--devices=8", "--nodes=8", "--trainer.accumulate_grad_batches=8"],
}


def write_shape(name: str, folder: Path) -> str:
    """A directory with nothing but the config.json of that shape."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | SHAPES[name]))
    return str(folder)


def planned(name: str, folder: Path, *more: str) -> str:
    """What `lit-rlhf plan` prints for PPO with a model of that shape."""
    directory, printed = write_shape(name, folder / name), io.StringIO()
    config = cli.config_dir() / "tldr" / "ppo.yaml"
    with contextlib.redirect_stdout(printed):
        plan(["--config", str(config), f"--model.model={directory}", "--flops=400e12", *RUNS[name], *more])
    return printed.getvalue().replace(directory, name)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in SHAPES:
            print(f"## {name}\n", planned(name, Path(folder), "--table", "--device_memory=80GiB"), sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
