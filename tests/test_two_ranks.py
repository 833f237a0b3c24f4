"""Two gloo ranks under DDP give one process's texts, losses, metrics and weights, in all three stages."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow  # three processes, about 25 s of two idle cores
SCRIPT = Path(__file__).parent / "two_ranks.py"


def start(ranks: int, arguments: list[str]) -> list[subprocess.Popen]:
    """The processes of a run, with the variables that torchrun sets."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    plain = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    plain.pop("PL_GLOBAL_SEED", None)
    made = []
    for rank in range(ranks):
        names = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        extra = {k: str(v) for k, v in (names | {"TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": 0}).items()} if ranks > 1 else {}
        made.append(
            subprocess.Popen([sys.executable, str(SCRIPT), str(ranks), *arguments], env=plain | extra, stderr=subprocess.PIPE, text=True)
        )
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sft_dir, reward_dir) -> list[dict]:
    """What one process, rank 0 of two and rank 1 of two found."""
    path = tmp_path_factory.mktemp("ranks")
    processes = start(1, [sft_dir, reward_dir, str(path / "one")]) + start(2, [sft_dir, reward_dir, str(path / "two")])
    try:
        for process in processes:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(path / name, weights_only=True) for name in ("one.0", "two.0", "two.1")]


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_losses_metrics_and_weights(runs, stage):
    one = runs[0][stage]
    assert len(one["steps"]) == 4 and one["steps"][0] != one["steps"][1]
    for rank in runs[1:]:
        difference = float((rank[stage]["weights"] - one["weights"]).abs().max())
        print(f"\n{stage}: weights differ by {difference:.1e}")
        assert difference < 1e-5
        for a, b in zip(rank[stage]["steps"], one["steps"], strict=True):
            assert a == pytest.approx(b, abs=1e-5)
        assert rank[stage]["validation"] == pytest.approx(one["validation"], abs=1e-5)


def test_texts(runs):
    one = runs[0]["ppo"]
    assert len(set(one["texts"])) > 8
    assert all(rank["ppo"]["texts"] == one["texts"] for rank in runs[1:])
    assert sorted(runs[1]["ppo"]["samples"] + runs[2]["ppo"]["samples"]) == one["samples"]


def test_the_mean_over_references(runs):
    assert [rank["reward"]["mean"] for rank in runs[1:]] == pytest.approx([runs[0]["reward"]["mean"]] * 2, abs=1e-5)


def test_a_reward_that_raises_on_one_rank_stops_both(runs):
    """No rank waits for the other's rollout until a time-out; both name the prompt."""
    for rank in runs:
        assert "reward function reward_fn raised KeyError: 'lexicon'" in rank["failing"] and "prompt 0: " in rank["failing"]
    assert "rank 1" in runs[1]["failing"]
