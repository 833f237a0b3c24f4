"""RLOO: the reward and advantage of each response, the first step is REINFORCE's, what changes nothing, each argument changes a number."""

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from lit_rlhf import PPO, RLOO, ExportHF, PromptDataModule, Sampling, Schedule, SFTDataModule
from lit_rlhf.networks import CausalPolicy


def sgd(params):
    return torch.optim.SGD(params, lr=0.05)


def adamw(params):
    return torch.optim.AdamW(params, lr=3e-3)


def vowels(prompts, responses):
    """The share of a's and e's in a response, times ten."""
    return [10 * sum(c in "ae" for c in r) / (len(r) + 1) for r in responses]


def flat(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class Recorded(RLOO):
    """Keeps each iteration's experience and statistics, and each optimiser step's metrics."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.experiences, self.statistics, self.steps = [], [], []

    def log_dict(self, metrics, *args, **kwargs):
        numbers = {name: float(x) for name, x in metrics.items()}
        if "rollout/score" in numbers:
            self.experiences.append(self.experience)
            self.statistics.append(numbers)
        if "rloo/policy_loss" in numbers:
            self.steps.append(numbers)
        super().log_dict(metrics, *args, **kwargs)


@pytest.fixture
def fit(make_trainer, sft_dir, sft_rows):
    """fit(RLOO's arguments, data=PromptDataModule's, **Trainer's) -> the module; by default 2 iterations of 4 prompts x 4 responses."""

    def run(settings=None, data=None, callbacks=(), ckpt_path=None, rows=sft_rows, **kwargs):
        usual = {"sampling": Sampling(8, 1.0), "batch_size": 16, "optimizer": sgd, "scheduler": Schedule("constant")}
        settings = usual | (settings or {})
        if "reward_model" not in settings:
            settings.setdefault("reward_fn", vowels)
        module = Recorded(sft_dir, **settings)
        trainer = make_trainer(**({"max_steps": 2 * module.steps_per_iteration} | kwargs), callbacks=list(callbacks))
        data = PromptDataModule(rows, **({"max_prompt_tokens": 64, "val_batch_size": 4} | (data or {})))
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return module

    return run


def sequence_rewards(experience, kl_coef: float) -> torch.Tensor:
    """score - beta sum_t (log p - log p_ref), from the experience's log-probs."""
    mask = experience.batch.response_mask
    return experience.scores - kl_coef * ((experience.logprobs - experience.ref_logprobs) * mask).sum(1)


def test_the_reward_is_the_score_minus_the_kl_of_the_whole_response(fit):
    """In the second iteration the policy has moved, so there is a KL to pay for."""
    module = fit({"kl_coef": 0.3, "optimizer": adamw})
    assert (module.experiences[0].logprobs - module.experiences[0].ref_logprobs).abs().max() < 1e-5
    experience, logged = module.experiences[1], module.statistics[1]
    rewards = sequence_rewards(experience, 0.3)
    assert (rewards - experience.scores).abs().max() > 1e-2
    torch.testing.assert_close(experience.rewards.sum(1), rewards, atol=1e-5, rtol=0)
    assert logged["rollout/reward"] == pytest.approx(float(rewards.mean()), abs=1e-5)
    for group in range(4):  # each minus the mean of the other three
        own = rewards[4 * group : 4 * group + 4].tolist()
        for i, reward in enumerate(own):
            row, others = 4 * group + i, own[:i] + own[i + 1 :]
            mask = experience.batch.response_mask[row]
            assert experience.advantages[row][mask].tolist() == pytest.approx([reward - sum(others) / 3] * int(mask.sum()), abs=1e-4)
            assert experience.advantages[row][~mask].abs().sum() == 0
    assert {"rollout/value", "rollout/explained_variance"}.isdisjoint(logged)


def test_the_first_step_is_reinforces(fit, sft_dir):
    """One SGD step on one experience is lr * mean_i A_i grad sum_t log p_t, taken with plain autograd."""
    module = fit(max_steps=1)
    experience = module.experiences[0]
    policy = CausalPolicy.load(sft_dir)
    logprobs = policy(experience.batch, ban=True)[0]
    (-(experience.advantages[:, 0] * logprobs.sum(1)).mean()).backward()
    with torch.no_grad():
        for p in policy.parameters():
            p -= 0.05 * p.grad
    torch.testing.assert_close(flat(module.policy), flat(policy), atol=1e-6, rtol=0)
    first = module.steps[0]
    assert first["rloo/ratio_max_dev"] < 1e-4 and first["rloo/clip_fraction"] == 0.0
    assert first["rloo/policy_loss"] == pytest.approx(-float(experience.advantages[:, 0].mean()), abs=1e-5)


def test_plain_reinforce_has_a_moving_baseline(fit):
    """k = 1: minus the mean of all rewards of the iterations before (the first: its own)."""
    module = fit({"responses_per_prompt": 1, "batch_size": 6}, max_steps=3)
    rewards = [sequence_rewards(e, 0.05) for e in module.experiences]
    baselines = [rewards[0].mean(), rewards[0].mean(), torch.cat(rewards[:2]).mean()]
    for experience, reward, baseline in zip(module.experiences, rewards, baselines, strict=True):
        torch.testing.assert_close(experience.advantages[:, 0], reward - baseline, atol=1e-4, rtol=0)


def test_grpos_advantage(fit):
    experience = fit({"advantage": "group_normalised", "kl_coef": 0.0}).experiences[1]
    groups = experience.scores.view(4, 4)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(experience.advantages[:, 0].view(4, 4), expected, atol=1e-4, rtol=0)


def test_it_samples_and_scores_as_ppo_does(fit, make_trainer, sft_dir, reward_dir, sft_rows):
    """The same seed, prompts and reward model: the first rollout's texts and scores are PPO's."""
    one = fit({"reward_model": reward_dir}, max_steps=1).experiences[0]
    module = PPO(sft_dir, reward_model=reward_dir, sampling=Sampling(8, 1.0), batch_size=16, responses_per_prompt=4, ppo_epochs=1)
    make_trainer(max_steps=1).fit(module, datamodule=PromptDataModule(sft_rows, max_prompt_tokens=64))
    assert torch.equal(one.batch.response_ids, module.experience.batch.response_ids)
    torch.testing.assert_close(one.scores, module.experience.scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.rewards, module.experience.rewards, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{"epochs": 2, "minibatches": 2}, {"epochs": 2, "ratio": "token"}])
@pytest.mark.parametrize("accumulate", [2])
def test_micro_batches_change_neither_losses_nor_weights(fit, reward_dir, settings, accumulate):
    settings = settings | {"reward_model": reward_dir}
    one, parts = fit(settings), fit(settings, accumulate_grad_batches=accumulate)
    assert len(one.steps) == len(parts.steps) == 2 * one.steps_per_iteration
    for a, b in zip(one.steps, parts.steps, strict=True):
        assert b == pytest.approx(a, abs=5e-5)
    torch.testing.assert_close(flat(parts.policy), flat(one.policy), atol=1e-5, rtol=0)


CHANGES = {
    "reward_fn": {"reward_fn": lambda prompts, responses: [float(len(r)) for r in responses]},
    "sampling": {"sampling": Sampling(8, 0.8)},
    "batch_size": {"batch_size": 12},
    "responses_per_prompt": {"responses_per_prompt": 2},
    "advantage": {"advantage": "group_normalised"},
    "ratio": {"ratio": "token"},
    "epochs": {"epochs": 2},
    "minibatches": {"minibatches": 2},
    "kl_coef": {"kl_coef": 0.5},
    "kl_target": {"kl_target": 0.01},
    "no_eos_score": {"no_eos_score": -7.0},
    "reward_baseline": {"reward_baseline": "reference"},
    "score_clip": {"score_clip": 1.0},
    "dtype": {"dtype": "bfloat16"},
    "peft": {"peft": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])},
    "frozen_layers": {"frozen_layers": 1},
    "optimizer": {"optimizer": adamw},
    "scheduler": {"scheduler": Schedule("linear")},
}
BESIDE = {  # arguments that act only beside others; at a high rate every ratio would be beyond any clip
    "kl_horizon": ({"kl_target": 0.01}, {"kl_horizon": 100}),
    "clip": ({"epochs": 2, "optimizer": lambda params: torch.optim.SGD(params, lr=1e-3)}, {"clip": 0.001}),
}


