"""What happens when something goes wrong in a run: each fault has one message, and the last good checkpoint stays loadable."""

import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from resume_run import PAIRS, ROWS

import lit_rlhf.checkpoint_io as checkpoint_io
from lit_rlhf import PPO, SFT, AtomicCheckpointIO, PairwiseDataModule, PairwiseReward, PromptDataModule, Sampling, Schedule, SFTDataModule
from lit_rlhf.callbacks import CheckpointGuard
from lit_rlhf.checkpoint_io import newest, probe, read
from lit_rlhf.collapse import CollapseWatch, signs


def sft(model, **settings):
    return SFT(model, optimizer=lambda params: torch.optim.SGD(params, lr=0.1), scheduler=Schedule("constant"), **settings)


def rows(**settings):
    return SFTDataModule(ROWS, batch_size=4, **settings)


def ppo(model, **settings):
    usual = {"reward_fn": lambda prompts, responses: [float(len(r)) for r in responses], "batch_size": 8, "minibatches": 2, "ppo_epochs": 2}
    return PPO(model, **(usual | {"sampling": Sampling(6, 1.0)} | settings))


def prompts(**settings):
    return PromptDataModule(ROWS, max_prompt_tokens=64, **settings)


class Break(Callback):
    """Makes a weight's gradient (or the loss, by a weight) not finite in one step."""

    def __init__(self, step: int, value: float = float("nan")) -> None:
        self.step, self.value = step, value

    def on_after_backward(self, trainer, module) -> None:
        if trainer.global_step == self.step:
            next(p for p in module.parameters() if p.grad is not None).grad[0] = self.value


@pytest.fixture
def fit(make_trainer, tmp_path):
    """fit(module, data, *callbacks) -> the Trainer, with a checkpoint of every step in tmp_path/ckpt."""

    def run(module, data, *callbacks, ckpt_path=None, **kwargs):
        keep = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1, save_on_exception=True)
        given = {"max_steps": 6, "enable_checkpointing": True, "plugins": [AtomicCheckpointIO()]} | kwargs
        trainer = make_trainer(callbacks=[CheckpointGuard(), keep, *callbacks], **given)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return trainer

    return run


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_the_step(fit, sft_dir, tmp_path, stage, value):
    module, data = {
        "sft": lambda: (sft(sft_dir), rows()),
        "reward": lambda: (PairwiseReward(sft_dir), PairwiseDataModule(PAIRS, batch_size=4)),
        "ppo": lambda: (ppo(sft_dir), prompts()),
    }[stage]()
    with pytest.raises(RuntimeError, match=r"step 3, .*grad_norm is not finite, so the run stops before this step changes any weight"):
        fit(module, data, Break(3, value))
    assert all(torch.isfinite(p).all() for p in module.parameters())
    for file in (tmp_path / "ckpt").glob("*.ckpt"):
        weights = read(file)["state_dict"]
        assert all(torch.isfinite(v).all() for v in weights.values() if v.is_floating_point())
    assert newest([tmp_path / "ckpt"]) is not None


def test_a_loss_that_is_not_finite_names_iteration_and_rollout(fit, sft_dir):
    module = ppo(sft_dir, value_coef=1e38)
    with pytest.raises(RuntimeError, match=r"step 0, iteration 0, update 1, rollout: score .* not finite"):
        fit(module, prompts())


