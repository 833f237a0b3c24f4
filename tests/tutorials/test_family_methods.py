"""tutorials/family: every method of the table learns on a tiny quickstart and is judged; the page says what the numbers say."""

import json
import math
from pathlib import Path

import pytest
import torch

from lit_rlhf import cli
from lit_rlhf.generation import Sampling
from lit_rlhf.quickstart.model import train_tokenizer, write_untrained
from lit_rlhf.quickstart.run import quiet, sft_texts, stage_command
from lit_rlhf.quickstart.world import write_data

FOLDER = Path(__file__).parents[2] / "tutorials" / "family"
SCRIPTS = ("methods", "page")
SIZES = {
    "sft_train": 64,
    "sft_valid": 8,
    "comparisons_train": 64,
    "comparisons_valid": 8,
    "prompts_train": 64,
    "prompts_valid": 8,
    "held_out": 8,
}
SHORT = ["--trainer.max_epochs=1", "--model.init_args.sampling.max_new_tokens=24"]
SMALL = {
    "rft": ["--model.init_args.num_prompts=16", "--model.init_args.n=16", "--model.init_args.minibatches=2"],
    "dpo": ["--data.limit_train_rows=32"],
    "rloo": ["--model.init_args.batch_size=16"],
    "ppo": ["--model.init_args.batch_size=16"],
    "nlpo": ["--model.init_args.batch_size=16"],
    "quark": ["--model.init_args.num_prompts=8", "--model.init_args.minibatches=2", "--model.init_args.minibatch_size=8"],
    "ilql": [],
    "iterate": ["--model.init_args.batch_size=16", "--rounds=2", "--prompts=10", "--responses=2", "--pairs=8"],
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quickstart's folder after its first two stages, of few rows."""
    out = tmp_path_factory.mktemp("quickstart")
    torch.set_num_threads(1)
    with quiet():
        write_data(out / "data", 0, SIZES)
        write_untrained(out / "init", train_tokenizer(sft_texts(out / "data" / "sft_train.jsonl")), 0)
        for stage in ("sft", "reward"):
            assert cli.main(stage_command(stage, out, 0, ["--trainer.max_epochs=1", "--trainer.limit_val_batches=0"])) == 0
    return out


@pytest.mark.slow
def test_every_method_learns_and_is_judged(scripts, quick, tmp_path):
    """Weights move, every number is finite and of one post each, and KL to SFT is 0 for SFT alone."""
    methods = scripts["methods"]
    judge = methods.Judge(quick, Sampling(max_new_tokens=24, temperature=0.7), 0)
    for method in methods.METHODS:
        more = SHORT * (method.name not in ("sft", "best-of-n")) + SMALL.get(method.name, [])
        if method.name in ("dpo", "ilql"):
            more = [arg for arg in more if "max_new_tokens" not in arg]
        found = methods.measure(method, quick, 0, tmp_path, judge, more)
        numbers = [found[key] for key in ("gold", "scores", "kl", "lengths")]
        assert all(len(part) == SIZES["held_out"] and all(map(math.isfinite, part)) for part in numbers), method.name
        assert (sum(map(abs, found["kl"])) > 1e-3) == (method is not methods.SFT), method.name
        methods.write(tmp_path / f"{method.name}.0.json", json.dumps(found))
    rows = scripts["page"].read(tmp_path)
    assert [row["method"] for row in rows] == [method.name for method in methods.METHODS]
    sampled = {row["method"]: row["sampled"] for row in rows}
    assert sampled["best-of-n"] == 16 * SIZES["held_out"] and sampled["rft"] == 16 * 16 and sampled["ppo"] == 16 and sampled["dpo"] == 0
    assert sampled["iterate"] == (16 + 10 * 2) + (16 + 10 * 2 * 2)  # PPO's, and two a prompt of SFT; from round 2 of the current policy too
    assert scripts["page"].report(rows).write(tmp_path / "page").is_file()


def row(method: str, seed: int, difference: float, error: float) -> dict:
    numbers = {"gold": 3 + difference, "kl": 1.0, "score": 0.5, "length": 10.0}
    return {"method": method, "seed": seed, "sampled": 0, "wall": 1.0, "cpu": 1.0, "posts": 4, **numbers} | {
        "difference": difference,
        "difference_error": error,
    }


def test_the_error_is_the_larger_one(scripts):
    """0.1, 0.2, 0.3 over seeds: 0.1/sqrt(3) = 0.0577; over posts sqrt(3 x 0.03^2)/3 = 0.0173, or 0.173 with 0.3."""
    found = scripts["page"].gain([row("ppo", seed, 0.1 * (seed + 1), 0.03) for seed in range(3)])
    assert found.mean == pytest.approx(0.2) and found.error == pytest.approx(0.1 / 3**0.5)
    assert scripts["page"].gain([row("ppo", seed, 0.1, 0.3) for seed in range(3)]).error == pytest.approx(0.3 / 3**0.5)


def test_the_verdict_names_what_does_not_beat_sft(scripts):
    """0.2 at 0.05 is 4 errors above SFT, 0.05 at 0.05 is one; what has not been run is named."""
    rows = [row("sft", 0, 0.0, 1.0), row("ppo", 0, 0.2, 0.05), row("dpo", 0, 0.05, 0.05)]
    said = scripts["page"].verdict(rows)
    assert (
        "standard errors: PPO. Not: DPO (+0.05 ± 0.05)." in said
        and "Not run yet: best of 16, RFT, RLOO, NLPO, Quark, ILQL, iterated RLHF." in said
    )
    table = scripts["page"].table(rows)
    assert "| PPO | reward model | 1 | 3.20 | +0.20 ± 0.05 (4.0; by seed 4.0) | 1.00 |" in table
