"""A run that stops anywhere and goes on ends with the same bits: weights, optimiser, logged numbers, sampled texts, counters."""

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from ranks import finish_or_again, start
from resume_run import STEPS, Interrupt, run

from lit_rlhf.checkpoint_io import newest

STAGES = ("sft", "reward", "ppo", "dpo", "rloo")
HERE = Path(__file__).parent
MOMENTS = ("start", "backward", "end")
ALL = os.environ.get("LIT_RLHF_RESUME_ALL") == "1"  # the whole table of tutorials/checkpoints.md; otherwise a part of its slow rows


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dirs(tmp_path_factory, sft_dir, reward_dir) -> tuple[str, str]:
    """The two models, the first with dropout in its config, which SFT is asked to keep."""
    path = tmp_path_factory.mktemp("models") / "sft"
    shutil.copytree(sft_dir, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    return str(path), reward_dir


@pytest.fixture(scope="module")
def full(dirs):
    """full(stage, accumulate) -> the uninterrupted run with a checkpoint of every step."""
    made = {}

    def get(stage: str, accumulate: int = 1):
        if (stage, accumulate) not in made:
            made[stage, accumulate] = run(stage, dirs, accumulate_grad_batches=accumulate)
        return made[stage, accumulate]

    return get


def interrupted(full, stage, dirs, at, moment):
    """What differs after an interruption in micro-batch `at` (two to an optimiser step), a save there, and a resume."""
    path = Path(tempfile.mkdtemp()) / "stopped.ckpt"
    run(stage, dirs, stop=Interrupt(at, moment, path), accumulate_grad_batches=2)
    since = int(torch.load(path, weights_only=True)["global_step"])
    return run(stage, dirs, ckpt=path, accumulate_grad_batches=2).same(full(stage, 2), since)


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_after_any_step(full, dirs, stage):
    """Steps 4 and 8 end an epoch; for PPO they end an iteration, and all others lie within one."""
    whole = full(stage)
    assert whole.counters[-2] == STEPS and len({v for k, v in whole.lines.items() if k[1].endswith("grad_norm")}) > 2
    wrong = {}
    for step in range(1, STEPS):
        again = run(stage, dirs, ckpt=whole.folder / f"step={step}.ckpt")
        wrong |= {step: found} if (found := again.same(whole, step)) else {}
    assert not wrong


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("at", "moment"), [(0, "backward"), (5, "start"), (7, "backward"), (8, "start"), (10, "end")])
def test_stopped_within_a_step(full, dirs, stage, at, moment):
    """The checkpoint is of the last whole step, and the micro-batches since are done again: no row is lost, and none is learnt twice."""
    assert not interrupted(full, stage, dirs, at, moment)


def test_the_comparison_can_fail(full, dirs):
    """A resume with another learning rate ends elsewhere, and the comparison says where."""
    whole = full("reward")
    changed = torch.load(whole.folder / "step=5.ckpt", weights_only=True)
    next(iter(changed["optimizer_states"][0]["state"].values()))["exp_avg"] += 1e-3
    path = Path(tempfile.mkdtemp()) / "changed.ckpt"
    torch.save(changed, path)
    found = run("reward", dirs, ckpt=path).same(whole, 5)
    assert "weights" in found and "optimizer" in found and "metrics" in found


def note(name: str, equal: int, of: int) -> None:
    """Prints a line of the resume table of tutorials/checkpoints.md."""
    print(f"\n{name}: {equal} of {of} bit-equal")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_resume_of_a_resume(full, dirs, stage):
    """Stopped after step k and again after step j > k: Lightning's own count of epochs drifts here."""
    whole, wrong, pairs = full(stage), {}, 0
    for first in range(1, STEPS - 1) if ALL else (1, 4, 6, 8):
        again = run(stage, dirs, ckpt=whole.folder / f"step={first}.ckpt")
        for second in range(first + 1, STEPS):
            found = run(stage, dirs, ckpt=again.folder / f"step={second}.ckpt").same(whole, second)
            pairs, wrong = pairs + 1, wrong | ({(first, second): found} if found else {})
    note(f"{stage}, 1 process, two stops", pairs - len(wrong), pairs)
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_stopped_anywhere_within_any_step(full, dirs, stage):
    cases = [(at, moment) for at in range(2 * STEPS) for moment in (MOMENTS if ALL else (MOMENTS[at % 3],))]
    wrong = {case: found for case in cases if (found := interrupted(full, stage, dirs, *case))}
    note(f"{stage}, 1 process, within a step", len(cases) - len(wrong), len(cases))
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks(dirs, tmp_path, strategy, stage):
    """Five steps (or all eleven), on both ranks, and three (or all twelve) resumes of resumes."""
    finish_or_again(lambda: start(2, [strategy, stage, *dirs, str(tmp_path / "out")], HERE / "resume_ranks.py"), 800 if ALL else 420)
    for rank in range(2):
        found = json.loads((tmp_path / f"out.{rank}").read_text())
        note(f"{stage}, {strategy} x 2, rank {rank}", found["of"] - len(found["wrong"]), found["of"])
        assert found["of"] == (23 if ALL else 8) and not found["wrong"]


@pytest.mark.slow
def test_a_rank_that_dies(full, dirs, tmp_path):
    """The other rank ends by itself with an error; the newest file is whole, and one process goes on from it to a whole run's weights."""
    processes = start(2, [dirs[0], str(tmp_path)], HERE / "rank_death.py")
    try:
        _, errors = processes[0].communicate(timeout=120)
        processes[1].wait(timeout=10)
    finally:
        for process in processes:
            process.kill()
    assert processes[1].returncode == -9 and processes[0].returncode == 1, errors[-2000:]
    print("\nthe other rank: " + [line for line in errors.splitlines() if "Error" in line][-1][:300])
    saved = newest([tmp_path])
    assert saved is not None and torch.load(saved, weights_only=True)["global_step"] == 5
    again, whole = run("reward", dirs, ckpt=saved, accumulate_grad_batches=2), full("reward", 2)
    assert again.lines[5, "train/loss"] == pytest.approx(whole.lines[5, "train/loss"], abs=1e-4)
    assert float((again.weights - whole.weights).abs().mean()) < 1e-3  # Adam divides by tiny moments: rounding grows
