"""What a checkpoint holds, what a resume refuses, and which settings win."""

import json
import logging
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from resume_run import PAIRS, ROWS

from lit_rlhf import PPO, SFT, AtomicCheckpointIO, PairwiseDataModule, PairwiseReward, PromptDataModule, Sampling, Schedule, SFTDataModule
from lit_rlhf.checkpoint_io import read
from lit_rlhf.checkpoints import BLOCK, WHOLE, fingerprint


@pytest.fixture
def dirs(sft_dir, reward_dir, tmp_path):
    """Copies that a test may change."""
    shutil.copytree(sft_dir, tmp_path / "sft")
    shutil.copytree(reward_dir, tmp_path / "reward")
    return str(tmp_path / "sft"), str(tmp_path / "reward")


@pytest.fixture
def fit(make_trainer, tmp_path):
    def run(module, data, ckpt_path=None, name="a", **kwargs):
        keep = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        given = {"max_steps": 6, "enable_checkpointing": True, "plugins": [AtomicCheckpointIO()]} | kwargs
        trainer = make_trainer(callbacks=[keep], **given)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return trainer

    return run


def ppo(dirs, lr=0.01, **settings):
    usual = {"reward_model": dirs[1], "batch_size": 8, "minibatches": 2, "ppo_epochs": 2, "sampling": Sampling(6, 1.0)}
    adam = {"optimizer": lambda params: torch.optim.AdamW(params, lr=lr), "scheduler": Schedule("constant")}
    return PPO(dirs[0], **(usual | adam | settings))


def sft(dirs, lr=0.01, **settings):
    adam = {"optimizer": lambda params: torch.optim.AdamW(params, lr=lr), "scheduler": Schedule("linear")}
    return SFT(dirs[0], **(adam | settings))


def prompts():
    return PromptDataModule(ROWS, max_prompt_tokens=64)


def rows(**settings):
    return SFTDataModule(ROWS, **({"batch_size": 4} | settings))


def test_frozen_weights_are_not_written(fit, dirs, tmp_path):
    """PPO: no reference, no reward model; with LoRA and frozen layers only what trains. And the file holds nothing but plain data."""
    from peft import LoraConfig

    fit(ppo(dirs), prompts(), max_steps=1)
    assert {k.split(".")[0] for k in read(tmp_path / "a" / "step=1.ckpt")["state_dict"]} <= {"policy", "value", "rouge", "val_metrics"}
    lora = LoraConfig(r=2, target_modules="all-linear")
    fit(sft(dirs, peft=lora), rows(), max_steps=1, name="lora")
    names = [k for k in read(tmp_path / "lora" / "step=1.ckpt")["state_dict"] if k.startswith("policy.")]
    assert names and all("lora_" in name for name in names)
    fit(sft(dirs, frozen_layers=1), rows(), max_steps=1, name="frozen")
    names = read(tmp_path / "frozen" / "step=1.ckpt")["state_dict"]
    assert not any(".layers.0." in name for name in names) and any(".layers.1." in name for name in names)


@pytest.mark.parametrize("kind", ["lora", "frozen_layers"])
def test_runs_with_frozen_weights_go_on(fit, dirs, tmp_path, kind):
    from peft import LoraConfig

    settings = {"peft": LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)} if kind == "lora" else {"frozen_layers": 1}
    ends = []
    for ckpt, name in ((None, "a"), (tmp_path / "a" / "step=3.ckpt", "b")):
        torch.manual_seed(5)  # an adapter starts from random numbers
        module = sft(dirs, **settings)
        fit(module, rows(), ckpt_path=ckpt, name=name)
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize(("which", "argument"), [(0, "model"), (1, "reward_model")])
def test_a_changed_directory_is_refused(fit, dirs, tmp_path, which, argument):
    fit(ppo(dirs), prompts(), max_steps=2)
    config = json.loads(open(f"{dirs[which]}/config.json").read())
    with open(f"{dirs[which]}/config.json", "w") as file:
        json.dump(config | {"rms_norm_eps": 1e-5}, file)
    with pytest.raises(ValueError, match=rf"the files of {argument} '.*' are not those that the checkpoint was made with .*: put"):
        fit(ppo(dirs), prompts(), ckpt_path=tmp_path / "a" / "step=2.ckpt")


