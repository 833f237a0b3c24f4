"""PPO: what holds at the first minibatch, what changes nothing, and that each argument changes a number."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_rlhf import PPO, PromptDataModule, Sampling, Schedule
from lit_rlhf.networks import CausalPolicy, ScalarModel


def flat(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def adamw(params):
    return torch.optim.AdamW(params, lr=3e-3)


@pytest.mark.parametrize("precision, rounding", [("32-true", 1e-5), ("bf16-mixed", 2**-6)])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_the_first_minibatch_has_ratio_1_and_kl_0(fit_ppo, reward_dir, precision, rounding, minibatches):
    """Dropout is off, temperatures agree, the rollout runs in the Trainer's precision: only rounding is left."""
    module = fit_ppo(
        {"reward_model": reward_dir, "minibatches": minibatches, "ppo_epochs": 1, "sampling": Sampling(8, 0.7)}, precision=precision
    )
    first, rollout = module.steps[0], module.statistics[0]
    experience = module.experiences[0]
    kl = float((experience.logprobs - experience.ref_logprobs).abs().max())
    print(
        f"\n{precision}, {minibatches} minibatches: |ratio - 1| {first['ppo/ratio_max_dev']:.1e}, largest |log p - log ref| {kl:.1e}, "
        f"sampled against forward {rollout['rollout/sampling_gap_max']:.1e}"
    )
    assert first["ppo/ratio_max_dev"] <= rounding and kl <= rounding
    assert first["ppo/ratio_mean"] == pytest.approx(1, abs=rounding)
    assert first["ppo/clip_fraction"] == 0.0 == first["ppo/value_clip_fraction"]
    assert first["ppo/approx_kl"] <= rounding**2 and abs(rollout["rollout/kl"]) <= 8 * rounding
    if precision == "32-true":
        assert rollout["rollout/sampling_gap_max"] <= 1e-5
    assert module.steps[-1]["ppo/ratio_max_dev"] > 0 or minibatches == 1


def test_the_first_policy_loss_is_minus_the_mean_advantage(fit_ppo):
    """With ratio 1 the loss is -mean(A) over the minibatch's tokens; whitened over the whole iteration, one minibatch of all has mean 0."""
    module = fit_ppo({"minibatches": 1})
    assert abs(module.steps[0]["ppo/policy_loss"]) < 1e-6
    experience = module.experiences[0]
    mask = experience.batch.response_mask
    assert float(experience.advantages[mask].mean()) == pytest.approx(0, abs=1e-6)
    assert float(experience.advantages[mask].std(unbiased=False)) == pytest.approx(1, abs=1e-5)
    half = (experience.returns - experience.values)[mask].square().mean() / 2  # the value loss before any update
    assert module.steps[0]["ppo/value_loss"] == pytest.approx(float(half), abs=1e-5)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_change_neither_losses_nor_weights(fit_ppo, reward_dir, accumulate):
    settings = {"reward_model": reward_dir, "ptx_coef": 0.5}
    data = {"ptx_data": [{"prompt": "the cat", "label": "sat on a mat " * (1 + i % 3)} for i in range(8)]}
    one, parts = fit_ppo(settings, data), fit_ppo(settings, data, accumulate_grad_batches=accumulate)
    assert len(one.steps) == len(parts.steps) == 8
    for a, b in zip(one.steps, parts.steps, strict=True):
        assert b == pytest.approx(a, abs=2e-5)
    torch.testing.assert_close(flat(parts.policy), flat(one.policy), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat(parts.value), flat(one.value), atol=1e-5, rtol=0)


