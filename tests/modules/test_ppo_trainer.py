"""PPO under the Trainer: epochs and steps, callbacks, checkpoints, validation and prediction."""

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lit_rlhf import PPO, PromptDataModule, Sampling


def flat(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_an_epoch_is_an_iteration_and_max_epochs_becomes_max_steps(fit_ppo):
    module = fit_ppo(max_steps=-1, max_epochs=3)
    assert len(module.experiences) == 3 and len(module.steps) == 12
    assert (module.trainer.max_steps, module.trainer.max_epochs, module.trainer.current_epoch) == (12, -1, 3)


def test_fast_dev_run_and_overfit_batches(fit_ppo, sft_rows):
    module = fit_ppo(data={"val_data": sft_rows[:4]}, max_steps=-1, fast_dev_run=True)
    assert len(module.experiences) == 1 == len(module.steps) and len(module.samples) == 4
    module = fit_ppo(max_steps=8, overfit_batches=1)
    first, second = (e.batch.columns["prompt"] for e in module.experiences)
    assert first == second


def test_validation_samples_with_fixed_noise(fit_ppo, sft_rows):
    """With a learning rate of 0 each validation gives the same responses; limit_val_batches takes the first of them."""
    settings = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}
    seen = []

    class Keep(ModelCheckpoint):
        def on_validation_end(self, trainer, module):
            seen.append([row["response"] for row in module.samples])

    module = fit_ppo(settings, {"val_data": sft_rows[:10]}, callbacks=[Keep()], enable_checkpointing=True, max_steps=8)
    assert len(seen) == 2 and seen[0] == seen[1] and len(seen[0]) == 10
    names = {"score", "kl", "length", "eos_rate", "rouge1", "rouge2", "rougeL", "rouge_mean"}
    logged = module.trainer.callback_metrics
    assert {f"val/{name}" for name in names} <= logged.keys()
    assert {"prompt", "response", "reference", "score", "kl"} <= module.samples[0].keys()
    assert float(logged["val/score"]) == pytest.approx(sum(row["score"] for row in module.samples) / 10, abs=1e-5)
    assert float(logged["val/kl"]) == pytest.approx(0, abs=1e-5)
    limited = fit_ppo(settings, {"val_data": sft_rows[:10]}, limit_val_batches=2, max_steps=4)
    assert [row["response"] for row in limited.samples] == seen[0][:8]
    wider = fit_ppo(settings, {"val_data": sft_rows[:10], "val_batch_size": 10}, max_steps=4)
    assert [row["response"] for row in wider.samples] == seen[0]  # the noise belongs to the row, not to its batch


def test_early_stopping_and_checkpoints_watch_the_score(fit_ppo, sft_rows, tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="val/score", mode="max", filename="best", enable_version_counter=False)
    stop = EarlyStopping("val/score", mode="max", patience=1, min_delta=1e9)
    module = fit_ppo(data={"val_data": sft_rows[:4]}, callbacks=[keep, stop], enable_checkpointing=True, max_steps=40)
    assert len(module.experiences) == 2  # the second validation was not better by 1e9
    assert (tmp_path / "best.ckpt").exists()


@pytest.mark.parametrize("reward", ["function", "model"])
def test_checkpoints_load_without_a_trainer(fit_ppo, tmp_path, reward_dir, reward):
    """Without the frozen networks in the file; a function is given again, all else comes from the file."""
    keep = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
    settings = {"sampling": Sampling(7, 0.9), "kl_target": 3.0, "gamma": 0.99, "scale_scores": True}
    settings |= {"reward_model": reward_dir} if reward == "model" else {}
    module = fit_ppo(settings, callbacks=[keep], enable_checkpointing=True)
    given = {} if reward == "model" else {"reward_fn": module.reward_fn}
    loaded = PPO.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True, **given)
    assert (loaded.sampling, loaded.kl_target, loaded.shaping.gamma) == (Sampling(7, 0.9), 3.0, 0.99)
    assert loaded.kl_coef == module.kl_coef and loaded.moments.std == module.moments.std
    for name in ("policy", "value", "reference"):
        torch.testing.assert_close(flat(getattr(loaded, name)), flat(getattr(module, name)), atol=0, rtol=0)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {key.split(".")[0] for key in stored} <= {"policy", "value", "rouge", "val_metrics"}


def test_predict(make_trainer, sft_dir, sft_rows):
    def predict(size):
        module = PPO(sft_dir, reward_fn=lambda prompts, responses: [len(r) for r in responses], sampling=Sampling(8, 1.0))
        data = PromptDataModule(sft_rows, test_data=sft_rows[:6], max_prompt_tokens=64, val_batch_size=size)
        return [row for batch in make_trainer().predict(module, datamodule=data) for row in batch]

    rows = predict(4)
    assert [(r["prompt"], r["reference"]) for r in rows] == [(r["prompt"], r["label"]) for r in sft_rows[:6]]
    assert [r["score"] for r in rows] == [len(r["response"]) for r in rows]
    assert all(abs(r["kl"]) < 1e-5 for r in rows)
    assert [r["response"] for r in predict(3)] == [r["response"] for r in rows]


def test_metrics_reach_the_logger_once_an_iteration(fit_ppo, tmp_path):
    import csv

    module = fit_ppo(logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    with open(tmp_path / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("rollout/score")]
    assert [float(row["rollout/score"]) for row in rows] == pytest.approx([s["rollout/score"] for s in module.statistics], abs=1e-4)
    ppo = [float(row["ppo/policy_loss"]) for row in rows]
    means = [sum(step["ppo/policy_loss"] for step in module.steps[i : i + 4]) / 4 for i in (0, 4)]
    assert ppo == pytest.approx(means, abs=1e-5)


def test_the_trainer_clips(fit_ppo, sft_dir):
    """Clipped to a norm of 1e-3 at a learning rate of 0.05, 4 steps move the weights by at most 2e-4."""
    from lit_rlhf.networks import CausalPolicy

    module = fit_ppo(gradient_clip_val=1e-3, max_steps=4)
    moved = (flat(module.policy) - flat(CausalPolicy.load(sft_dir))).norm()
    assert 0 < float(moved) <= 2.001e-4