def test_fingerprints_see_every_part_of_a_large_file(tmp_path):
    """A file over the limit is read in blocks; a change of what training changes (every block) shows, and so does another length."""
    file = tmp_path / "model.safetensors"
    size = WHOLE + 3 * 2**20
    with file.open("wb") as stream:
        stream.truncate(size)
    before = fingerprint(str(tmp_path))
    for at in (0, size // 2 // (4 * 2**20) * 4 * 2**20, size - BLOCK):
        with file.open("r+b") as stream:
            stream.seek(at)
            stream.write(b"x")
            stream.flush()
            assert fingerprint(str(tmp_path)) != before
            stream.seek(at)
            stream.write(b"\0")
        assert fingerprint(str(tmp_path)) == before
    with file.open("r+b") as stream:
        stream.truncate(size + 1)
    assert fingerprint(str(tmp_path)) != before


def test_a_checkpoint_of_another_class_or_format_is_refused(fit, dirs, tmp_path):
    fit(sft(dirs), rows(), max_steps=1)
    path = tmp_path / "a" / "step=1.ckpt"
    with pytest.raises(ValueError, match="the checkpoint is of SFT, and this run trains PairwiseReward"):
        fit(PairwiseReward(dirs[0]), PairwiseDataModule(PAIRS, batch_size=4), ckpt_path=path)
    content = read(path)
    torch.save(content | {"lit_rlhf": content["lit_rlhf"] | {"format": 99}}, path)
    with pytest.raises(ValueError, match="the checkpoint has format 99, and this version reads format 1: start from an exported directory"):
        fit(sft(dirs), rows(), ckpt_path=path)
    torch.save({k: v for k, v in content.items() if k != "lit_rlhf"}, path)
    with pytest.raises(ValueError, match="the checkpoint has no entry of lit_rlhf"):
        fit(sft(dirs), rows(), ckpt_path=path)


def test_missing_or_other_weights_are_refused(fit, dirs, tmp_path):
    fit(sft(dirs), rows(), max_steps=1)
    path = tmp_path / "a" / "step=1.ckpt"
    content = read(path)
    name = "policy.lm.model.norm.weight"
    torch.save(content | {"state_dict": {k: v for k, v in content["state_dict"].items() if k != name}}, path)
    with pytest.raises(ValueError, match=rf"the checkpoint lacks 1 of the \d+ weights that train, {name} first"):
        fit(sft(dirs), rows(), ckpt_path=path)
    torch.save(content | {"state_dict": content["state_dict"] | {name: torch.zeros(3)}}, path)
    with pytest.raises(ValueError, match=rf"the checkpoint's {name} has shape \(3,\), the model's \(32,\)"):
        fit(sft(dirs), rows(), ckpt_path=path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minibatches": 1}, "minibatches was 2 and is 1"),
        ({"batch_size": 16}, "batch_size was 8 and is 16"),
        ({"seed": 7}, "seed was 0 and is 7"),
    ],
)
def test_what_an_iteration_depends_on_may_not_change_in_its_middle(fit, dirs, tmp_path, monkeypatch, changes, message):
    """Step 6 is in the middle of iteration 1; step 4 is its border, where everything may change."""
    fit(ppo(dirs), prompts())
    settings = {k: v for k, v in changes.items() if k != "seed"}
    if "seed" in changes:
        monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    with pytest.raises(ValueError, match=rf"from the middle of iteration 1 \(after update 2 of 4\), and {message}: resume with what"):
        fit(ppo(dirs, **settings), prompts(), ckpt_path=tmp_path / "a" / "step=6.ckpt", max_steps=8)
    assert fit(ppo(dirs, **settings), prompts(), ckpt_path=tmp_path / "a" / "step=4.ckpt", max_steps=6, name="b").global_step == 6


