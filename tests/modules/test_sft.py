"""SFT: its loss is transformers' own, micro-batches change nothing, every argument does something, and the Trainer's switches work."""

import peft
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from transformers import AutoModelForCausalLM

from lit_rlhf import SFT, Sampling, Schedule, SFTDataModule
from lit_rlhf.metrics import Rouge


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


GREEDY = Sampling(max_new_tokens=6, temperature=0.0)
CONSTANT = Schedule("constant")


def flat(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.fixture
def fit(make_trainer, sft_dir, sft_rows):
    """fit(SFT's arguments, data=..., **Trainer's) -> (module, losses of each optimiser step)."""

    def run(settings=None, data=None, callbacks=(), model=None, **kwargs):
        losses = []

        class Module(SFT):
            def on_train_batch_end(self, *_):
                losses.append(float(self.trainer.callback_metrics.get("train/loss", 0.0)))

        module = Module(model or sft_dir, **({"sampling": GREEDY, "optimizer": sgd, "scheduler": CONSTANT} | (settings or {})))
        trainer = make_trainer(**({"max_steps": 3} | kwargs), callbacks=list(callbacks))
        trainer.fit(module, datamodule=SFTDataModule(sft_rows, **({"batch_size": 8, "val_data": sft_rows[:4]} | (data or {}))))
        return module, losses[trainer.accumulate_grad_batches - 1 :: trainer.accumulate_grad_batches]

    return run


@pytest.mark.parametrize("prompt_loss", [False, True])
def test_the_loss_is_transformers_own(fit, sft_dir, sft_rows, prompt_loss):
    """One batch of all rows: the sum of the tokens' cross-entropies (HF's labels, -100 where they do not count) over their number."""
    module, losses = fit(data={"batch_size": 16, "prompt_loss": prompt_loss}, max_steps=1)
    lm, tokenizer, total, count = AutoModelForCausalLM.from_pretrained(sft_dir), module.tokenizer, 0.0, 0
    for row in sft_rows:
        prompt, response = tokenizer(row["prompt"])["input_ids"], tokenizer(row["label"])["input_ids"]
        ids = torch.tensor([prompt + response + [tokenizer.eos_token_id]])
        labels = ids.clone()
        if not prompt_loss:
            labels[:, : len(prompt)] = -100
        n = int((labels[:, 1:] != -100).sum())
        total, count = total + float(lm(input_ids=ids, labels=labels).loss) * n, count + n
    assert losses[0] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_change_neither_losses_nor_weights(fit, accumulate):
    one, losses = fit()
    parts, same = fit(accumulate_grad_batches=accumulate)
    assert len(losses) == 3 and losses[2] < losses[0]
    assert same == pytest.approx(losses, abs=1e-5)
    torch.testing.assert_close(flat(parts), flat(one), atol=1e-5, rtol=0)


def test_it_learns_and_reports(fit, sft_rows):
    module, losses = fit({"optimizer": adamw, "scheduler": Schedule("cosine")}, max_steps=30, check_val_every_n_epoch=15)
    assert losses[-1] < losses[0] / 3
    logged = module.trainer.callback_metrics
    assert {f"val/{x}" for x in ("loss", "rouge1", "rouge2", "rougeL", "rouge_mean", "length", "eos_rate")} <= logged.keys()
    assert [row["prompt"] for row in module.samples] == [row["prompt"] for row in sft_rows[:4]]
    assert {"prompt", "response", "reference"} == module.samples[0].keys()
    again = Rouge()
    again.update([r["response"] for r in module.samples], [r["reference"] for r in module.samples])
    assert float(logged["val/rouge1"]) == pytest.approx(float(again.compute()["rouge1"]))
    assert module.trainer.global_step == 30 and float(logged["val/rouge_mean"]) > 0.3


def last_validation(module) -> dict[str, float]:
    return {k: float(v) for k, v in module.trainer.callback_metrics.items() if k.startswith("val/")}


CHANGES = {
    "sampling": {"sampling": Sampling(max_new_tokens=2, temperature=0.0)},
    "dropout": {"dropout": True},
    "dtype": {"dtype": "bfloat16"},
    "peft": {"peft": peft.LoraConfig(r=2, target_modules="all-linear")},
    "frozen_layers": {"frozen_layers": 1},
    "optimizer": {"optimizer": adamw},
    "scheduler": {"scheduler": Schedule("linear")},
}


@pytest.fixture
def dropout_dir(tmp_path, sft_dir, tokenizer):
    """The same model with attention dropout of one half in its config."""
    lm = AutoModelForCausalLM.from_pretrained(sft_dir)
    lm.config.attention_dropout = 0.5
    lm.save_pretrained(tmp_path / "dropout")
    tokenizer.save_pretrained(tmp_path / "dropout")
    return str(tmp_path / "dropout")


def test_every_argument_changes_a_number(fit, dropout_dir):
    module, losses = fit(model=dropout_dir)
    for name, settings in CHANGES.items():
        other, changed = fit(settings, model=dropout_dir)
        different = last_validation(other) != last_validation(module) if name == "sampling" else changed[1:] != losses[1:]
        assert different, name
        if name == "dropout":  # off is the default: the first loss is that of the model without any
            assert changed[0] != losses[0] == fit(max_steps=1)[1][0]


def test_the_rouge_tokenizer_is_the_metrics(fit):
    """Learned responses are words of the references: by characters they have more in common than by words."""
    found = [
        last_validation(fit({"optimizer": adamw, "rouge_tokenizer": kind}, max_steps=14)[0])["val/rouge_mean"]
        for kind in ("default", "characters")
    ]
    assert 0 < found[0] < found[1]


def test_loading_arguments_reach_transformers(sft_dir, monkeypatch):
    seen = []
    original = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: seen.append(k) or original(*a, **k))
    SFT(sft_dir, attn_implementation="eager", revision="main", trust_remote_code=False).configure_model()
    assert (seen[0]["attn_implementation"], seen[0]["revision"], seen[0]["trust_remote_code"]) == ("eager", "main", False)


