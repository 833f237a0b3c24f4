"""DPO: its loss is that of plain transformers' log-probs, the reference is computed once, micro-batches change nothing."""

import math

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from lit_rlhf import DPO, ExportHF, PairwiseDataModule, Schedule, SFTDataModule
from lit_rlhf.data.loader import StepLoader
from lit_rlhf.modules.reference import ReferenceLogprobs
from lit_rlhf.networks import CausalPolicy


def adamw(params):
    return torch.optim.AdamW(params, lr=3e-3)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def flat(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.fixture
def fit(make_trainer, sft_dir, pair_rows):
    """fit(DPO's arguments, data=..., **Trainer's) -> (module, metrics of each optimiser step)."""

    def run(settings=None, data=None, callbacks=(), model=None, rows=pair_rows, ckpt_path=None, **kwargs):
        steps = []

        class Module(DPO):
            def log_dict(self, metrics, *args, **kwargs):
                if "train/loss" in metrics:
                    steps.append({name: float(x) for name, x in metrics.items()})
                super().log_dict(metrics, *args, **kwargs)

        module = Module(model or sft_dir, **({"optimizer": sgd, "scheduler": Schedule("constant")} | (settings or {})))
        trainer = make_trainer(**({"max_steps": 3} | kwargs), callbacks=list(callbacks))
        data = PairwiseDataModule(rows, **({"batch_size": 8, "val_data": rows[:6]} | (data or {})))
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return module, steps

    return run


def logprob(model, tokenizer, prompt: str, response: str) -> tuple[float, int]:
    """log p(response + EOS | prompt) by plain transformers, and its tokens."""
    start, ids = tokenizer(prompt)["input_ids"], tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        found = model(input_ids=torch.tensor([start + ids])).logits.log_softmax(-1)[0, len(start) - 1 : -1]
    return float(found.gather(1, torch.tensor(ids)[:, None]).sum()), len(ids)


def test_the_first_step_knows_no_preference(fit, pair_rows, sft_dir):
    """Policy and reference are equal: the loss is log 2 (IPO: 1 / (2 beta)^2), all rewards 0; the log-probs are transformers'."""
    module, steps = fit(data={"batch_size": 16}, max_steps=1)
    assert steps[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(steps[0]["train/margin"]) < 1e-4 and abs(steps[0]["train/chosen_reward"]) < 1e-4
    plain = AutoModelForCausalLM.from_pretrained(sft_dir)
    for kind in ("chosen", "rejected"):
        expected = [logprob(plain, module.tokenizer, row["prompt"], row[kind])[0] for row in pair_rows]
        assert steps[0][f"train/{kind}_logprob"] == pytest.approx(sum(expected) / 16, abs=1e-3)
    assert fit({"loss": "ipo", "beta": 0.25}, max_steps=1)[1][0]["train/loss"] == pytest.approx(4.0, abs=1e-4)


@pytest.mark.parametrize("kind, average", [("sigmoid", None), ("sigmoid", True), ("ipo", None), ("ipo", False)])
def test_the_loss_is_that_of_transformers_logprobs(fit, make_trainer, sft_dir, pair_rows, tmp_path, kind, average):
    """After two steps, on the validation rows: policy and reference differ, and both are read with plain transformers."""
    module, _ = fit({"loss": kind, "length_average": average, "optimizer": adamw}, data={"val_data": pair_rows[:4]}, max_steps=2)
    module.policy.save(tmp_path)
    policy, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path, sft_dir))
    losses, margins = [], []
    for row in pair_rows[:4]:
        h = 0.0
        for sign, text in ((1, row["chosen"]), (-1, row["rejected"])):
            (new, n), (old, _) = (logprob(model, module.tokenizer, row["prompt"], text) for model in (policy, reference))
            h += sign * (new - old) / (n if average or (average is None and kind == "ipo") else 1)
        losses.append(math.log1p(math.exp(-0.1 * h)) if kind == "sigmoid" else (h - 5) ** 2)
        margins.append(0.1 * h)
    logged = make_trainer().validate(module, PairwiseDataModule(pair_rows, val_data=pair_rows[:4], batch_size=4), verbose=False)[0]
    assert abs(sum(margins)) > 1e-3
    assert logged["val/loss"] == pytest.approx(sum(losses) / 4, abs=2e-4)
    assert logged["val/margin"] == pytest.approx(sum(margins) / 4, abs=2e-5)
    assert logged["val/accuracy"] == sum(m > 0 for m in margins) / 4


