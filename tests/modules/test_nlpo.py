"""NLPO: what it samples lies in the mask policy's nucleus, its log-probs are those of the sampler, and PPO's invariants hold."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from lit_rlhf import NLPO, PromptDataModule, Sampling, Schedule
from lit_rlhf.callbacks import ExportHF
from lit_rlhf.generation import sample
from lit_rlhf.masked_policy import MaskedPolicy
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.scoring import text_batch


def vowels(prompts, responses):
    return [10 * sum(c in "ae" for c in r) / (len(r) + 1) for r in responses]


class Recorded(NLPO):
    """Keeps each iteration's experience and every number."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.experiences, self.rollouts, self.steps, self.masks = [], [], [], []

    def log_dict(self, metrics, *args, **kwargs):
        numbers = {name: float(x) for name, x in metrics.items()}
        if "rollout/score" in numbers:
            self.experiences.append(self.experience)
            self.rollouts.append(numbers)
            self.masks.append(self.mask_policy.lm.lm_head.weight.clone())
        if "ppo/policy_loss" in numbers:
            self.steps.append(numbers)
        super().log_dict(metrics, *args, **kwargs)


@pytest.fixture
def fit(make_trainer, sft_dir, sft_rows):
    def run(settings=None, data=None, **kwargs):
        usual = {"reward_fn": vowels, "top_p": 0.8, "min_tokens": 2, "batch_size": 8, "ppo_epochs": 2, "minibatches": 2}
        usual |= {"sampling": Sampling(8, 1.0), "optimizer": lambda p: torch.optim.SGD(p, lr=0.05), "scheduler": Schedule("constant")}
        module = Recorded(sft_dir, **(usual | (settings or {})))
        trainer = make_trainer(**({"max_epochs": 2} | kwargs))
        trainer.fit(module, datamodule=PromptDataModule(sft_rows, **({"max_prompt_tokens": 64, "val_batch_size": 4} | (data or {}))))
        return module

    return run


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_and_log_probs_by_plain_transformers(sft_dir, tokenizer, tmp_path, temperature):
    """Another model as the guide: each token lies in its nucleus, and has the policy's probability there, renormalised."""
    other = AutoModelForCausalLM.from_pretrained(sft_dir)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    other.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy, guide = CausalPolicy.load(sft_dir), CausalPolicy.load(str(tmp_path))
    masked = MaskedPolicy(policy, guide, temperature, top_p=0.6, min_tokens=3).eval()
    prompts = text_batch(tokenizer, ["the cat", "my dog ran far"], [" a", " a"])
    made = sample(masked, prompts, Sampling(6, temperature), num_responses=12, key=(3,))
    with torch.no_grad():
        found = masked(made.batch, temperature=temperature)[0]
    torch.testing.assert_close(found, made.logprobs, atol=1e-4, rtol=0)
    lm, batch, outside = AutoModelForCausalLM.from_pretrained(sft_dir), made.batch, 0
    for n in range(batch.num_responses):
        prompt = batch.prompt_ids[batch.prompt_of[n]][batch.prompt_mask[batch.prompt_of[n]]]
        ids = batch.response_ids[n][batch.response_mask[n]]
        rows = torch.cat([prompt, ids])[None]
        with torch.no_grad():
            p, g = (m(input_ids=rows).logits[0, len(prompt) - 1 : -1] / temperature for m in (lm, other))
        for t, i in enumerate(ids.tolist()):
            order = [v for v in g[t].argsort(descending=True).tolist() if not policy.banned[v]]
            probability, allowed = g[t][order].softmax(-1), []
            for v, x in zip(order, probability.tolist(), strict=True):
                if len(allowed) >= 3 and sum(x for _, x in allowed) >= 0.6:
                    break
                allowed.append((v, x))
            names = [v for v, _ in allowed]
            assert i in names
            outside += len(order) - len(names)
            assert float(found[n, t]) == pytest.approx(float(p[t][names].log_softmax(-1)[names.index(i)]), abs=1e-4)
    assert outside > 0
    with pytest.raises(ValueError, match="the mask is of temperature"):
        masked(batch, temperature=0.3)


