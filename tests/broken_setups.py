"""The quickstart's directories broken in twelve ways, for the doctor: edited, trained wrongly, or used wrongly."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf import cli
from lit_rlhf.data.tokenise import Encoder
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.quickstart.model import train_tokenizer
from lit_rlhf.quickstart.run import config_file, sft_texts
from lit_rlhf.quickstart.world import write_data

WORDS = 6  # of a summary that was cut


@dataclass(frozen=True)
class Broken:
    """One set-up: what a user did, how it is made here, what it changes of the healthy Case, and the checks that must name it."""

    name: str
    how: str
    make: Callable[["Bench"], dict[str, Any]]
    checks: tuple[str, ...]


class Bench:
    """A finished quickstart in `quick`, and a folder to break copies in."""

    def __init__(self, quick: Path, work: Path) -> None:
        self.quick, self.work = quick, work
        self.sft, self.reward, self.base = (str(quick / name) for name in ("sft/hf", "reward/hf", "init"))
        names = ("sft_train", "held_out", "comparisons_train", "comparisons_valid", "prompts_train")
        self.data = [str(quick / "data" / f"{name}.jsonl") for name in names]

    @property
    def healthy(self) -> dict[str, Any]:
        return {"sft": self.sft, "reward": self.reward, "base": self.base, "data": self.data}

    def copy(self, source: str, name: str, **changes: dict[str, Any]) -> str:
        """A copy of a directory; config={…} changes config.json, and so on."""
        target = self.work / name
        shutil.copytree(source, target)
        for file, values in changes.items():
            path = target / f"{file}.json"
            path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
        return str(target)

    def train(self, stage: str, name: str, *more: str, eos: bool = True) -> str:
        """The quickstart's stage with other arguments, and without EOS after the responses where asked; its directory."""
        out = self.work / name
        if not (out / "config.json").exists():
            data = {"sft": ("sft_train", "sft_valid"), "reward": ("comparisons_train", "comparisons_valid")}[stage]
            files = [f"--data.{key}={self.quick / 'data' / file}.jsonl" for key, file in zip(("data", "val_data"), data, strict=True)]
            start = f"--model.model={self.base if stage == 'sft' else self.sft}"
            folder = f"--trainer.callbacks.init_args.dirpath={out}"
            args = ["fit", f"--config={config_file(stage)}", start, *files, folder, "--trainer.logger=false", *more]
            with (
                mock.patch.object(Encoder, "response", Encoder.response if eos else lambda self, ids: ids),
                cache(self.work / f"cache-{name}"),
            ):
                assert cli.main(args) == 0
        return str(out)


def cache(folder: Path) -> Any:
    """A data sets' cache of its own: rows without EOS must not be taken for those with it."""
    return mock.patch.object(datasets.config, "HF_DATASETS_CACHE", str(folder))


def pad_is_eos(b: Bench) -> dict[str, Any]:
    wrong: dict[str, Any] = {"tokenizer_config": {"pad_token": "<eos>"}, "config": {"pad_token_id": 1}}
    return {"sft": b.copy(b.sft, "pad-sft", **wrong), "reward": b.copy(b.reward, "pad-reward", **wrong)}


def other_tokenizer(b: Bench) -> dict[str, Any]:
    write_data(b.work / "other", 99, {"sft_train": 2000})
    path = b.copy(b.reward, "other-tokenizer")
    train_tokenizer(sft_texts(b.work / "other" / "sft_train.jsonl")[::-1]).save_pretrained(path)
    return {"reward": path}


def reward_without_eos(b: Bench) -> dict[str, Any]:
    return {"reward": b.train("reward", "reward-no-eos", eos=False)}


def reward_from_raw(b: Bench) -> dict[str, Any]:
    return {"reward": b.train("reward", "reward-raw", f"--model.model={b.base}")}


def sft_without_eos(b: Bench) -> dict[str, Any]:
    return {"sft": b.train("sft", "sft-no-eos", "--data.limit_train_rows=7200", eos=False)}


def top_k(b: Bench) -> dict[str, Any]:
    return {"sft": b.copy(b.sft, "top-k", generation_config={"do_sample": True, "top_k": 5})}


def dropout_on(b: Bench) -> dict[str, Any]:
    return {"sft": CausalPolicy.load(b.copy(b.sft, "dropout", config={"attention_dropout": 0.1}), dropout=True)}