CHANGES = {
    "reward_fn": {"reward_fn": lambda prompts, responses: [float(len(r)) for r in responses]},
    "reward_model": {"reward_model": None, "reward_fn": None},
    "value_init": {"value_init": None},
    "sampling": {"sampling": Sampling(max_new_tokens=8, temperature=0.8)},
    "batch_size": {"batch_size": 12},
    "responses_per_prompt": {"responses_per_prompt": 2},
    "ppo_epochs": {"ppo_epochs": 3},
    "minibatches": {"minibatches": 4},
    "kl_coef": {"kl_coef": 0.5},
    "kl_target": {"kl_target": 0.01},
    "kl_horizon": {"kl_target": 0.01, "kl_horizon": 100},
    "gamma": {"gamma": 0.9},
    "lam": {"lam": 0.5},
    "clip": {"clip": 0.001},
    "value_clip": {"value_clip": None},
    "value_coef": {"value_coef": 1.0},
    "value_lr": {"value_lr": 0.5},
    "center_values": {"center_values": False},
    "whiten_advantages": {"whiten_advantages": False},
    "whiten_rewards": {"whiten_rewards": True},
    "no_eos_score": {"no_eos_score": -7.0},
    "reward_baseline": {"reward_baseline": "reference"},
    "score_clip": {"score_clip": 1.0},
    "scale_scores": {"scale_scores": True},
    "dtype": {"dtype": "bfloat16"},
    "peft": {"peft": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])},
    "frozen_layers": {"frozen_layers": 1},
    "optimizer": {"optimizer": adamw},
    "scheduler": {"scheduler": Schedule("linear")},
}


BESIDE = {"kl_horizon": {"kl_target": 0.01}, "value_clip": {"value_coef": 1.0}}  # arguments that act only beside another
WEIGHTS: dict[str, list] = {}