def test_kl_guard_skips_the_rest_of_the_iteration(fit, sft_dir):
    """With a limit that the first update of an iteration passes, one update an iteration is made and the others change nothing."""

    class Watch(Callback):
        def __init__(self):
            self.weights, self.skipped = [], []

        def on_train_batch_end(self, trainer, module, *rest):
            self.weights.append(torch.cat([p.detach().flatten().clone() for p in module.policy.parameters()]))
            self.skipped.append(module.journal.entries[-1]["ppo/skipped"])

    def weights(limit):
        watch = Watch()
        settings = {"optimizer": lambda params: torch.optim.AdamW(params, lr=0.01), "scheduler": Schedule("constant")}
        module = ppo(sft_dir, max_kl_per_iteration=limit, **settings)
        fit(module, prompts(), watch, max_steps=8)
        return module, watch

    with pytest.warns(UserWarning, match=r"iteration 0: before update 2 of 4 .* over max_kl_per_iteration 1e-06: the rest .* are skipped"):
        module, watch = weights(1e-6)
    assert watch.skipped == [0, 1, 1, 1, 0, 1, 1, 1]
    changed = [not torch.equal(a, b) for a, b in zip(watch.weights, watch.weights[1:], strict=False)]
    assert changed == [False, False, False, True, False, False, False]
    assert module.iteration == 1 and module.trainer.global_step == 8  # the number of iterations does not change
    _, free = weights(None)
    assert free.skipped == [0] * 8 and torch.equal(free.weights[0], watch.weights[0])


def test_reward_timeout(fit, sft_dir):
    release = threading.Event()

    def slow(prompts, responses):
        release.wait(60)
        return [0.0] * len(responses)

    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"function slow raised TimeoutError: it took longer than reward_timeout, 0.3 s .*prompt 0"):
        fit(ppo(sft_dir, reward_fn=slow, reward_timeout=0.3), prompts())
    assert time.monotonic() - start < 30
    release.set()
    fit(ppo(sft_dir, reward_fn=slow, reward_timeout=30.0), prompts(), max_steps=2)  # fast enough now


def test_signs_of_collapse():
    """Rows of ids: 1 2 3 1 2 3 1 2 has the 3-grams 123 231 312 123 231 312, three of six seen before; 4 5 6 7 8 has three, none before."""
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2], [4, 5, 6, 7, 8, 0, 0, 0]])
    mask = torch.tensor([[True] * 8, [True] * 5 + [False] * 3])
    found = signs(["a", " "], ids, mask, torch.tensor([False, True]))
    assert found == {"empty_rate": 0.5, "same_rate": 0.5, "repetition": pytest.approx(3 / 9), "endless_rate": 0.5}


def test_collapse_is_told_from_a_task_that_is_so_from_the_start():
    healthy = {"empty_rate": 0.0, "same_rate": 0.1, "repetition": 0.1, "endless_rate": 0.2}
    watch = CollapseWatch(3)
    for iteration in range(5):
        watch(healthy, iteration)
    watch(healthy | {"empty_rate": 0.95}, 5)
    watch(healthy, 6)  # not in a row
    watch(healthy | {"empty_rate": 0.95}, 7)
    watch(healthy | {"empty_rate": 1.0}, 8)
    resumed = CollapseWatch(3)
    resumed.load(watch.state())
    for each in (watch, resumed):
        with pytest.raises(RuntimeError, match=r"iteration 9: the policy has collapsed: 97% of the responses are empty .*0%.*iteration 7"):
            each(healthy | {"empty_rate": 0.97}, 9)
    endless = CollapseWatch(3)
    for iteration in range(9):  # max_new_tokens is short, nothing ever ends: no collapse
        endless(healthy | {"endless_rate": 1.0}, iteration)
    for iteration in range(9):
        CollapseWatch(None)(healthy | {"empty_rate": 1.0}, iteration)


def test_a_policy_that_learns_to_be_silent_is_stopped(fit, sft_dir):
    """The reward is for empty responses: the run stops with the reason instead of training on nothing."""
    settings = {"optimizer": lambda params: torch.optim.AdamW(params, lr=0.03), "scheduler": Schedule("constant"), "kl_coef": 0.0}
    module = ppo(sft_dir, reward_fn=lambda p, r: [-float(len(x)) for x in r], batch_size=16, **settings)
    with pytest.raises(RuntimeError, match="the policy has collapsed: .* of the responses are (empty|one and the same text)"):
        fit(module, prompts(), max_steps=400)


