"""Checkpoints saved between epochs, after a fit or in an optimiser step; modules that are loaded, validated or fitted before a fit."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from resume_run import ROWS
from test_checkpoints import dirs, fit, ppo, prompts, rows, sft  # noqa: F401

from lit_rlhf import PPO, PromptDataModule, Schedule, SFTDataModule
from lit_rlhf.callbacks import CheckpointGuard
from lit_rlhf.checkpoint_io import newest, read
from lit_rlhf.checkpoints import fingerprint
from lit_rlhf.scoring import within


class Stop(Exception):
    """The interruption."""


class Act(Callback):
    """Calls `act(trainer)` in one hook."""

    def __init__(self, hook, act) -> None:
        setattr(self, hook, lambda trainer, *args: act(trainer, *args))


def flat(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def made(kind, dirs):  # noqa: F811
    return (sft(dirs, scheduler=Schedule("constant")), rows()) if kind == "sft" else (ppo(dirs), prompts())


@pytest.mark.parametrize("hook", ["after", "on_train_epoch_end", "on_train_end", "on_train_epoch_start", "first"])
@pytest.mark.parametrize("steps", [4, 6])
@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_saved_between_epochs_and_after_a_fit(fit, make_trainer, dirs, tmp_path, kind, steps, hook):  # noqa: F811
    """Epochs have 4 steps. Whenever it was saved, the run ends at step 8 with the weights of one that did not stop."""
    path, (module, data), (other, rest) = tmp_path / "x.ckpt", made(kind, dirs), made(kind, dirs)
    fit(module, data, max_steps=8)

    def save(trainer, *args) -> None:
        if trainer.global_step == steps:
            trainer.save_checkpoint(path)

    def stop(*args) -> None:
        raise Stop

    if hook == "first":  # a resumed run that stops before the module sees a batch
        trainer = make_trainer(max_steps=8, callbacks=[Act("on_train_batch_start", stop), Act("on_exception", save)])
        with pytest.raises(Stop):
            trainer.fit(other, rest, ckpt_path=tmp_path / "a" / f"step={steps}.ckpt")
    elif hook == "after":
        save(fit(other, rest, max_steps=steps, name="b"))
    else:
        more = 4 if hook == "on_train_epoch_start" else 0
        saved = Act(hook, save) if steps == 4 or not more else Act("on_train_end", save)
        make_trainer(max_steps=steps + (more if steps == 4 else 0), callbacks=[saved]).fit(other, rest)
    again, data = made(kind, dirs)
    assert fit(again, data, ckpt_path=path, max_steps=8, name="c").global_step == 8
    assert torch.equal(flat(again), flat(module))


def test_more_updates_from_the_border_of_an_iteration(fit, dirs, tmp_path):  # noqa: F811
    """Four updates an iteration, then eight: the fifth is the first of iteration 1."""
    fit(ppo(dirs), prompts(), max_steps=4)
    module = ppo(dirs, ppo_epochs=4)
    fit(module, prompts(), ckpt_path=tmp_path / "a" / "step=4.ckpt", max_steps=5, name="b")
    assert (module.iteration, module.position) == (1, 1)


def test_a_fit_after_validating_a_checkpoint_starts_afresh(fit, make_trainer, dirs, tmp_path):  # noqa: F811
    """Its own learning rate from the first step on, and a new iteration."""
    fit(ppo(dirs), prompts(), max_steps=2)
    module, rates = ppo(dirs, lr=0.002), []
    data = PromptDataModule([{"prompt": "the cat"}] * 8, val_data=[{"prompt": "a mat"}] * 4, max_prompt_tokens=64)
    make_trainer().validate(module, data, ckpt_path=tmp_path / "a" / "step=2.ckpt")
    note = Act("on_before_optimizer_step", lambda trainer, module, optimizer: rates.append(optimizer.param_groups[0]["lr"]))
    make_trainer(max_steps=4, callbacks=[note]).fit(module, data)
    assert rates == [0.002] * 4 and (module.iteration, module.position) == (1, 4)


def test_a_fit_after_loading_starts_with_a_rollout(fit, make_trainer, dirs, tmp_path):  # noqa: F811
    fit(ppo(dirs), prompts(), max_steps=6)
    module = PPO.load_from_checkpoint(tmp_path / "a" / "step=6.ckpt", optimizer=lambda params: torch.optim.AdamW(params, lr=0.01))
    assert (module.iteration, module.position) == (1, 2)
    make_trainer(max_steps=4).fit(module, prompts())
    assert (module.iteration, module.position) == (2, 4)


def test_a_second_fit_forgets_the_half_step_of_the_first(make_trainer, dirs):  # noqa: F811
    def stop(trainer, module, outputs, batch, batch_idx) -> None:
        if batch_idx == 2:  # the first of two micro-batches
            raise Stop

    losses = []
    for interrupted in (False, True):
        module = sft(dirs, lr=0.0)
        if interrupted:
            with pytest.raises(Stop):
                make_trainer(max_steps=4, accumulate_grad_batches=2, callbacks=[Act("on_train_batch_end", stop)]).fit(module, rows())
        trainer = make_trainer(max_steps=1, accumulate_grad_batches=2)
        trainer.fit(module, rows())
        losses.append(float(trainer.callback_metrics["train/loss"]))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("own", [False, True])
def test_no_checkpoint_holds_half_an_update(make_trainer, dirs, tmp_path, own):  # noqa: F811
    """Ctrl-C while the optimiser changes the weights: the third step is not saved, by the guard or by ModelCheckpoint."""

    class Interrupted(torch.optim.AdamW):
        steps = 0

        def step(self, closure=None):
            super().step(closure)
            self.steps += 1
            if self.steps == 3:
                raise KeyboardInterrupt("now")

    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6 if own else 2, save_on_exception=own)
    module = sft(dirs, optimizer=lambda params: Interrupted(params, lr=0.01))
    trainer = make_trainer(max_steps=6, enable_checkpointing=True, callbacks=[keep, CheckpointGuard()])
    with pytest.raises(RuntimeError if own else SystemExit) as caught:
        trainer.fit(module, rows())
    assert not own or "step 2: KeyboardInterrupt stopped the optimizer while it changed the weights (now)" in str(caught.value)
    assert [p.name for p in tmp_path.glob("*.ckpt")] == ([] if own else ["step=2.ckpt"])


def test_ctrl_c_within_a_validation_is_saved(fit, make_trainer, dirs, tmp_path):  # noqa: F811
    """After step 2 of 8, in the first batch of its validation; the run goes on to the weights of one that did not stop."""
    data = [SFTDataModule(ROWS, val_data=ROWS[:4], batch_size=4) for _ in range(3)]
    modules = [sft(dirs, scheduler=Schedule("constant")) for _ in range(3)]
    fit(modules[0], data[0], max_steps=8, val_check_interval=2)

    def stop(trainer, *args) -> None:
        raise KeyboardInterrupt

    callbacks = [ModelCheckpoint(tmp_path / "b", every_n_train_steps=8), CheckpointGuard(), Act("on_validation_batch_start", stop)]
    with pytest.raises(SystemExit):
        make_trainer(max_steps=8, val_check_interval=2, enable_checkpointing=True, callbacks=callbacks).fit(modules[1], data[1])
    assert read(tmp_path / "b" / "interrupted.ckpt")["global_step"] == 2
    fit(modules[2], data[2], ckpt_path=tmp_path / "b" / "interrupted.ckpt", max_steps=8, name="c", val_check_interval=2)
    assert torch.equal(flat(modules[2]), flat(modules[0]))


def test_last_passes_over_weights_alone(make_trainer, dirs, tmp_path):  # noqa: F811
    trainer = make_trainer(max_steps=1)
    trainer.fit(sft(dirs), rows())
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert newest([tmp_path]).name == "weights.ckpt"
    with pytest.warns(UserWarning, match="weights.ckpt holds weights alone"):
        assert newest([tmp_path], whole=True).name == "whole.ckpt"


def test_prompts_given_as_a_list_are_no_setting(make_trainer, dirs, tmp_path):  # noqa: F811
    trainer = make_trainer(max_steps=1)
    trainer.fit(ppo(dirs), PromptDataModule([f"the cat {i}" for i in range(101)], max_prompt_tokens=64))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    settings = read(tmp_path / "x.ckpt")["lit_rlhf"]["settings"]
    assert "data.data" not in settings and settings["data.max_prompt_tokens"] == 64


def test_the_fingerprint_of_a_hub_model_runs_none_of_its_code(tmp_path, monkeypatch):
    commit = "0123456789" * 4
    folder = tmp_path / "models--me--mine" / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text(commit)
    (folder / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}')
    (folder / "code.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    assert fingerprint("me/mine") == f"me/mine@{commit}"


def test_a_reward_with_a_timeout_runs_on_the_ranks_own_device(monkeypatch):
    """CUDA's current device belongs to a thread; a new one begins with device 0."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert within(30.0, lambda: list(chosen)) == [3]
