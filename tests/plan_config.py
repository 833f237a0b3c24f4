"""YAML files for the tests of `lit-rlhf plan`."""

from pathlib import Path

import yaml


def write_config(
    folder: Path, directory: str, stage: str, model: dict | None = None, data: dict | None = None, trainer: dict | None = None
) -> str:
    """A YAML file of a stage on the models in `directory`; its path."""
    module, rows = {
        "sft": ("SFT", "SFTDataModule"),
        "reward": ("PairwiseReward", "PairwiseDataModule"),
        "ppo": ("PPO", "PromptDataModule"),
    }[stage]
    first = {"model": directory} | ({"reward_model": directory, "batch_size": 8} if stage == "ppo" else {})
    size = {} if stage == "ppo" else {"batch_size": 8}
    whole = {
        "trainer": trainer or {},
        "model": {"class_path": module, "init_args": first | (model or {})},
        "data": {"class_path": rows, "init_args": {"data": "none.jsonl"} | size | (data or {})},
    }
    path = folder / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(whole))
    return str(path)
