"""The run as a whole: commands, a run of a few steps, and (slow) the real one on three seeds."""

import json
import math
from pathlib import Path

import pytest

from lit_rlhf.quickstart import evaluate
from lit_rlhf.quickstart.run import config_file, main, quickstart, settings, stage_command

TINY = {
    "sft_train": 64,
    "comparisons_train": 64,
    "prompts_train": 32,
    "sft_valid": 8,
    "comparisons_valid": 8,
    "prompts_valid": 8,
    "held_out": 16,
}
SHORT = {"ppo": ["--trainer.max_epochs=2", "--model.init_args.batch_size=8", "--model.init_args.sampling.max_new_tokens=8"]}


def test_default_folder_needs_no_overrides():
    for stage in ("sft", "reward", "ppo"):
        assert stage_command(stage, Path("runs/quickstart"), 7) == ["fit", "--config", str(config_file(stage)), "--seed_everything=7"]


def test_another_folder_is_overridden_wherever_the_yaml_names_the_default(tmp_path):
    command = stage_command("ppo", tmp_path, 0)
    assert f"--model.init_args.model={tmp_path}/sft/hf" in command
    assert f"--model.init_args.reward_model={tmp_path}/reward/hf" in command
    (callbacks,) = (part for part in command if part.startswith("--trainer.callbacks="))
    assert json.loads(callbacks.split("=", 1)[1])[0]["init_args"]["dirpath"] == f"{tmp_path}/ppo/hf"
    assert not any("runs/quickstart" in part for part in command)


def test_a_short_run_leaves_every_directory_and_the_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "FRESH_PAIRS", 20)
    assert quickstart(tmp_path, 0, TINY, SHORT) == 0
    for where in ("init", "sft/hf", "reward/hf", "ppo/hf/policy", "ppo/hf/value"):
        assert (tmp_path / where / "config.json").is_file() and (tmp_path / where / "tokenizer.json").is_file()
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for row in report["stages"]] == ["untrained", "SFT", "PPO"]
    for row in report["stages"]:
        assert list(row) == ["name", "gold", "gold_stderr", "score", "kl", "length", "rouge1", "rouge2", "rougeL"]
        assert all(math.isfinite(value) for key, value in row.items() if key != "name")
    assert report["stages"][1]["kl"] == pytest.approx(0, abs=1e-5)
    assert 0 <= report["reward_accuracy"] <= 1
    assert set(report["seconds"]) == {"world", "sft", "reward", "ppo", "evaluation", "total"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") >= 5 and "http" not in page
    assert "standard errors" in capsys.readouterr().out


def test_a_stage_that_is_refused_ends_the_run(tmp_path):
    assert quickstart(tmp_path, 0, TINY, {"sft": ["--model.init_args.no_such_key=1"]}) == 2
    assert not (tmp_path / "reward").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_real_run_reaches_its_targets(tmp_path, seed):
    assert main(["--out", str(tmp_path), "--seed", str(seed)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    untrained, sft, ppo = report["stages"]
    assert report["posts"] >= 256
    assert report["ppo_minus_sft"]["standard_errors"] > 4
    assert ppo["kl"] < 1.5 * settings("ppo")["model"]["init_args"]["kl_target"]
    assert report["reward_accuracy"] >= 0.85
    for key in ("rouge1", "rouge2", "rougeL"):
        assert sft[key] >= 2 * untrained[key]
