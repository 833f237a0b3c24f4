"""RewardReport in validate and test, in Python and on the command line, on one rank and on two."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSequenceClassification

from lit_rlhf import PairwiseDataModule, PairwiseReward, RewardReport, Schedule
from lit_rlhf.cli import main


@pytest.fixture
def margins(reward_dir, tokenizer, pair_rows) -> list[float]:
    """Score of chosen minus score of rejected by plain transformers, row by row."""
    model = AutoModelForSequenceClassification.from_pretrained(reward_dir)

    def score(row, name):
        ids = tokenizer(row["prompt"])["input_ids"] + tokenizer(row[name])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            return float(model(input_ids=torch.tensor([ids])).logits)

    return [score(row, "chosen") - score(row, "rejected") for row in pair_rows]


def data(rows, **kwargs):
    return PairwiseDataModule(rows, val_data=rows, test_data=rows, batch_size=4, val_batch_size=5, **kwargs)


def read(path):
    return json.loads((path / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_the_report_is_of_transformers_scores(make_trainer, reward_dir, pair_rows, margins, tmp_path, stage):
    trainer = make_trainer(callbacks=[RewardReport()])
    getattr(trainer, stage)(PairwiseReward(reward_dir), datamodule=data(pair_rows))
    found = read(tmp_path)
    assert found["pairs"] == 16 and found["accuracy"]["mean"] == pytest.approx(sum(m > 0 for m in margins) / 16)
    assert found["loss"]["mean"] == pytest.approx(
        sum(torch.nn.functional.softplus(-torch.tensor(m)).item() for m in margins) / 16, abs=1e-5
    )
    (groups,) = (s["blocks"][-1]["rows"] for s in found["sections"] if s["title"] == "By group")
    for column, value, count, accuracy in groups:
        own = [m > 0 for m, row in zip(margins, pair_rows, strict=True) if row["worker"] == value]
        assert column == "worker" and count == 8 and accuracy["mean"] == pytest.approx(sum(own) / 8)
    worst = min(range(16), key=margins.__getitem__)
    first = found["sections"][-1]["blocks"][0]["samples"][0]
    assert first["prompt"] == pair_rows[worst]["prompt"] and first["answers"][0]["text"] == pair_rows[worst]["chosen"]


def test_after_training_in_a_folder_and_in_tensorboard(make_trainer, sft_dir, pair_rows, tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path / "logs")
    trainer = make_trainer(
        max_steps=30, callbacks=[RewardReport(str(tmp_path / "here"))], logger=logger, check_val_every_n_epoch=15, val_check_interval=1.0
    )
    module = PairwiseReward(sft_dir, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3), scheduler=Schedule("constant"))
    trainer.fit(module, datamodule=PairwiseDataModule(pair_rows, val_data=pair_rows, batch_size=8))
    found = read(tmp_path / "here")
    assert found["accuracy"]["mean"] == 1.0 and "30 optimiser steps" in found["lead"]
    assert found["sections"][-1]["blocks"][0]["text"] == "None: the model agrees with every choice."
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert "report/Calibration/Reliability" in events.Tags()["images"]


def test_two_ranks_write_one_report(make_trainer, reward_dir, pair_rows, margins, tmp_path):
    make_trainer(callbacks=[RewardReport()], devices=2, strategy="ddp_fork").validate(
        PairwiseReward(reward_dir), datamodule=data(pair_rows)
    )
    found = read(tmp_path)
    assert found["pairs"] == 16 and found["accuracy"]["mean"] == pytest.approx(sum(m > 0 for m in margins) / 16)
    assert found["loss"]["mean"] == pytest.approx(
        sum(torch.nn.functional.softplus(-torch.tensor(m)).item() for m in margins) / 16, abs=1e-5
    )


@pytest.fixture
def command(tmp_path, pair_rows):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pair_rows))

    def make(subcommand: str, model: str) -> list[str]:
        quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
        sources = [f"--data.{name}={rows}" for name in ("data", "val_data", "test_data")]
        return [
            subcommand,
            "--model=PairwiseReward",
            f"--model.model={model}",
            "--data=PairwiseDataModule",
            *sources,
            *quiet,
            f"--trainer.default_root_dir={tmp_path}",
        ]

    return make


@pytest.mark.parametrize("subcommand", ["validate", "test"])
def test_the_command_line_writes_it(command, reward_dir, tmp_path, subcommand, recwarn):
    assert main(command(subcommand, reward_dir)) == 0
    assert read(tmp_path)["pairs"] == 16
    assert not [w for w in recwarn if "reward head" in str(w.message)]


def test_a_head_that_nobody_trained_is_said(command, sft_dir):
    with pytest.warns(UserWarning, match="has no reward head.*--model.model"):
        assert main(command("test", sft_dir)) == 0
