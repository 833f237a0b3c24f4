"""Composed rewards: each is a reward_fn that PPO takes, from Python and from YAML, and its parts are logged."""

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForSequenceClassification

from lit_rlhf import PPO, RFT, PromptDataModule, Sampling
from lit_rlhf.callbacks import RewardParts
from lit_rlhf.cli import build
from lit_rlhf.rewards import RewardEnsemble, Rule, WeightedRewards
from lit_rlhf.scorers import load_scorer

PROMPTS, RESPONSES = ["the cat", "my dog ran"], [" sat", " ran far away"]


def length(prompts, responses):
    return [len(r) for r in responses]


def overlap(prompts, responses, reference):
    return [float(a.strip() == b) for a, b in zip(responses, reference, strict=True)]


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory, reward_dir, tokenizer) -> str:
    """A second reward model: the first with another head."""
    path = tmp_path_factory.mktemp("reward2")
    model = AutoModelForSequenceClassification.from_pretrained(reward_dir)
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(5)))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_an_ensemble_is_its_models_by_hand(reward_dir, other_dir):
    one, two = (load_scorer(d)(PROMPTS, RESPONSES, {}) for d in (reward_dir, other_dir))
    heard = []
    ensemble = RewardEnsemble([reward_dir, other_dir], spread_coef=2.0)
    ensemble.listeners.append(heard.append)
    wanted = (one + two) / 2 - 2.0 * (one - two).abs() / 2  # the standard deviation of two numbers
    assert ensemble(PROMPTS, RESPONSES) == pytest.approx(wanted.tolist(), abs=1e-5)
    assert set(heard[0]) == {"mean", "spread", "model0", "model1"} and heard[0]["model1"].tolist() == pytest.approx(two.tolist(), abs=1e-5)


def test_what_the_models_dispute_is_labelled_next(reward_dir, other_dir):
    ensemble = RewardEnsemble([reward_dir, other_dir])
    rows = [
        {"prompt": p, "responses": [a, b]} for p in PROMPTS for a, b in ((" sat", " ran"), (" far away", " ate my hat"), (" so", " so"))
    ]
    found = ensemble.disputed(rows, 3)
    one, two = (
        {(row["prompt"], r): float(load_scorer(d)([row["prompt"]], [r], {})) for row in rows for r in row["responses"]}
        for d in (reward_dir, other_dir)
    )

    def dispute(row):
        a, b = ((row["prompt"], r) for r in row["responses"])
        p, q = (1 / (1 + pow(2.718281828459045, m[b] - m[a])) for m in (one, two))
        return abs(p - q) / 2

    wanted = sorted(rows, key=dispute, reverse=True)[:3]
    assert [(row["prompt"], row["responses"]) for row in found] == [(row["prompt"], row["responses"]) for row in wanted]
    assert [row["spread"] for row in found] == pytest.approx([dispute(row) for row in wanted], abs=1e-5) and found[-1]["spread"] > 0
    with pytest.raises(ValueError, match="row 1 has 1 responses"):
        ensemble.disputed([rows[0], {"prompt": "a", "responses": ["b"]}], 1)


def test_a_weighted_sum(reward_dir):
    reward = WeightedRewards({"model": reward_dir, "length": length, "overlap": overlap}, {"model": 2.0, "length": -0.1})
    model = load_scorer(reward_dir)(PROMPTS, RESPONSES, {}).tolist()
    found = reward(PROMPTS, RESPONSES, reference=["sat", "slept"], unused=[1, 2])
    assert found == pytest.approx([2 * model[0] - 0.4 + 1, 2 * model[1] - 1.3], abs=1e-5)


def test_rules():
    assert Rule("(?i)damn")([], ["Damn it", "fine"]) == [1.0, 0.0]
    assert Rule(r"[.?]\s*$", required=True)([], ["ends.", "does not"]) == [0.0, 1.0]
    with pytest.raises(ValueError, match="no regular expression"):
        Rule("(")


