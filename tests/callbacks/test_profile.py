"""Profile: the overlay configs/profile.yaml leaves a trace that opens and has what the recorded steps did."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from lit_rlhf import SFT, Sampling, SFTDataModule
from lit_rlhf.callbacks import Profile
from lit_rlhf.cli import config_dir, main


def spans(folder: Path) -> list[dict]:
    """The trace's complete events, in order."""
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    return sorted((e for e in events if e.get("ph") == "X"), key=lambda e: e["ts"])


@pytest.fixture
def rows_file(tmp_path, sft_rows) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sft_rows))
    return str(path)


def test_the_overlay_records_one_ppo_iteration(sft_dir, reward_dir, rows_file, tmp_path, monkeypatch):
    """Of three iterations of four steps the second one, with its rollout; the run ends as it does without."""
    monkeypatch.chdir(tmp_path)
    command = ["fit", f"--config={config_dir() / 'local/ppo.yaml'}", f"--config={config_dir() / 'profile.yaml'}"]
    command += [
        f"--model.model={sft_dir}",
        f"--model.reward_model={reward_dir}",
        f"--data.data={rows_file}",
        f"--data.val_data={rows_file}",
    ]
    command += ["--trainer.max_epochs=3", "--trainer.accelerator=cpu", "--model.batch_size=8", "--model.sampling.max_new_tokens=6"]
    assert main([*command, "--trainer.logger=false", "--trainer.enable_progress_bar=false"]) == 0
    assert (tmp_path / "runs/local/ppo/hf/policy/config.json").is_file()  # callbacks of the run are still there
    folder = tmp_path / "runs/local/ppo/profile"
    found = spans(folder)
    phases = [e for e in found if e["name"] in ("sampling", "scoring", "update")]
    names = Counter(e["name"] for e in phases)
    assert (names["sampling"], names["scoring"]) == (1, 1) and names["update"] in (5, 6)  # before the rollout, after it, three more steps
    order = [e["name"] for e in phases if e["name"] != "update"]
    assert order == ["sampling", "scoring"]
    sampling, scoring = (next(e for e in phases if e["name"] == name) for name in order)
    assert sampling["ts"] + sampling["dur"] <= scoring["ts"] + 1
    steps = [e for e in found if e["name"].startswith("Optimizer.step")]
    assert len(steps) == 4 and all(e["ts"] > scoring["ts"] for e in steps)
    products = [e for e in found if e["name"] in ("aten::mm", "aten::addmm", "aten::bmm")]
    assert any(sampling["ts"] < e["ts"] < sampling["ts"] + sampling["dur"] for e in products)
    table = (folder / "table.txt").read_text()
    assert "aten::mm" in table and "Self CPU" in table


@pytest.fixture
def profiled(make_trainer, sft_dir, sft_rows, tmp_path):
    """profiled(callback, **Trainer's) -> the trace's spans of a fit of six optimiser steps."""

    def run(callback: Profile, **kwargs) -> list[dict]:
        module = SFT(sft_dir, sampling=Sampling(4, 0.0))
        make_trainer(callbacks=[callback], **({"max_steps": 6} | kwargs)).fit(module, SFTDataModule(sft_rows, batch_size=4))
        return spans(tmp_path / "profile")

    return run


def optimiser_steps(found: list[dict]) -> int:
    return sum(e["name"].startswith("Optimizer.step") for e in found)


@pytest.mark.parametrize(("arguments", "steps"), [({}, 2), ({"skip": 0, "steps": 3}, 3), ({"skip": 4, "steps": 9}, 2)])
def test_how_many_steps_are_recorded(profiled, arguments, steps):
    """The last one asks for more than the run has left."""
    assert optimiser_steps(profiled(Profile(**arguments), accumulate_grad_batches=2)) == steps


def test_memory_and_stacks(profiled):
    plain, more = profiled(Profile()), profiled(Profile(memory=True, stacks=True))
    assert not any("Call stack" in e.get("args", {}) or e.get("cat") == "python_function" for e in plain)
    assert any("Call stack" in e.get("args", {}) or e.get("cat") == "python_function" for e in more)


def test_memory_is_in_the_table(profiled, tmp_path):
    profiled(Profile(dirpath=str(tmp_path / "profile"), memory=True))
    assert "CPU Mem" in (tmp_path / "profile" / "table.txt").read_text()


def test_a_run_that_is_too_short_says_so(make_trainer, sft_dir, sft_rows, tmp_path, caplog):
    with caplog.at_level("INFO"):
        make_trainer(callbacks=[Profile(skip=5)], max_steps=2).fit(SFT(sft_dir), SFTDataModule(sft_rows, batch_size=4))
    assert "ended within its first 5 steps" in caplog.text and not (tmp_path / "profile").exists()


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="skip must be at least 0 and steps at least 1, got 2 and 0"):
        Profile(steps=0)
