"""The command as users give it: the shipped configurations, the quickstart's world with its gold reward, real processes, a real SIGKILL."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_rlhf.data.text import format_tldr
from lit_rlhf.iterate.rounds import read_rows
from lit_rlhf.quickstart.model import train_tokenizer, write_untrained
from lit_rlhf.quickstart.run import config_file, sft_texts
from lit_rlhf.quickstart.world import gold, write_data

SIZES = {"sft_train": 64, "prompts_train": 24, "prompts_valid": 8}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Two rounds on a small forum, from an untrained model."""
    monkeypatch.chdir(tmp_path)
    write_data(Path("data"), 0, SIZES)
    write_untrained(Path("init"), train_tokenizer(sft_texts(Path("data/sft_train.jsonl"))), 0)
    ppo = ["trainer.max_epochs=2", "model.init_args.batch_size=8", "model.init_args.sampling.max_new_tokens=6"]
    ppo += ["model.init_args.kl_target=null", "model.init_args.collapse_patience=null"]
    ppo += ["data.init_args.data=data/prompts_train.jsonl", "data.init_args.val_data=data/prompts_valid.jsonl"]
    more = ["--gold=lit_rlhf.quickstart.world.gold", "--prompts=12", "--rounds=1"]
    return [sys.executable, "-m", "lit_rlhf", "iterate", "--sft=init", "--reward", str(config_file("reward")), "--ppo",
            str(config_file("ppo")), *ppo, *more]  # fmt: skip


@pytest.mark.slow
def test_killed_in_ppo_it_goes_on_in_new_processes(command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([*command, "--out=whole"], env=environment, check=False).returncode == 0
    process = subprocess.Popen([*command, "--out=cut"], env=environment, start_new_session=True)
    while not Path("cut/round-1/reward-0/done.json").is_file():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not Path("cut/round-1/ppo/done.json").exists()
    assert subprocess.run([*command, "--out=cut"], env=environment, check=False).returncode == 0
    for name in ("labels.jsonl", "evaluation.json", "reward-0/hf/model.safetensors", "ppo/hf/policy/model.safetensors"):
        assert Path("whole/round-1", name).read_bytes() == Path("cut/round-1", name).read_bytes(), name
    labels = read_rows(Path("cut/round-1/labels.jsonl"))
    references = {
        format_tldr(row["subreddit"], row["title"], row["post"]): " " + row["summary"]
        for row in read_rows(Path("data/prompts_train.jsonl"))
    }
    for row in labels:
        one, other = gold([row["prompt"]] * 2, [row["first"], row["second"]])
        assert row["preferred"] == (0.5 if one == other else float(one > other))
        for policy, text in zip(row["policies"], (row["first"], row["second"]), strict=True):
            assert (text == references[row["prompt"]]) == (policy == "reference")
    assert "reference" in {policy for row in labels for policy in row["policies"]}
    known = json.loads(Path("cut/report.json").read_text())["rounds"][0]
    assert known["labels"]["asked"] == 12 and known["gain"]["gold"] is not None