def new_head(b: Bench) -> dict[str, Any]:
    return {
        "reward": with_head(b, "new-head", lambda w: torch.randn(w.shape, generator=torch.Generator().manual_seed(0)) * w.shape[1] ** -0.5)
    }


def flipped(b: Bench) -> dict[str, Any]:
    return {"reward": with_head(b, "flipped", lambda w: -w)}


def with_head(b: Bench, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    path = b.copy(b.reward, name)
    weights = load_file(f"{path}/model.safetensors")
    save_file(weights | {"score.weight": change(weights["score.weight"])}, f"{path}/model.safetensors", {"format": "pt"})
    return path


def left_padding(b: Bench) -> dict[str, Any]:
    """A reward function around a GPT-2, whose positions are learnt; untrained, since padding is all that is to be seen."""
    tokenizer = AutoTokenizer.from_pretrained(b.sft, padding_side="left")
    torch.manual_seed(0)
    size = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 160, "num_labels": 1, "pad_token_id": 0, "initializer_range": 0.2}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("gpt2", vocab_size=len(tokenizer), **size)).eval()

    def gpt2_reward(prompts: list[str], responses: list[str]) -> list[float]:
        rows = tokenizer([p + r + "<eos>" for p, r in zip(prompts, responses, strict=True)], return_tensors="pt", padding=True)
        with torch.no_grad():
            return model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, 0].tolist()

    return {"reward": gpt2_reward}


def lora_beside(b: Bench) -> dict[str, Any]:
    """What `model.save_pretrained` leaves of a model with an adapter, beside the files of the base."""
    from peft import LoraConfig

    path = b.copy(b.base, "lora")
    lm = AutoModelForCausalLM.from_pretrained(b.base)
    lm.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    lm.save_pretrained(path)
    return {"sft": path}


def cut_summaries(b: Bench) -> dict[str, Any]:
    for name in ("sft_train", "sft_valid"):
        rows = [json.loads(line) for line in (b.quick / "data" / f"{name}.jsonl").read_text().splitlines()]
        cut = [row | {"summary": " ".join(row["summary"].split()[:WORDS])} for row in rows]
        (b.work / f"cut-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in cut))
    train = b.work / "cut-sft_train.jsonl"
    more = (f"--data.data={train}", f"--data.val_data={b.work / 'cut-sft_valid.jsonl'}", "--data.limit_train_rows=7200")
    return {"sft": b.train("sft", "sft-cut", *more), "data": [str(train), *b.data[1:]]}


SETUPS = [
    Broken("pad = EOS", "`pad_token: <eos>` in both tokenizers, its id in both configs", pad_is_eos, ("pad", "paths")),
    Broken("another tokenizer", "the reward model's directory holds a tokenizer trained on other posts", other_tokenizer, ("tokenizer",)),
    Broken("reward model without EOS", "trained on responses that do not end in EOS", reward_without_eos, ("eos_read",)),
    Broken("reward model from the raw LM", "trained from `init` instead of `sft/hf`", reward_from_raw, ("lineage",)),
    Broken("SFT without EOS", "trained on responses that do not end in EOS", sft_without_eos, ("ends",)),
    Broken("top-k sampling", "`top_k: 5` in SFT's generation_config.json", top_k, ("sampling",)),
    Broken("dropout on", "the live policy has `attention_dropout: 0.1` and keeps it", dropout_on, ("kl", "ratio")),
    Broken("head initialised anew", "`score.weight` drawn again", new_head, ("head", "accuracy")),
    Broken("reward's sign flipped", "`score.weight` negated", flipped, ("accuracy", "head")),
    Broken("position ids dropped", "a reward function pads a GPT-2 on the left and passes no position ids", left_padding, ("paths",)),
    Broken("LoRA not merged", "SFT's directory: the base, with an adapter beside it", lora_beside, ("merged",)),
    Broken("truncated summaries", f"SFT trained on summaries cut to {WORDS} words", cut_summaries, ("truncation", "length")),
]


def environment_quickstart() -> Path | None:
    """A finished quickstart that LIT_RLHF_QUICKSTART names, to spare the three minutes."""
    named = os.environ.get("LIT_RLHF_QUICKSTART")
    return Path(named) if named else None
