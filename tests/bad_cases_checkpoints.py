"""Cases of bad input: checkpoints. `good.ckpt` in the current folder is of an SFT run from `sft`, `reward.ckpt` of a PairwiseReward run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bad_inputs import OK, Case, folder, lines, sft

NEW = "or start a new run without ckpt_path"


class Trap:
    """Unpickling it makes the file `canary`."""

    def __reduce__(self):
        return Path.touch, (Path("canary").absolute(),)


def resumed(path: str, *more: str, model: str = "sft", command: str = "fit") -> list[str]:
    return sft(lines(*[OK] * 4), f"--ckpt_path={path}", *more, model=model, command=command)


def bad(content: bytes) -> str:
    Path("bad.ckpt").write_bytes(content)
    return "bad.ckpt"


def edited(change: Callable[[dict[str, Any]], Any]) -> str:
    """A copy of good.ckpt with something changed."""
    found = torch.load("good.ckpt", weights_only=True)
    change(found)
    torch.save(found, "bad.ckpt")
    return "bad.ckpt"


def trained() -> str:
    """The run's directory, with one weight changed since the checkpoint."""
    from safetensors.torch import load_file, save_file

    path = folder()
    weights = load_file(f"{path}/model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, f"{path}/model.safetensors", metadata={"format": "pt"})
    return path


def wider() -> str:
    """A language model of the same family and another width."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree("sft", "mine", ignore=shutil.ignore_patterns("*.safetensors"))
    found = json.loads(Path("mine/config.json").read_text()) | {"hidden_size": 64, "head_dim": 16}
    Path("mine/config.json").write_text(json.dumps(found))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("mine")).save_pretrained("mine")
    return "mine"


def cut() -> str:
    content = Path("good.ckpt").read_bytes()
    return bad(content[: len(content) // 2])


CASES = [
    Case("checkpoint", "a checkpoint that does not exist", lambda: resumed("none.ckpt"), ("at none.ckpt", "--ckpt_path last")),
    Case("checkpoint", "a checkpoint that is cut off", lambda: resumed(cut()), ("bad.ckpt cannot be read", "damaged", "good.ckpt")),
    Case("checkpoint", "an empty checkpoint", lambda: resumed(bad(b"")), ("bad.ckpt cannot be read", "0 bytes", "good.ckpt")),
    Case(
        "checkpoint",
        "a text as a checkpoint",
        lambda: resumed(bad(b"my thesis")),
        ("bad.ckpt holds more than tensors and plain data", "not loaded", "good.ckpt"),
    ),
    Case(
        "checkpoint",
        "a damaged checkpoint to validate",
        lambda: resumed(cut(), "--data.val_data=rows.jsonl", command="validate"),
        ("bad.ckpt cannot be read", "damaged", "good.ckpt"),
    ),
    Case(
        "checkpoint",
        "a checkpoint with code in it",
        lambda: resumed(edited(lambda found: found.update(trap=Trap()))),
        ("bad.ckpt holds more than tensors and plain data", "could be code", "not loaded", "good.ckpt"),
    ),
    Case(
        "checkpoint",
        "a pickle with code in it",
        lambda: resumed((torch.save(Trap(), "bad.ckpt"), "bad.ckpt")[1]),
        ("bad.ckpt holds more than tensors and plain data", "could be code", "not loaded", "good.ckpt"),
    ),
    Case(
        "checkpoint",
        "a file of weights alone",
        lambda: resumed((torch.save({"weight": torch.zeros(1)}, "bad.ckpt"), "bad.ckpt")[1]),
        ("bad.ckpt is a torch file, but no checkpoint", "good.ckpt"),
    ),
    Case(
        "checkpoint",
        "a folder as a checkpoint",
        lambda: resumed((Path("empty").mkdir(), "empty")[1]),
        ("the checkpoint empty is a directory without a sharded checkpoint", "give a file"),
    ),
    Case(
        "checkpoint",
        "a model directory as a checkpoint",
        lambda: resumed("sft"),
        ("the checkpoint sft is a directory", "it is a model directory", "`model`"),
    ),
    Case(
        "checkpoint",
        "a checkpoint as a model",
        lambda: sft(lines(OK), model="good.ckpt"),
        ("good.ckpt", "is a checkpoint", "--ckpt_path"),
        2,
    ),
    Case(
        "checkpoint",
        "a checkpoint of another module",
        lambda: resumed("reward.ckpt"),
        ("the checkpoint is of PairwiseReward, and this run trains SFT", "give one of its own"),
    ),
    Case(
        "checkpoint",
        "a checkpoint of another version of lit_rlhf",
        lambda: resumed(edited(lambda found: found["lit_rlhf"].update(format=99))),
        ("the checkpoint has format 99", "reads format 1", "start from an exported directory"),
    ),
    Case(
        "checkpoint",
        "a checkpoint of somebody else's module",
        lambda: resumed(edited(lambda found: found.pop("lit_rlhf"))),
        ("the checkpoint has no entry of lit_rlhf", "start from an exported directory"),
    ),
    Case(
        "checkpoint",
        "a checkpoint of weights alone",
        lambda: resumed(edited(lambda found: [found.pop(key) for key in ("optimizer_states", "lr_schedulers", "loops")])),
        ("the checkpoint holds weights alone", "no run can go on from it", "save_weights_only"),
    ),
    Case(
        "checkpoint",
        "a starting directory that has changed since",
        lambda: resumed("good.ckpt", model=trained()),
        ("mine", "put them back", NEW),
    ),
    Case(
        "checkpoint",
        "a checkpoint that lacks a weight",
        lambda: resumed(edited(lambda found: found["state_dict"].pop("policy.lm.model.norm.weight"))),
        ("the checkpoint lacks 1 of", "policy.lm.model.norm.weight", "give the model, peft"),
    ),
    Case(
        "checkpoint",
        "a checkpoint with a weight of another shape",
        lambda: resumed(edited(lambda found: found["state_dict"].update({"policy.lm.model.norm.weight": torch.zeros(9)}))),
        ("policy.lm.model.norm.weight", "(9,)", "(32,)", "give the model of its run"),
    ),
    Case("checkpoint", "a model of another size", lambda: resumed("good.ckpt", model=wider()), ("mine", "put them back", NEW)),
]