def test_every_argument_changes_a_number(fit):
    """The policy after two iterations of (nearly) on-policy steps; some arguments act only beside another."""
    usual = flat(fit().policy)
    for name, settings in CHANGES.items():
        other = flat(fit(settings).policy)
        assert len(other) != len(usual) or not torch.equal(other, usual), name
    for name, (beside, settings) in BESIDE.items():
        weights = [flat(fit(s, max_steps=4).policy) for s in (beside, beside | settings)]
        assert not torch.equal(*weights), name


def test_it_raises_the_reward(fit):
    module = fit({"optimizer": adamw, "batch_size": 32, "kl_coef": 0.01}, max_steps=40)
    scores = [s["rollout/score"] for s in module.statistics]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 1.0


def test_lora_export_and_checkpoint(fit, sft_dir, tmp_path):
    """The reference is the policy with its adapter off; the export is one plain directory; the checkpoint holds what trains."""
    settings = {"peft": peft.LoraConfig(r=4, target_modules="all-linear"), "optimizer": adamw}
    module = fit(settings, callbacks=[ExportHF(str(tmp_path / "hf"))])
    assert module.reference is None
    plain, second = CausalPolicy.load(sft_dir), module.experiences[1]
    with torch.no_grad():
        torch.testing.assert_close(second.ref_logprobs, plain(second.batch, ban=True)[0], atol=1e-5, rtol=0)
        ids = torch.arange(3, 40)[None]
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(input_ids=ids).logits
        torch.testing.assert_close(merged, module.policy.lm(input_ids=ids).logits, atol=1e-5, rtol=0)


