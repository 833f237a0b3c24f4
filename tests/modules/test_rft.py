"""RFT: it learns from the best that it wrote and from nothing else, scores rise, and micro-batches change nothing."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_rlhf import RFT, PromptDataModule, Sampling, Schedule
from lit_rlhf.best_of import candidates
from lit_rlhf.callbacks import ExportHF
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.scorers import load_scorer


def vowels(prompts, responses):
    return [10 * sum(c in "ae" for c in r) / (len(r) + 1) for r in responses]


def brief(prompts, responses):
    """Easily learnt: end early."""
    return [-float(len(r)) for r in responses]


class Recorded(RFT):
    """Keeps what each iteration learns from, and every number."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kept, self.rollouts, self.steps = [], [], []

    def log_dict(self, metrics, *args, **kwargs):
        numbers = {name: float(x) for name, x in metrics.items()}
        if "rollout/score" in numbers:
            self.kept.append(self.experience)
            self.rollouts.append(numbers)
        if "train/loss" in numbers:
            self.steps.append(numbers)
        super().log_dict(metrics, *args, **kwargs)


@pytest.fixture
def fit(make_trainer, sft_dir, sft_rows):
    def run(settings=None, data=None, **kwargs):
        usual = {"reward_fn": vowels, "n": 4, "num_prompts": 8, "minibatches": 2, "sampling": Sampling(8, 1.0)}
        usual |= {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2), "scheduler": Schedule("constant")}
        module = Recorded(sft_dir, **(usual | (settings or {})))
        trainer = make_trainer(**({"max_epochs": 2} | kwargs))
        trainer.fit(module, datamodule=PromptDataModule(sft_rows, **({"max_prompt_tokens": 64, "val_batch_size": 4} | (data or {}))))
        return module

    return run


def test_the_first_iteration_learns_the_best_of_n(fit, sft_dir, make_trainer, sft_rows):
    """What `candidates` samples with the same key, its best by hand, tokenised, and the mean log-likelihood by plain transformers."""
    module = fit({"minibatches": 1}, max_epochs=1)
    prompts = module.trainer.datamodule.prompts(0, 8)
    policy = CausalPolicy.load(sft_dir)
    found = candidates(policy, load_scorer(vowels), prompts, Sampling(8, 1.0), 4, (0, 0))
    lm, tokenizer, total, count, texts = AutoModelForCausalLM.from_pretrained(sft_dir), module.tokenizer, 0.0, 0, []
    for m in range(8):
        ended = [(vowels([], [t])[0], -k, t) for k, (t, f) in enumerate(zip(found.texts[m], found.finished[m], strict=True)) if f]
        if not ended:
            continue
        texts.append(max(ended)[2])
        prompt, ids = tokenizer(prompts.columns["prompt"][m])["input_ids"], tokenizer(texts[-1])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logprobs = lm(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total, count = total - float(logprobs[torch.arange(len(ids)), ids].sum()), count + len(ids)
    (batch,) = module.kept
    rows = [ids[kept].tolist() for ids, kept in zip(batch.response_ids, batch.response_mask, strict=True)]
    assert tokenizer.batch_decode(rows, skip_special_tokens=True) == texts and all(row[-1] == tokenizer.eos_token_id for row in rows)
    assert module.steps[0]["train/loss"] == pytest.approx(total / count, abs=1e-4)
    assert module.rollouts[0]["rollout/score"] == pytest.approx(sum(vowels([], texts)) / len(texts), abs=1e-5)
    assert module.rollouts[0]["rollout/kept"] == pytest.approx(len(texts) / 32)
    assert module.rollouts[0]["rollout/mean_score"] == pytest.approx(float(found.scores.mean()), abs=1e-5)


def test_scores_rise_and_micro_batches_change_nothing(fit, sft_rows, tmp_path):
    settings = {"reward_fn": brief, "epochs": 2}
    module = fit(settings, {"val_data": sft_rows[:4]}, max_epochs=3, callbacks=[ExportHF(str(tmp_path / "hf"))])
    first, *_, last = (r["rollout/mean_score"] for r in module.rollouts)
    assert last > first + 2.0 and len(module.rollouts) == 3 and len(module.steps) == 12  # of 3 iterations x 2 epochs x 2 minibatches
    assert {"val/score", "val/length", "val/eos_rate", "val/rouge1"} <= module.trainer.callback_metrics.keys()
    assert module.rollouts[-1]["rollout/episodes"] == 3 * 32
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(exported.lm_head.weight, module.policy.lm.lm_head.weight, atol=0, rtol=0)
    one, two = fit(), fit(accumulate_grad_batches=2)
    assert [s["train/loss"] for s in two.steps] == pytest.approx([s["train/loss"] for s in one.steps], abs=1e-4)


def test_what_is_kept(fit):
    many, few = fit({"keep": 3, "minibatches": 1}, max_epochs=1), fit({"keep": 3, "min_score": 1.5, "minibatches": 1}, max_epochs=1)
    assert many.rollouts[0]["rollout/kept"] > few.rollouts[0]["rollout/kept"] > 0
    assert few.rollouts[0]["rollout/score"] > many.rollouts[0]["rollout/score"]
    assert few.kept[0].num_responses < many.kept[0].num_responses <= 24
    with pytest.raises(ValueError, match="^0 prompts per iteration cannot be split into minibatches 2 .*keep more .*of 32, 0 ended"):
        fit({"min_score": 1e9})


def test_refuses(sft_dir, reward_dir, fit, make_trainer, sft_rows):
    cases = {
        "at least keep": {"n": 2, "keep": 3},
        "temperature > 0": {"sampling": Sampling(4, 0.0)},
        "not both": {"reward_model": reward_dir},
        "epochs must be": {"epochs": 0},
    }
    for said, wrong in cases.items():
        with pytest.raises(ValueError, match=said):
            RFT(sft_dir, reward_fn=vowels, **wrong)
    with pytest.raises(ValueError, match="limit_train_batches"):
        fit(limit_train_batches=2)