@pytest.mark.parametrize("settings", [{}, {"loss": "ipo", "sft_coef": 0.5, "label_smoothing": 0.1}])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_change_neither_losses_nor_weights(fit, settings, accumulate):
    one, steps = fit(settings)
    parts, same = fit(settings, accumulate_grad_batches=accumulate)
    assert len(steps) == len(same) == 3
    steps[0]["train/accuracy"] = same[0]["train/accuracy"]  # policy and reference are equal but for rounding
    for a, b in zip(steps, same, strict=True):
        assert b == pytest.approx(a, abs=1e-4)
    torch.testing.assert_close(flat(parts), flat(one), atol=1e-5, rtol=0)


def test_it_learns_and_reports_by_group(fit):
    module, steps = fit({"optimizer": adamw}, max_steps=30, check_val_every_n_epoch=30, data={"batch_size": 16})
    assert steps[-1]["train/loss"] < 0.3 and steps[-1]["train/accuracy"] == 1.0
    logged = {k: float(v) for k, v in module.trainer.callback_metrics.items()}
    assert logged["val/accuracy"] == 1.0 == logged["val/accuracy/worker/a"] == logged["val/accuracy/worker/b"]
    assert logged["val/margin"] > 1.0 and {"prompt", "response", "score"} == module.samples[0].keys()


def test_the_sft_term_holds_the_chosen_up(fit):
    """-log pi(chosen) per token, the mean over pairs (Pang et al. 2024), is added; it keeps the chosen responses likelier."""
    plain, held = (fit({"optimizer": adamw, "sft_coef": coef}, max_steps=20)[1] for coef in (0.0, 1.0))
    first = held[0]
    assert first["train/loss"] == pytest.approx(math.log(2) + first["train/sft_loss"], abs=1e-4)
    assert held[-1]["train/chosen_logprob"] > plain[-1]["train/chosen_logprob"] + 1


CHANGES = {
    "beta": {"beta": 0.5},
    "loss": {"loss": "ipo"},
    "label_smoothing": {"label_smoothing": 0.2},
    "length_average": {"length_average": True},
    "sft_coef": {"sft_coef": 0.1},
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


def test_tokens_per_forward_changes_the_passes_of_the_reference_and_no_number(fit, monkeypatch):
    passes: list[bool] = []
    original = CausalPolicy.forward
    monkeypatch.setattr(
        CausalPolicy, "forward", lambda self, batch, **more: passes.append(torch.is_grad_enabled()) or original(self, batch, **more)
    )
    _, usual = fit(data={"val_data": None})
    assert passes.count(False) == 2 and passes.count(True) == 3  # 16 rows in steps of 8
    passes.clear()
    _, small = fit({"tokens_per_forward": 60}, data={"val_data": None})
    assert passes.count(False) > 4 and passes.count(True) == 3
    usual[0]["train/accuracy"] = small[0]["train/accuracy"]  # of rounding
    for a, b in zip(usual, small, strict=True):
        assert b == pytest.approx(a, abs=1e-4)


def test_the_reference_is_asked_for_the_rows_that_a_run_reaches(fit, monkeypatch, tmp_path):
    """A step of 4 of the 16 rows; a run that goes on asks for what is left, in the same passes."""
    seen = []
    original = ReferenceLogprobs._compute
    monkeypatch.setattr(
        ReferenceLogprobs,
        "_compute",
        lambda self, module, split, passes: seen.append((split, passes)) or original(self, module, split, passes),
    )
    module, _ = fit(max_steps=1, data={"batch_size": 4}, num_sanity_val_steps=1)
    assert [(split, len(passes[0])) for split, passes in seen] == [("val", 4), ("train", 4)]
    assert module.reference._network is None  # gone when training begins
    assert not [name for name, _ in module.named_modules() if name.startswith("reference")]
    seen.clear()
    whole, _ = fit(max_steps=4, data={"batch_size": 4, "val_data": None})
    assert sorted(row for rows in seen[0][1] for row in rows) == list(range(16))
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fit(max_steps=4, data={"batch_size": 4, "val_data": None}, callbacks=[keep], enable_checkpointing=True)
    seen_whole = seen.pop(0)
    seen.clear()
    again, _ = fit(max_steps=4, data={"batch_size": 4, "val_data": None}, ckpt_path=tmp_path / "step=2.ckpt")
    assert seen == [("train", seen_whole[1][2:])]
    assert torch.equal(flat(again), flat(whole))


def test_rows_ahead():
    """10 rows, 4 a step: steps of 4, 4 and 2; the order is the loader's own."""
    loader = StepLoader([3] * 10, [1] * 10, lambda rows: None, batch_size=4, shuffle=True, seed=5)
    order = [loader.order(epoch).tolist() for epoch in (0, 1)]
    assert loader.ahead(0) == set() and loader.ahead(1) == set(order[0][:4]) and loader.ahead(2) == set(order[0][:8])
    assert loader.ahead(3) == set(range(10)) == loader.ahead(10**9)
    loader.limit = 1  # the Trainer's epochs end after one step: the second step is the next epoch's first
    assert loader.ahead(2) == set(order[0][:4]) | set(order[1][:4])
    fresh = StepLoader([3] * 10, [1] * 10, lambda rows: None, batch_size=4, shuffle=True, seed=5)
    fresh.load_state_dict(loader.state_dict() | {"epoch": 0, "position": 1, "end": 3})
    assert fresh.ahead(1) == set(order[0][4:8])


def test_lora_takes_the_policy_with_its_adapter_off(fit, sft_dir, tmp_path, pair_rows):
    settings = {"peft": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]), "optimizer": adamw}
    module, steps = fit(settings, max_steps=6)
    assert steps[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-4) and steps[-1]["train/loss"] < steps[0]["train/loss"]
    assert all("lora_" in n for n, p in module.named_parameters() if p.requires_grad)
    plain = AutoModelForCausalLM.from_pretrained(sft_dir)
    known = module.reference.sums["val"]
    for row, sums in known.items():
        expected = [logprob(plain, module.tokenizer, pair_rows[row]["prompt"], pair_rows[row][kind])[0] for kind in ("chosen", "rejected")]
        assert sums == pytest.approx(expected, abs=1e-3)
    module.export_networks()[""].save(tmp_path / "hf")
    merged, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, module.policy.lm(input_ids=ids).logits, atol=1e-5, rtol=0)


