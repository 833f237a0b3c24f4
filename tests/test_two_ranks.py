"""Two gloo ranks under DDP, FSDP2 and FSDP1 give one process's texts, losses, metrics and weights, in all three stages."""

from pathlib import Path

import pytest
import torch
from ranks import finish, start

pytestmark = pytest.mark.slow  # three processes, about 40 s of two idle cores
SCRIPT = Path(__file__).parent / "two_ranks.py"
STAGES = ("sft", "reward", "ppo", "dpo", "rloo")
STRATEGIES = ("ddp", "fsdp2", "fsdp1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sft_dir, reward_dir) -> dict[str, list[dict]]:
    """What one process found ("one"), and for each strategy what its two ranks did."""
    path = tmp_path_factory.mktemp("ranks")
    finish(start(1, [sft_dir, reward_dir, str(path / "one")], SCRIPT) + start(2, [sft_dir, reward_dir, str(path / "two")], SCRIPT))
    one, *two = [torch.load(path / name, weights_only=True) for name in ("one.0", "two.0", "two.1")]
    return one | {name: [rank[name] for rank in two] for name in STRATEGIES}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_metrics_and_weights(runs, strategy, stage):
    """After 6 optimiser steps, which for PPO are 3 iterations."""
    one, ranks = runs["one"][stage], [rank[stage] for rank in runs[strategy]]
    assert len(one["steps"]) == 6 and one["steps"][0] != one["steps"][1]
    difference = float((ranks[0]["weights"] - one["weights"]).abs().max())
    losses = [abs(a[key] - b[key]) for a, b in zip(ranks[0]["steps"], one["steps"], strict=True) for key in b if key.endswith("loss")]
    print(f"\n{strategy} {stage}: weights differ by {difference:.1e}, losses by {max(losses):.1e}")
    assert difference < 1e-5
    for rank in ranks:
        for a, b in zip(rank["steps"], one["steps"], strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-5)  # the norm of RLOO's gradients is 30
        assert rank["validation"] == pytest.approx(one["validation"], abs=1e-5)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_speed_is_counted_alike(runs, strategy, stage):
    """Splitting weights over ranks changes no operation of a pass; two ranks together learn from one process's tokens."""
    one, ranks = runs["one"][stage]["speed"], [rank[stage]["speed"] for rank in runs[strategy]]

    def tokens(speed):
        return speed["last"]["perf/update_tokens_per_second"] * speed["last"]["perf/update_seconds"]

    assert all(rank["work"] == one["work"] for rank in ranks)
    assert all(rank["last"].keys() == one["last"].keys() for rank in ranks)
    assert sum(map(tokens, ranks)) == pytest.approx(tokens(one)) and tokens(one) > 50


@pytest.mark.parametrize("stage", STAGES)
def test_the_gradients_were_clipped(runs, stage):
    """A strategy that clipped by each rank's own part of the norm would therefore have moved the weights elsewhere."""
    assert sum(norm > 2 * 0.5 for norm in runs["one"][stage]["norms"]) >= 3, runs["one"][stage]["norms"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_texts(runs, strategy):
    for stage in ("ppo", "rloo"):
        one, ranks = runs["one"][stage], [rank[stage] for rank in runs[strategy]]
        assert len(set(one["texts"])) > 8
        assert all(rank["texts"] == one["texts"] for rank in ranks)
        assert sorted(ranks[0]["samples"] + ranks[1]["samples"]) == one["samples"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_mean_over_references(runs, strategy):
    assert [rank["reward"]["mean"] for rank in runs[strategy]] == pytest.approx([runs["one"]["reward"]["mean"]] * 2, abs=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_reward_that_raises_on_one_rank_stops_both(runs, strategy):
    """No rank waits for the other's rollout until a time-out; both name the prompt."""
    for rank in (runs["one"], *runs[strategy]):
        for said in rank["failing"]:
            assert "reward function reward_fn raised KeyError: 'lexicon'" in said and "prompt 0: " in said
    assert all("rank 1" in said for said in runs[strategy][0]["failing"])