def test_sigterm_saves_and_the_run_goes_on(fit, sft_dir, tmp_path):
    class Kill(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            if trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        fit(sft(sft_dir), rows(), Kill())
    saved = newest([tmp_path / "ckpt"])
    assert read(saved)["global_step"] == 3
    assert fit(sft(sft_dir), rows(), ckpt_path=saved).global_step == 6


def test_interrupted_is_written_where_nothing_else_saves(make_trainer, sft_dir, tmp_path):
    class Interrupt(Callback):
        def on_train_batch_end(self, trainer, *rest):
            if trainer.global_step == 2:
                raise KeyboardInterrupt

    keep = ModelCheckpoint(tmp_path / "c", every_n_train_steps=100)
    trainer = make_trainer(
        max_steps=6, enable_checkpointing=True, callbacks=[keep, CheckpointGuard(), Interrupt()], plugins=[AtomicCheckpointIO()]
    )
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        trainer.fit(sft(sft_dir), datamodule=rows())
    assert read(tmp_path / "c" / "interrupted.ckpt")["global_step"] == 2


class TestFiles:
    """The writer and the finder of checkpoints."""

    def whole(self, folder: Path, name: str, value: float = 1.0) -> Path:
        AtomicCheckpointIO().save_checkpoint(
            {"state_dict": {"w": torch.full((3,), value)}, "pytorch-lightning_version": "2.6.6"}, folder / name
        )
        return folder / name

    def test_disk_full_keeps_the_old_file_and_names_the_cause(self, tmp_path):
        """RLIMIT_FSIZE stands for the full disk: the kernel refuses to write past it, in the middle of the file."""
        path = self.whole(tmp_path, "a.ckpt", 1.0)
        big = {"state_dict": {"w": torch.zeros(1_000_000)}, "pytorch-lightning_version": "2.6.6"}
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
        try:
            with pytest.raises(RuntimeError, match=r"the checkpoint .*a.ckpt was not written \(File too large; .* [GM]iB free\)"):
                AtomicCheckpointIO().save_checkpoint(big, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, old)
        assert read(path)["state_dict"]["w"].tolist() == [1.0] * 3
        assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]

    def test_a_target_that_cannot_be_written_is_found_at_the_start(self, fit, sft_dir, tmp_path):
        (tmp_path / "ckpt").write_text("a file where the directory should be")
        with pytest.raises(RuntimeError, match=r"checkpoints cannot be written to .*ckpt: (File exists|Not a directory); name"):
            fit(sft(sft_dir), rows())

    def test_too_little_space_is_found_at_the_start(self, tmp_path):
        with pytest.raises(RuntimeError, match=r"GiB free, one checkpoint needs 9313225\.75 GiB .*: free some, or name a dirpath"):
            probe(tmp_path, 10**16)

    def test_probe_removes_what_dead_processes_left(self, tmp_path):
        import socket

        dead = tmp_path / f".a.ckpt.{socket.gethostname()}.999999999.partial"
        alive = tmp_path / f".b.ckpt.{socket.gethostname()}.{os.getpid()}.partial"
        dead.write_text("x"), alive.write_text("x")
        probe(tmp_path, 1)
        assert not dead.exists() and alive.exists()

    def test_newest_falls_back_with_a_warning(self, tmp_path):
        old, new = self.whole(tmp_path, "old.ckpt"), self.whole(tmp_path, "new.ckpt")
        os.utime(old, (1, 1))
        assert newest([tmp_path]) == new
        new.write_bytes(new.read_bytes()[:-200])
        with pytest.warns(UserWarning, match=r"new.ckpt cannot be read: it is damaged .*; going on to the next older one"):
            assert newest([tmp_path]) == old
        (tmp_path / "sharded.ckpt").mkdir()
        with pytest.warns(UserWarning, match="sharded.ckpt has no .metadata: it was not finished"):
            assert newest([tmp_path]) == old

    def test_the_rename_comes_after_the_fsync(self, tmp_path, monkeypatch):
        calls = []
        real_fsync, real_replace = os.fsync, Path.replace
        monkeypatch.setattr(checkpoint_io.os, "fsync", lambda handle: (calls.append("fsync"), real_fsync(handle)))
        monkeypatch.setattr(Path, "replace", lambda self, target: (calls.append("replace"), real_replace(self, target))[1])
        self.whole(tmp_path, "a.ckpt")
        assert calls == ["fsync", "replace", "fsync"]  # file, name, directory
