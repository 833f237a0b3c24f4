"""PairwiseReward: its loss and scores are those of plain transformers, micro-batches change nothing, every argument does something."""

import math

import peft
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from transformers import AutoModelForSequenceClassification

from lit_rlhf import ExportHF, PairwiseDataModule, PairwiseReward, Schedule
from lit_rlhf.networks import ScalarModel


def adamw(params):
    return torch.optim.AdamW(params, lr=3e-3)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def flat(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.fixture
def fit(make_trainer, sft_dir, pair_rows):
    """fit(PairwiseReward's arguments, data=..., **Trainer's) -> (module, losses of each optimiser step)."""

    def run(settings=None, data=None, callbacks=(), model=None, rows=pair_rows, **kwargs):
        losses = []

        class Module(PairwiseReward):
            def on_train_batch_end(self, *_):
                losses.append(float(self.trainer.callback_metrics.get("train/loss", 0.0)))

        module = Module(model or sft_dir, **({"optimizer": sgd, "scheduler": Schedule("constant")} | (settings or {})))
        trainer = make_trainer(**({"max_steps": 3} | kwargs), callbacks=list(callbacks))
        trainer.fit(module, datamodule=PairwiseDataModule(rows, **({"batch_size": 8, "val_data": rows[:6]} | (data or {}))))
        return module, losses[trainer.accumulate_grad_batches - 1 :: trainer.accumulate_grad_batches]

    return run


def score(model, tokenizer, prompt: str, response: str) -> float:
    """The raw score of prompt + response + EOS by plain transformers."""
    ids = tokenizer(prompt)["input_ids"] + tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits)


def test_the_loss_is_bradley_terrys_on_transformers_scores(fit, reward_dir, pair_rows):
    module, losses = fit(model=reward_dir, data={"batch_size": 16}, max_steps=1)
    model = AutoModelForSequenceClassification.from_pretrained(reward_dir)
    margins = [
        score(model, module.tokenizer, r["prompt"], r["chosen"]) - score(model, module.tokenizer, r["prompt"], r["rejected"])
        for r in pair_rows
    ]
    assert losses[0] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 16, abs=1e-5)
    assert float(module.trainer.callback_metrics["train/accuracy"]) == sum(m > 0 for m in margins) / 16


@pytest.mark.parametrize("loss", ["pairwise", "ranking", "token"])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_change_neither_losses_nor_weights(fit, loss, accumulate):
    one, losses = fit({"loss": loss})
    parts, same = fit({"loss": loss}, accumulate_grad_batches=accumulate)
    assert len(losses) == 3
    assert same == pytest.approx(losses, abs=1e-5)
    torch.testing.assert_close(flat(parts), flat(one), atol=1e-5, rtol=0)


def test_it_learns_and_reports_by_group(fit):
    module, losses = fit({"optimizer": adamw}, max_steps=40, check_val_every_n_epoch=20, data={"batch_size": 16})
    assert losses[-1] < losses[0] / 3
    logged = {k: float(v) for k, v in module.trainer.callback_metrics.items()}
    assert logged["val/accuracy"] == 1.0 == logged["val/accuracy/worker/a"] == logged["val/accuracy/worker/b"]
    assert logged["val/loss"] < 0.3
    assert {"prompt", "response", "score"} == module.samples[0].keys()


CHANGES = {
    "loss": {"loss": "token"},
    "center_coef": {"center_coef": 0.1},
    "dtype": {"dtype": "bfloat16"},
    "peft": {"peft": peft.LoraConfig(r=2, target_modules="all-linear")},
    "frozen_layers": {"frozen_layers": 1},
    "optimizer": {"optimizer": adamw},
    "scheduler": {"scheduler": Schedule("linear")},
}


def test_every_argument_changes_a_number(fit):
    usual = fit()[1]
    for name, settings in CHANGES.items():
        assert fit(settings)[1][1:] != usual[1:], name