def test_lora_trains_the_adapter_alone_and_exports_it_merged(fit, sft_dir, tmp_path):
    module, losses = fit({"peft": peft.LoraConfig(r=4, target_modules="all-linear"), "optimizer": adamw}, max_steps=6)
    assert losses[-1] < losses[0]
    plain = AutoModelForCausalLM.from_pretrained(sft_dir).state_dict()
    for name, p in module.policy.lm.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        if "lora_" not in name:
            torch.testing.assert_close(p, plain[name.replace(".base_layer", "")], atol=0, rtol=0)
    module.export_networks()[""].save(tmp_path / "hf")
    merged, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), torch.arange(3, 40)[None]
    with torch.no_grad():
        adapted = module.policy.lm(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, adapted, atol=1e-5, rtol=0)
    assert (adapted - AutoModelForCausalLM.from_pretrained(sft_dir)(input_ids=ids).logits).abs().max() > 0.1


def test_checkpoints_load_without_a_trainer(fit, tmp_path, sft_dir):
    keep = ModelCheckpoint(tmp_path, monitor="val/rouge_mean", mode="max", filename="best", enable_version_counter=False)
    module, _ = fit({"sampling": Sampling(5, 0.3, ["x"])}, callbacks=[keep], enable_checkpointing=True, max_steps=2)
    loaded = SFT.load_from_checkpoint(tmp_path / "best.ckpt", weights_only=True)
    assert (loaded.model, loaded.sampling) == (sft_dir, Sampling(5, 0.3, ["x"]))
    torch.testing.assert_close(flat(loaded), flat(module), atol=0, rtol=0)


def test_the_trainers_switches(fit):
    module, losses = fit(max_steps=-1, fast_dev_run=True)
    assert len(losses) == 1
    module, losses = fit(max_steps=-1, max_epochs=20, overfit_batches=1, limit_val_batches=1, callbacks=[])
    assert len(losses) == 20 and losses[-1] < losses[0] / 1.3 and module.trainer.max_epochs == -1 and module.trainer.max_steps == 20
    stop = EarlyStopping("val/loss", patience=1, min_delta=1e9)
    module, losses = fit(max_steps=-1, max_epochs=10, callbacks=[stop])
    assert len(losses) == 4  # two epochs of two steps: the second did not get better by 1e9


def test_predict_writes_a_response_for_every_prompt(make_trainer, sft_dir, sft_rows):
    def predict(**kwargs):
        module = SFT(sft_dir, sampling=Sampling(8, 1.0))
        made = make_trainer().predict(module, datamodule=SFTDataModule(sft_rows, test_data=sft_rows[:6], **kwargs))
        return [row for batch in made for row in batch]

    rows = predict(batch_size=4)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in sft_rows[:6]]
    assert {"prompt", "response", "reference"} == rows[0].keys() and len({row["response"] for row in rows}) > 3
    assert rows == predict(batch_size=3)  # sampling noise belongs to the row, not to its batch