def test_ppo_learns_from_them_and_logs_the_parts(reward_dir, other_dir, sft_dir, sft_rows, make_trainer, tmp_path):
    ensemble = RewardEnsemble([reward_dir, other_dir], spread_coef=0.5)
    reward = WeightedRewards({"ensemble": ensemble, "spaces": Rule(" ")}, {"spaces": -3.0})
    ppo = PPO(sft_dir, reward_fn=reward, sampling=Sampling(6, 1.0), batch_size=8, ppo_epochs=1)
    parts = RewardParts()
    trainer = make_trainer(max_epochs=2, callbacks=[parts], logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    trainer.fit(ppo, PromptDataModule(sft_rows, val_data=sft_rows[:4]))
    assert set(parts.last) == {"rollout/part/ensemble", "rollout/part/spaces"} and 0 <= parts.last["rollout/part/spaces"] <= 1
    last = float(ppo.journal.entries[0]["rollout/score"])
    assert last == pytest.approx(parts.last["rollout/part/ensemble"] - 3 * parts.last["rollout/part/spaces"], abs=1e-4)
    text = (tmp_path / "metrics.csv").read_text()
    assert "rollout/part/ensemble" in text and not reward.listeners
    with pytest.raises(ValueError, match="RewardParts: the reward has no parts"):
        make_trainer(max_epochs=1, callbacks=[RewardParts()]).fit(PPO(sft_dir, reward_fn=length, batch_size=8), PromptDataModule(sft_rows))


def test_the_parts_are_of_all_responses(sft_dir, sft_rows, make_trainer):
    """RFT scores 320 responses in two calls, of 256 and 64."""
    reward = WeightedRewards({"length": length, "t": Rule("t")}, {"t": -3.0})
    rft, parts = RFT(sft_dir, reward_fn=reward, n=20, num_prompts=16, minibatches=1, sampling=Sampling(6, 1.0)), RewardParts()
    make_trainer(max_steps=1, callbacks=[parts]).fit(rft, PromptDataModule(sft_rows))
    mean = parts.last["rollout/part/length"] - 3 * parts.last["rollout/part/t"]
    assert mean == pytest.approx(rft.journal.entries[0]["rollout/mean_score"], abs=1e-4) and parts.last["rollout/part/t"] > 0


def test_from_yaml(reward_dir, other_dir, sft_dir, tmp_path):
    """A configured reward inside of another one."""
    (tmp_path / "reward.yaml").write_text(f"""
model:
  class_path: PPO
  init_args:
    model: {sft_dir}
    reward_fn:
      class_path: lit_rlhf.rewards.WeightedRewards
      init_args:
        parts:
          quality:
            class_path: lit_rlhf.rewards.RewardEnsemble
            init_args:
              models: [{reward_dir}, {other_dir}]
              spread_coef: 0.5
          model: {reward_dir}
          gold: lit_rlhf.quickstart.world.gold
        weights:
          gold: -1.5
data:
  class_path: PromptDataModule
  init_args:
    data: null
""")
    reward = build(["fit", f"--config={tmp_path / 'reward.yaml'}", "--trainer.accelerator=cpu", "--trainer.logger=false"]).model.reward_fn
    assert isinstance(reward, WeightedRewards) and reward.parts["quality"].spread_coef == 0.5 and reward.weights == {"gold": -1.5}
    assert len(reward(PROMPTS, RESPONSES)) == 2


def test_refuses(reward_dir, tmp_path):
    for models, said in (
        ([reward_dir], "two or more"),
        (reward_dir, "two or more"),
        ([reward_dir, str(tmp_path / "none")], "no model directory"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            RewardEnsemble(models)
    with pytest.raises(ValueError, match="spread_coef must be 0 or more"):
        RewardEnsemble([reward_dir, reward_dir], spread_coef=-1.0)
    with pytest.raises(ValueError, match="weights has speed, which is no part"):
        WeightedRewards({"length": length}, {"speed": 1.0})
    with pytest.raises(ValueError, match="parts is empty"):
        WeightedRewards({})
    with pytest.raises(TypeError, match="reward_fn"):
        WeightedRewards({"length": lambda: 0})