@pytest.mark.parametrize("name", CHANGES)
def test_every_argument_changes_a_number(fit_ppo, reward_dir, name):
    """The weights after the run differ from those without the argument (the KL target and horizon act from the second iteration on)."""
    beside, settings = BESIDE.get(name, {}), dict(CHANGES[name])
    for argument in ("reward_model", "value_init"):
        if argument in settings:
            settings[argument] = reward_dir
    for key, arguments in ((str(beside), beside), (name, beside | settings)):
        if key not in WEIGHTS:
            module = fit_ppo(arguments)
            WEIGHTS[key] = [flat(module.policy), flat(module.value)]
    before, after = WEIGHTS[str(beside)], WEIGHTS[name]
    assert any(len(a) != len(b) or not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_tokens_per_forward_changes_the_passes_and_no_number(fit_ppo, monkeypatch):
    passes = []
    original = ScalarModel.forward
    monkeypatch.setattr(ScalarModel, "forward", lambda self, batch: passes.append(batch.num_responses) or original(self, batch))
    one = fit_ppo({"ppo_epochs": 1})
    count = len(passes)
    parts = fit_ppo({"ppo_epochs": 1, "tokens_per_forward": 40})
    assert len(passes) - count > count
    torch.testing.assert_close(flat(parts.policy), flat(one.policy), atol=1e-5, rtol=0)


def test_the_rouge_tokenizer_changes_validation(fit_ppo, sft_rows):
    found = [
        float(
            fit_ppo({"rouge_tokenizer": kind, "ppo_epochs": 1, "minibatches": 1}, {"val_data": sft_rows[:8]}).trainer.callback_metrics[
                "val/rouge1"
            ]
        )
        for kind in ("default", "characters")
    ]
    assert found[0] != found[1]


def test_ptx_pulls_towards_its_rows(fit_ppo):
    data = {"ptx_data": [{"prompt": "the cat", "label": "sat on a mat"}] * 8}
    losses = [step["ppo/ptx_loss"] for step in fit_ppo({"ptx_coef": 2.0, "kl_coef": 0.0}, data, max_steps=24).steps]
    assert losses[-1] < losses[0] / 2


def test_value_init(sft_dir, reward_dir, make_trainer, fit_ppo):
    """From the reward model by default (head included), from the SFT model with a zero head, or from a directory."""

    def start(**settings):
        module = PPO(sft_dir, **settings)
        module.trainer = make_trainer()
        module.configure_model()
        return module.value

    reward, sft = ScalarModel.load(reward_dir), AutoModelForCausalLM.from_pretrained(sft_dir)
    for value in (start(reward_model=reward_dir), start(reward_fn=len2, value_init=reward_dir)):
        torch.testing.assert_close(flat(value), flat(reward), atol=0, rtol=0)
    for value in (start(reward_fn=len2), start(reward_model=reward_dir, value_init="sft")):
        assert (value.head.weight == 0).all()
        torch.testing.assert_close(value.model.model.embed_tokens.weight, sft.model.embed_tokens.weight, atol=0, rtol=0)
    with pytest.raises(ValueError, match="value_init is 'reward', but there is no reward_model"):
        PPO(sft_dir, reward_fn=len2, value_init="reward")
    with pytest.raises(FileNotFoundError, match="no model directory at './nowhere'"):
        PPO(sft_dir, reward_fn=len2, value_init="./nowhere")


def len2(prompts, responses):
    return [float(len(r)) for r in responses]


def test_reward_baselines(fit_ppo, reward_dir, sft_rows):
    """The reward model's mean is 0.5: without the baseline its scores are 0.5 higher; against the reference, s(response) - s(reference)."""
    made = {kind: fit_ppo({"reward_model": reward_dir, "reward_baseline": kind}, max_steps=1) for kind in ("mean", "none", "reference")}
    mean, none, reference = (made[k].statistics[0]["rollout/score"] for k in ("mean", "none", "reference"))
    assert none - mean == pytest.approx(0.5, abs=1e-5)
    module, labels = made["mean"], {row["prompt"]: row["label"] for row in sft_rows}
    prompts = module.experiences[0].batch.column("prompt")
    own = module.scorer(prompts, [labels[p] for p in prompts], {})
    assert mean - reference == pytest.approx(float(own.mean()), abs=1e-5)


def test_an_exported_value_network_gives_the_values_it_was_trained_to(fit_ppo, reward_dir, tmp_path):
    for kind in ("mean", "none"):
        module = fit_ppo({"reward_model": reward_dir, "reward_baseline": kind}, max_steps=1)
        module.export_networks()["value"].save(tmp_path / kind)
        batch = module.experiences[0].batch
        with torch.no_grad():
            torch.testing.assert_close(ScalarModel.load(str(tmp_path / kind))(batch), module.value(batch), atol=1e-5, rtol=0)


def test_the_kl_controller_follows_ziegler(fit_ppo):
    """KL 0 in the first iteration: the error is clipped at -0.2, so 0.05 becomes 0.05 * (1 - 0.2 * 8 / 100) = 0.0492."""
    module = fit_ppo({"kl_target": 5.0, "kl_horizon": 100})
    assert module.statistics[0]["rollout/kl_coef"] == pytest.approx(0.05)
    assert module.statistics[1]["rollout/kl_coef"] == pytest.approx(0.0492)
    kl = module.statistics[1]["rollout/kl"]
    assert module.kl_coef == pytest.approx(0.0492 * (1 + max(-0.2, min(0.2, kl / 5.0 - 1)) * 8 / 100))
    assert fit_ppo().kl_coef == 0.05


def test_several_responses_per_prompt(fit_ppo):
    module = fit_ppo({"responses_per_prompt": 4})
    batch = module.experiences[0].batch
    assert (batch.num_prompts, batch.num_responses, batch.prompt_of.tolist()) == (2, 8, [0] * 4 + [1] * 4)
    assert len({tuple(r) for r in batch.response_ids.tolist()}) > 4
    module.position = 0
    for position in (0, 1):  # the responses of a prompt stay in one minibatch
        assert module.micro_batch(position)[0].batch.num_prompts == 1


def test_iterations_see_new_prompts_and_the_new_policy(fit_ppo):
    module = fit_ppo(max_steps=12)
    assert len(module.experiences) == 3
    seen = [set(e.batch.columns["prompt"]) for e in module.experiences]
    assert not seen[0] & seen[1] and seen[0] | seen[1] == seen[2] | seen[1] | seen[0] and len(seen[0] | seen[1]) == 16
    assert [s["rollout/episodes"] for s in module.statistics] == [8, 16, 24]
    assert abs(module.statistics[1]["rollout/kl"]) > 1e-4
    policy, second = CausalPolicy.load(module.model), module.experiences[1]
    with torch.no_grad():
        reference, _ = policy(second.batch, ban=True)
    torch.testing.assert_close(second.ref_logprobs, reference, atol=1e-5, rtol=0)
    torch.testing.assert_close(module.steps[4]["ppo/ratio_mean"], 1.0, atol=1e-5, rtol=0)  # the second iteration begins on policy


def test_lora(fit_ppo, sft_dir, tmp_path):
    """The reference is the policy with its adapter off; the export holds adapter and weights in one."""
    module = fit_ppo({"peft": peft.LoraConfig(r=4, target_modules="all-linear"), "optimizer": adamw})
    assert module.reference is None
    trained = [n for n, p in module.named_parameters() if p.requires_grad]
    assert all("lora_" in n or n == "value.model.score.weight" for n in trained) and "value.model.score.weight" in trained
    plain, second = CausalPolicy.load(sft_dir), module.experiences[1]
    with torch.no_grad():
        torch.testing.assert_close(second.ref_logprobs, plain(second.batch, ban=True)[0], atol=1e-5, rtol=0)
    assert (second.logprobs - second.ref_logprobs).abs().max() > 1e-3
    for name, network in module.export_networks().items():
        network.save(tmp_path / name)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")(input_ids=ids).logits
        torch.testing.assert_close(merged, module.policy.lm(input_ids=ids).logits, atol=1e-5, rtol=0)
        value = ScalarModel.load(str(tmp_path / "value"))
        torch.testing.assert_close(value(second.batch), module.value(second.batch), atol=1e-5, rtol=0)


def test_ppo_raises_the_reward(fit_ppo, sft_rows):
    module = fit_ppo({"optimizer": adamw, "batch_size": 32, "kl_coef": 0.01, "reward_fn": vowels}, {"val_data": sft_rows[:8]}, max_steps=60)
    scores = [s["rollout/score"] for s in module.statistics]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 1.0


def vowels(prompts, responses):
    return [10 * sum(c in "ae" for c in r) / (len(r) + 1) for r in responses]


@pytest.mark.parametrize(
    "settings, said",
    [
        ({}, "give exactly one of reward_model and reward_fn"),
        ({"reward_fn": vowels, "reward_model": "x"}, "not both"),
        ({"reward_model": "./nowhere"}, "no model directory at './nowhere'"),
        ({"reward_fn": vowels, "batch_size": 10, "responses_per_prompt": 4}, "multiple of responses_per_prompt 4"),
        ({"reward_fn": vowels, "minibatches": 0}, "minibatches must be at least 1, got 0"),
        ({"reward_fn": vowels, "sampling": Sampling(temperature=0.0)}, "temperature > 0"),
        ({"reward_fn": 3}, "not something to call"),
        ({"reward_fn": vowels, "gamma": 1.5}, "gamma must be between 0 and 1, got 1.5"),
        ({"reward_fn": vowels, "score_clip": -1.0}, "score_clip must be above 0, got -1.0; null switches it off"),
        ({"reward_fn": vowels, "kl_target": 1.0, "kl_horizon": 100}, "kl_horizon 100 must be over a fifth of batch_size 512"),
        ({"reward_fn": lambda texts: texts}, "called as reward_fn"),
    ],
)
def test_contradictions_are_refused_before_anything_loads(sft_dir, settings, said):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=said):
        PPO(sft_dir, **settings)