@pytest.mark.parametrize("step", [3, 4, 6])
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_accumulation_may_change_at_any_time(fit, dirs, tmp_path, stage, step):
    """One or two micro-batches to a step, as with another number of processes: the same steps, the same weights up to rounding (SGD)."""
    sgd = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.05), "scheduler": Schedule("constant")}

    def made():
        return (ppo(dirs, **sgd), prompts()) if stage == "ppo" else (sft(dirs, **sgd), rows())

    def weights(module):
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    whole, again = made(), made()
    fit(*whole, max_steps=8, accumulate_grad_batches=2)
    trainer = fit(*again, ckpt_path=tmp_path / "a" / f"step={step}.ckpt", name="b", max_steps=8)
    assert trainer.global_step == 8 and (stage == "sft" or again[0].iteration == 1)
    torch.testing.assert_close(weights(again[0]), weights(whole[0]), atol=1e-5, rtol=1e-4)


def test_the_seed_of_a_half_read_epoch_may_not_change(fit, dirs, tmp_path, monkeypatch):
    fit(sft(dirs), rows())
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    with pytest.raises(ValueError, match="middle of epoch 1 .* seed was 0 and is 7"):
        fit(sft(dirs), rows(), ckpt_path=tmp_path / "a" / "step=6.ckpt", max_steps=8)
    assert fit(sft(dirs), rows(), ckpt_path=tmp_path / "a" / "step=4.ckpt", max_steps=6, name="b").global_step == 6


def test_changed_settings_win_and_are_listed(fit, dirs, tmp_path, caplog):
    """A learning rate of 0.01 becomes 0.002: the schedule goes on from its place (linear, step 3 of 6: half of it) with the new rate."""
    fit(sft(dirs), rows())
    with caplog.at_level(logging.INFO):
        trainer = fit(sft(dirs, lr=0.002), rows(), ckpt_path=tmp_path / "a" / "step=3.ckpt", name="b", max_steps=4)
    lines = list({r.getMessage() for r in caplog.records if "goes on at step 3" in r.getMessage()})
    assert len(lines) == 1 and "initial_lr" not in lines[0] and "changed since, and the new values hold: " in lines[0]
    assert "trainer.max_steps 6 -> 4" in lines[0] and "optimizer.group0.lr 0.01 -> 0.002" in lines[0]
    assert read(tmp_path / "b" / "step=4.ckpt")["lr_schedulers"][0]["base_lrs"] == [0.002]
    assert trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.002


def test_the_new_learning_rate_is_what_steps_take(fit, dirs, tmp_path):
    """With SGD a step is lr times the gradient, so that the first step after a resume with half the rate is half as long."""

    def sgd(lr):
        return sft(dirs, optimizer=lambda params: torch.optim.SGD(params, lr=lr), scheduler=Schedule("constant"))

    fit(sgd(0.1), rows(), max_steps=4)
    start = torch.cat([v.flatten() for k, v in read(tmp_path / "a" / "step=3.ckpt")["state_dict"].items() if k.startswith("policy.")])
    moved = []
    for lr, name in ((0.1, "b"), (0.05, "c")):
        fit(sgd(lr), rows(), ckpt_path=tmp_path / "a" / "step=3.ckpt", name=name, max_steps=4)
        end = torch.cat([v.flatten() for k, v in read(tmp_path / name / "step=4.ckpt")["state_dict"].items() if k.startswith("policy.")])
        moved.append(end - start)
    assert float(moved[0].norm()) > 0
    torch.testing.assert_close(moved[1], moved[0] / 2, atol=1e-7, rtol=1e-3)


def test_other_settings_of_the_optimizer_win_too(fit, dirs, tmp_path):
    def adam(decay):
        return sft(dirs, optimizer=lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=decay), scheduler=Schedule("constant"))

    fit(adam(0.0), rows(), max_steps=2)
    trainer = fit(adam(0.5), rows(), ckpt_path=tmp_path / "a" / "step=2.ckpt", name="b", max_steps=3)
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.5