def test_ranking_averages_within_a_prompt(fit, reward_dir):
    """Two pairs of one prompt and one of another: the ranking loss weighs them 1/4, 1/4, 1/2, the pairwise loss 1/3 each."""
    rows = [
        {"prompt": "a cat", "responses": ["ran", "sat on", "ate it all"], "scores": [3, 2, 1]},
        {"prompt": "my dog", "responses": ["is sad", "far"], "scores": [1, 0]},
    ]
    data = {"batch_size": 2, "val_data": rows}
    ranking = fit({"loss": "ranking"}, model=reward_dir, rows=rows, data=data, max_steps=1)
    module, pairwise = fit(model=reward_dir, rows=rows, data=data, max_steps=1)
    model = AutoModelForSequenceClassification.from_pretrained(reward_dir)
    a, b, c = (score(model, module.tokenizer, "a cat", r) for r in rows[0]["responses"])
    d, e = (score(model, module.tokenizer, "my dog", r) for r in rows[1]["responses"])
    first, last = [math.log1p(math.exp(-x)) for x in (a - b, a - c, b - c)], math.log1p(math.exp(e - d))
    assert ranking[1][0] == pytest.approx((sum(first) / 3 + last) / 2, abs=1e-5)
    assert pairwise[0] == pytest.approx((sum(first) + last) / 4, abs=1e-5)


def test_export_stores_the_mean_over_references(fit, tmp_path, pair_rows):
    """`reward_mean` is the mean of the preferred responses' raw scores; plain transformers still gives the raw score."""
    export = ExportHF(str(tmp_path / "hf"))
    module, _ = fit(callbacks=[export], max_steps=1)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    raw = [score(model, module.tokenizer, r["prompt"], r["chosen"]) for r in pair_rows]
    assert model.config.reward_mean == pytest.approx(sum(raw) / 16, abs=1e-5)
    assert model.config.problem_type == "regression"
    assert float(ScalarModel.load(str(tmp_path / "hf")).mean) == pytest.approx(sum(raw) / 16, abs=1e-5)
    few, _ = fit({"reference_rows": 3}, max_steps=1)
    few.export_networks()
    assert float(few.network.mean) != pytest.approx(sum(raw) / 16, abs=1e-6)


def test_lora_trains_the_adapter_and_the_head_and_exports_them_merged(fit, sft_dir, tmp_path):
    module, losses = fit({"peft": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]), "optimizer": adamw}, max_steps=6)
    assert losses[-1] < losses[0]
    trained = {name for name, p in module.network.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name == "score.weight" for name in trained) and "score.weight" in trained and len(trained) > 5
    module.export_networks()[""].save(tmp_path / "hf")
    merged, ids = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf"), torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, module.network.model(input_ids=ids).logits, atol=1e-5, rtol=0)


def test_lora_on_all_linear_layers(fit, tmp_path):
    """`all-linear` would put an adapter on the new head too; it trains in full instead."""
    module, _ = fit({"peft": peft.LoraConfig(r=4, target_modules="all-linear")}, max_steps=1)
    assert module.network.head.weight.requires_grad and type(module.network.head) is torch.nn.Linear


def test_checkpoints_load_without_a_trainer(fit, tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="val/accuracy", mode="max", filename="best", enable_version_counter=False)
    module, _ = fit({"loss": "ranking"}, callbacks=[keep], enable_checkpointing=True, max_steps=2)
    loaded = PairwiseReward.load_from_checkpoint(tmp_path / "best.ckpt", weights_only=True)
    assert loaded.loss == "ranking"
    torch.testing.assert_close(flat(loaded), flat(module), atol=0, rtol=0)


def test_the_trainers_switches(fit):
    assert len(fit(max_steps=-1, fast_dev_run=True)[1]) == 1
    module, losses = fit({"optimizer": adamw}, max_steps=-1, max_epochs=12, overfit_batches=1, limit_val_batches=1)
    assert len(losses) == 12 and losses[-1] < losses[0] and module.trainer.max_steps == 12
    _, losses = fit(max_steps=-1, max_epochs=10, callbacks=[EarlyStopping("val/loss", patience=1, min_delta=1e9)])
    assert len(losses) == 4


def test_predict_scores_every_response(make_trainer, reward_dir, pair_rows):
    module = PairwiseReward(reward_dir)
    made = make_trainer().predict(module, datamodule=PairwiseDataModule(pair_rows, test_data=pair_rows[:3], batch_size=2))
    rows = [row for batch in made for row in batch]
    model = AutoModelForSequenceClassification.from_pretrained(reward_dir)
    for row in rows:
        assert row["score"] == pytest.approx(
            score(model, module.tokenizer, row["prompt"], row["response"].strip()) - 0.5, abs=1e-5
        )  # reward_mean
    assert len(rows) == 6


def test_a_centred_token_loss_is_refused(sft_dir):
    with pytest.raises(ValueError, match="center_coef applies"):
        PairwiseReward(sft_dir, loss="token", center_coef=0.1)