def test_responses_may_share_rows_or_not(sft_dir):
    """The same tokens with a row of the cache for each response."""
    policy, guide = CausalPolicy.load(sft_dir), CausalPolicy.load(sft_dir)
    prompts = text_batch(policy.tokenizer, ["the cat", "my dog"], [" a", " a"])

    def texts():
        return sample(MaskedPolicy(policy, guide, 1.0, 0.7, 1), prompts, Sampling(8, 1.0), num_responses=6).texts

    shared = texts()
    assert policy.shares_rows
    policy.shares_rows = guide.shares_rows = False
    assert texts() == shared and len(set(shared)) > 4


def test_the_first_step_is_clean_and_the_mask_is_renewed(fit):
    module = fit({"mask_every": 2}, max_epochs=3)
    first = module.steps[0]
    assert first["ppo/clip_fraction"] == 0 and first["ppo/approx_kl"] < 1e-8 and abs(first["ppo/ratio_mean"] - 1) < 1e-5
    start = module.rollouts[0]
    assert start["rollout/sampling_gap_max"] < 1e-4
    assert 0 < start["rollout/kl"] <= -start["rollout/length"] * torch.tensor(0.8).log()  # -log of the nucleus's share, at least 0.8
    masks = module.masks
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    torch.testing.assert_close(masks[0], AutoModelForCausalLM.from_pretrained(module.model).lm_head.weight.detach(), atol=0, rtol=0)


def test_with_the_whole_vocabulary_it_is_ppo(fit, sft_rows, make_trainer, sft_dir):
    from lit_rlhf import PPO

    mine = fit({"top_p": 1.0}, max_epochs=2)
    seen = []

    class Theirs(PPO):
        def log_dict(self, metrics, *args, **kwargs):
            seen.append({name: float(x) for name, x in metrics.items()})
            super().log_dict(metrics, *args, **kwargs)

    setting = {"reward_fn": vowels, "batch_size": 8, "ppo_epochs": 2, "minibatches": 2, "sampling": Sampling(8, 1.0)}
    ppo = Theirs(sft_dir, **setting, optimizer=lambda p: torch.optim.SGD(p, lr=0.05), scheduler=Schedule("constant"))
    make_trainer(max_epochs=2).fit(ppo, PromptDataModule(sft_rows, max_prompt_tokens=64, val_batch_size=4))
    for name, ours in (("rollout/score", mine.rollouts), ("ppo/policy_loss", mine.steps)):
        theirs = [numbers for numbers in seen if name in numbers]
        shared = set(ours[0]) & set(theirs[0])
        assert len(shared) > 8
        for a, b in zip(ours, theirs, strict=True):
            assert {k: a[k] for k in shared} == pytest.approx({k: b[k] for k in shared}, abs=2e-3), name


def test_it_learns_and_exports(fit, sft_rows, tmp_path, make_trainer):
    settings = {"batch_size": 32, "responses_per_prompt": 2, "minibatches": 1, "optimizer": lambda p: torch.optim.AdamW(p, lr=3e-3)}
    settings |= {"kl_target": 2.0, "kl_horizon": 200, "mask_every": 3, "value_lr": 1e-2}
    module = fit(settings, {"val_data": sft_rows[:4]}, max_epochs=10, callbacks=[ExportHF(str(tmp_path / "hf"))])
    scores = [r["rollout/score"] for r in module.rollouts]
    assert sum(scores[-3:]) > sum(scores[:3]) + 1.0 and module.kl_coef != 0.05
    assert {"val/score", "val/kl", "val/length", "val/eos_rate", "val/rouge1"} <= module.trainer.callback_metrics.keys()
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf" / "policy")
    written = GenerationConfig.from_pretrained(tmp_path / "hf" / "policy")
    assert (written.do_sample, written.top_p, written.top_k) == (True, 0.8, 0)


def test_micro_batches_change_nothing(fit):
    one, two = fit(), fit(accumulate_grad_batches=2)
    assert [s["ppo/policy_loss"] for s in two.steps] == pytest.approx([s["ppo/policy_loss"] for s in one.steps], abs=1e-4)


def test_refuses(sft_dir):
    for wrong in ({"top_p": 0.0}, {"min_tokens": 0}, {"mask_every": 0}):
        with pytest.raises(ValueError, match="top_p"):
            NLPO(sft_dir, reward_fn=vowels, **wrong)
    with pytest.raises(ValueError, match="multiple of responses_per_prompt"):
        NLPO(sft_dir, reward_fn=vowels, batch_size=10, responses_per_prompt=4)
