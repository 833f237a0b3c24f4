"""Measures the tensor bytes of real training steps on a CPU and compares them with what `lit-rlhf plan` says.

    python tutorials/memory/measure.py DIR OUT.json [--only NAME]

DIR is a Hugging Face directory with weights (the figures of tutorials/memory.md: SmolLM2-135M). Rows are made here, all of one length, so
that what is compared is the arithmetic and not a guess about the data. Every setting runs in a process of its own.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from transformers import AutoTokenizer

from lit_rlhf import cli
from lit_rlhf.planning.measure import measure
from lit_rlhf.planning.run import main as plan

WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they".split()
SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {"stage": "sft", "prompt": 128, "response": 32, "data.batch_size": 8, "data.val_batch_size": 8},
    "sft-long": {"stage": "sft", "prompt": 448, "response": 64, "data.batch_size": 4, "data.val_batch_size": 4},
    "sft-bf16": {
        "stage": "sft",
        "prompt": 128,
        "response": 32,
        "data.batch_size": 8,
        "data.val_batch_size": 8,
        "trainer.precision": "bf16-mixed",
    },
    "sft-many": {"stage": "sft", "prompt": 64, "response": 32, "data.batch_size": 64, "trainer.accumulate_grad_batches": 2},
    "reward": {"stage": "reward", "prompt": 128, "response": 32, "data.batch_size": 8},
    "reward-long": {"stage": "reward", "prompt": 384, "response": 64, "data.batch_size": 4, "trainer.accumulate_grad_batches": 2},
    "ppo": {"stage": "ppo", "prompt": 128, "response": 24, "model.batch_size": 16, "trainer.accumulate_grad_batches": 2},
    "ppo-many": {
        "stage": "ppo",
        "prompt": 64,
        "response": 16,
        "model.batch_size": 64,
        "model.responses_per_prompt": 4,
        "trainer.accumulate_grad_batches": 2,
        "model.tokens_per_forward": 2048,
    },
}


def rows(tokenizer: Any, stage: str, prompt: int, response: int, count: int = 128) -> list[dict[str, str]]:
    """Rows of words that are one token each: prompts of `prompt` tokens, responses of `response` with their EOS."""
    words = [w for w in WORDS if len(tokenizer(w)["input_ids"]) == len(tokenizer(" " + w)["input_ids"]) == 1]
    draw = random.Random(0)

    def text(n: int) -> str:
        return " ".join(draw.choices(words, k=n))

    made = [{"prompt": text(prompt), "chosen": " " + text(response - 1), "rejected": " " + text(response - 1)} for _ in range(count)]
    return made if stage == "reward" else [{"prompt": row["prompt"], "label": row["chosen"]} for row in made]


def options(model: str, setting: dict[str, Any], folder: Path) -> list[str]:
    """The command line of a setting, for `fit` and for `plan`."""
    setting = dict(setting)
    stage, prompt, response = setting.pop("stage"), setting.pop("prompt"), setting.pop("response")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(AutoTokenizer.from_pretrained(model), stage, prompt, response)))
    config = yaml.safe_load((cli.config_dir() / "local" / f"{stage}.yaml").read_text())
    config["trainer"] = {
        "accelerator": "cpu",
        "max_epochs": 100,
        "max_steps": 3 if stage != "ppo" else 6,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 1,
        "default_root_dir": str(folder),
    } | ({"check_val_every_n_epoch": 2} if stage == "ppo" else {"val_check_interval": 2})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    args = ["--config", str(folder / "config.yaml"), "--data.data", str(data), "--data.val_data", str(data), "--data.limit_val_rows", "16"]
    setting |= {"model.model": model} | ({"model.sampling.max_new_tokens": response} if stage != "reward" else {})
    setting |= {"model.reward_model": "null", "model.reward_fn": "tutorials.memory.measure.length"} if stage == "ppo" else {}
    return [*args, *(f"--{name}={value}" for name, value in setting.items())]


def length(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that costs no memory."""
    return [float(len(r)) for r in responses]


def one(model: str, name: str) -> dict[str, Any]:
    """Measured and planned bytes by phase of one setting."""
    setting = SETTINGS[name]
    with tempfile.TemporaryDirectory() as folder:
        args = options(model, setting, Path(folder))

        def fit(callback: L.Callback) -> None:
            built = cli.build(["fit", *args])
            built.trainer.callbacks.append(callback)
            built.run()

        measured = measure(fit)
        out = Path(folder) / "plan.json"
        lengths = [f"--prompt_tokens={setting['prompt']}", f"--response_tokens={setting['response']}"]
        plan([*args, *lengths, "--devices=1", "--accelerator=cpu", "--device_memory=64GiB", "--flops=1e12", f"--json={out}"])
        planned = json.loads(out.read_text())["asked"]["peaks"]
    phases = {
        p: {"measured": measured[p], "planned": planned[p], "ratio": round(planned[p] / measured[p], 4)} for p in measured if p in planned
    }
    ratio = max(planned[p] for p in phases) / max(measured.values())
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"setting": setting, "phases": phases, "peak_ratio": round(ratio, 4), "process_peak_rss": rss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=list(SETTINGS))
    args = parser.parse_args()
    if args.only:
        args.out.write_text(json.dumps(one(args.model, args.only)))
        return
    found = {}
    for name in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "one.json"
            subprocess.run([sys.executable, __file__, args.model, str(part), "--only", name], check=True)
            found[name] = json.loads(part.read_text())
        print(name, found[name]["peak_ratio"], flush=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
