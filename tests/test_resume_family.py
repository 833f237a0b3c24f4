"""The algorithms beside the three stages: a run that stops anywhere and goes on ends with the same bits, as in test_resume.py."""

import logging
import tempfile
from pathlib import Path

import pytest
import resume_run
import torch
from resume_run import ROWS, STEPS, Interrupt, run

from lit_rlhf import ILQL, NLPO, RFT, PromptDataModule, Quark, Sampling, Schedule, SFTDataModule

ADAM = {"optimizer": lambda params: torch.optim.AdamW(params, lr=0.01), "scheduler": Schedule("linear", warmup_steps=2)}


def ilql(sft_dir, reward_dir):
    rows = [row | {"reward": i % 3} for i, row in enumerate(ROWS)]
    module = ILQL(sft_dir, sampling=Sampling(8, 1.0), target_every=3, target_rate=0.5, dropout=True, **ADAM)
    return module, SFTDataModule(rows, val_data=rows[:4], batch_size=4)


def rft(sft_dir, reward_dir):
    settings = {"n": 3, "keep": 2, "num_prompts": 6, "epochs": 2, "minibatches": 2, "sampling": Sampling(8, 1.0)}
    module = RFT(sft_dir, reward_model=reward_dir, **settings, **ADAM)
    return module, PromptDataModule(ROWS, val_data=ROWS[:4], max_prompt_tokens=64, val_batch_size=4)


def quark(sft_dir, reward_dir):
    settings = {"num_quantiles": 3, "num_prompts": 6, "minibatch_size": 6, "minibatches": 4, "sampling": Sampling(8, 1.0)}
    module = Quark(sft_dir, reward_model=reward_dir, no_eos_score=-1.0, **settings, **ADAM)
    return module, PromptDataModule(ROWS, val_data=ROWS[:4], max_prompt_tokens=64, val_batch_size=4)


def nlpo(sft_dir, reward_dir):
    settings = {"batch_size": 8, "responses_per_prompt": 2, "minibatches": 2, "ppo_epochs": 2, "kl_target": 1.0, "kl_horizon": 100}
    module = NLPO(sft_dir, reward_model=reward_dir, min_tokens=2, mask_every=2, sampling=Sampling(8, 1.0), **settings, **ADAM)
    return module, PromptDataModule(ROWS, val_data=ROWS[:4], max_prompt_tokens=64, val_batch_size=4)


PIECES = {"ilql": ilql, "rft": rft, "quark": quark, "nlpo": nlpo}


@pytest.fixture(autouse=True)
def setting(monkeypatch):
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    monkeypatch.setattr(resume_run, "pieces", lambda stage, *dirs: PIECES[stage](*dirs))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("stage", PIECES)
def test_stopped_and_resumed(stage, sft_dir, reward_dir):
    """After whole steps, in the middle of an epoch or iteration and at its end; then within a step of two micro-batches."""
    dirs = (sft_dir, reward_dir)
    whole = run(stage, dirs)
    assert len({v for k, v in whole.lines.items() if k[1].endswith("grad_norm")}) > 2
    wrong = {}
    for step in (1, 4, 6, STEPS - 1):
        again = run(stage, dirs, ckpt=whole.folder / f"step={step}.ckpt")
        wrong |= {step: found} if (found := again.same(whole, step)) else {}
    halves = run(stage, dirs, accumulate_grad_batches=2)
    for at, moment in ((5, "start"), (7, "backward"), (10, "end")):
        path = Path(tempfile.mkdtemp()) / "stopped.ckpt"
        run(stage, dirs, stop=Interrupt(at, moment, path), accumulate_grad_batches=2)
        since = int(torch.load(path, weights_only=True)["global_step"])
        again = run(stage, dirs, ckpt=path, accumulate_grad_batches=2)
        wrong |= {(at, moment): found} if (found := again.same(halves, since)) else {}
    assert not wrong