def test_checkpoints_load_without_a_trainer(fit, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
    module = fit({"advantage": "moving_mean", "kl_target": 3.0}, callbacks=[keep], enable_checkpointing=True)
    loaded = RLOO.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True, reward_fn=vowels)
    assert loaded.kl_coef == module.kl_coef and loaded.moments.mean == module.moments.mean != 0.0
    torch.testing.assert_close(flat(loaded.policy), flat(module.policy), atol=0, rtol=0)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {key.split(".")[0] for key in stored} <= {"policy", "rouge", "val_metrics"}


def test_validation_and_predict(fit, make_trainer, sft_rows):
    module = fit(data={"val_data": sft_rows[:4]})
    assert {"val/score", "val/kl", "val/length", "val/eos_rate", "val/rouge1"} <= module.trainer.callback_metrics.keys()
    data = PromptDataModule(sft_rows, test_data=sft_rows[:3], max_prompt_tokens=64)
    rows = [row for batch in make_trainer().predict(module, datamodule=data) for row in batch]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in sft_rows[:3]]
    assert [row["score"] for row in rows] == pytest.approx(vowels(None, [row["response"] for row in rows]), abs=1e-5)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({}, "give exactly one of reward_model and reward_fn"),
        ({"reward_fn": vowels, "responses_per_prompt": 1, "advantage": "leave_one_out"}, "'leave_one_out' compares .* give at least 2"),
        ({"reward_fn": vowels, "responses_per_prompt": 1, "advantage": "group_normalised"}, "or advantage: moving_mean"),
        ({"reward_fn": vowels, "batch_size": 10}, "multiple of responses_per_prompt 4"),
        ({"reward_fn": vowels, "epochs": 0}, "epochs must be at least 1, got 0"),
        ({"reward_fn": vowels, "clip": 0.0}, "clip must be above 0, got 0.0"),
        ({"reward_fn": vowels, "sampling": Sampling(temperature=0.0)}, "RLOO needs sampling.temperature > 0"),
    ],
)
def test_contradictions_are_refused_before_anything_loads(sft_dir, settings, said):
    with pytest.raises(ValueError, match=said):
        RLOO(sft_dir, **settings)


def test_what_cannot_serve_it_is_refused(fit, make_trainer, sft_dir):
    with pytest.raises(ValueError, match="4 prompts per iteration cannot be split"):
        fit(accumulate_grad_batches=8)
    with pytest.raises(TypeError, match=r"RLOO trains on a PromptDataModule \(fit\(rloo"):
        make_trainer(max_steps=1).fit(
            RLOO(sft_dir, reward_fn=vowels), datamodule=SFTDataModule([{"prompt": "a", "label": "b"}] * 4, batch_size=2)
        )