def test_trainer_settings_that_cannot_work_are_refused(fit_ppo, make_trainer, sft_dir):
    with pytest.raises(ValueError, match="limit_train_batches would cut iterations short"):
        fit_ppo(limit_train_batches=2)
    with pytest.raises(
        ValueError, match="8 prompts per iteration cannot be split into minibatches 2 x accumulate_grad_batches 8 x 1 ranks"
    ):
        fit_ppo(accumulate_grad_batches=8)
    with pytest.raises(ValueError, match="give both or neither"):
        fit_ppo({"ptx_coef": 1.0})
    with pytest.raises(ValueError, match="context"):
        fit_ppo(data={"max_prompt_tokens": 90}, rows=[{"prompt": "cat " * 89}] * 8)
    with pytest.raises(TypeError, match="PromptDataModule"):
        from lit_rlhf import SFTDataModule

        make_trainer(max_steps=1).fit(
            PPO(sft_dir, reward_fn=vowels), datamodule=SFTDataModule([{"prompt": "a", "label": "b"}] * 4, batch_size=2)
        )


def test_data_is_optional(fit_ppo):
    module = fit_ppo({"sampling": Sampling(6, 1.0)}, rows=None, data={"limit_val_rows": 4})
    assert set(module.experiences[0].batch.columns["prompt"]) == {""}
    assert len({row["response"] for row in module.samples}) > 1  # equal prompts, other noise


def test_short_prompts_need_no_setting(make_trainer, sft_dir, sft_rows):
    """The default max_prompt_tokens is longer than this model's context, the prompts are not."""
    module = PPO(sft_dir, reward_fn=vowels, batch_size=4, sampling=Sampling(4))
    make_trainer(max_steps=1).fit(module, datamodule=PromptDataModule(sft_rows))
    assert module.iteration == 0 and module.position == 1