def test_export_and_checkpoint(fit, tmp_path):
    """The directory is a plain language model; the checkpoint holds the policy alone and loads without a trainer."""
    keep = ModelCheckpoint(tmp_path, monitor="val/accuracy", mode="max", filename="best", enable_version_counter=False)
    export = ExportHF(str(tmp_path / "hf"), monitor="val/accuracy")
    module, _ = fit({"beta": 0.3}, callbacks=[keep, export], enable_checkpointing=True, max_steps=2)
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, module.policy.lm(input_ids=ids).logits, atol=1e-5, rtol=0)
    loaded = DPO.load_from_checkpoint(tmp_path / "best.ckpt", weights_only=True)
    assert loaded.setting["beta"] == 0.3
    torch.testing.assert_close(flat(loaded), flat(module), atol=0, rtol=0)


def test_predict_gives_implicit_rewards(make_trainer, fit, sft_dir, pair_rows):
    module, _ = fit({"optimizer": adamw})
    made = make_trainer().predict(module, datamodule=PairwiseDataModule(pair_rows, test_data=pair_rows[:3], batch_size=2))
    rows = [row for batch in made for row in batch]
    reference = AutoModelForCausalLM.from_pretrained(sft_dir)
    assert len(rows) == 6
    for row in rows:
        old, _ = logprob(reference, module.tokenizer, row["prompt"], row["response"].strip())
        new, _ = logprob(module.policy.lm, module.tokenizer, row["prompt"], row["response"].strip())
        assert row["score"] == pytest.approx(0.1 * (new - old), abs=1e-4)


def test_rankings_are_read_once_for_all_their_pairs(fit):
    rows = [{"prompt": f"a cat {i}", "responses": ["ran", "sat on", "ate it all"], "scores": [3, 2, 1]} for i in range(8)]
    module, steps = fit(rows=rows, data={"batch_size": 8, "val_data": None}, max_steps=2)
    assert {len(sums) for sums in module.reference.sums["train"].values()} == {3}
    assert steps[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5) and steps[1]["train/loss"] < steps[0]["train/loss"]


@pytest.mark.parametrize("wrong", [{"beta": 0}, {"label_smoothing": 0.5}, {"sft_coef": -1}, {"tokens_per_forward": 0}])
def test_settings_that_cannot_work_are_refused(sft_dir, wrong):
    with pytest.raises(ValueError, match="DPO needs beta above 0"):
        DPO(sft_dir, **wrong)


def test_other_data_is_refused(make_trainer, sft_dir, sft_rows):
    with pytest.raises(TypeError, match="DPO learns from a PairwiseDataModule"):
        make_trainer(max_steps=1).fit(DPO(sft_dir), datamodule=SFTDataModule(sft_rows, batch_size=2))
