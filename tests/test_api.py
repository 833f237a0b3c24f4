"""train(): PPO in one call, with prompts or without, and with both forms of reward function."""

import pytest
from transformers import pipeline

from lit_rlhf import Sampling, train
from lit_rlhf.api import as_rows, with_samples
from lit_rlhf.scoring import FunctionScorer

SETTINGS = {"batch_size": 4, "ppo_epochs": 1, "sampling": Sampling(5, 1.0)}


def test_train_writes_a_policy(sft_dir, make_trainer, tmp_path):
    seen = []

    def reward_fn(samples):
        seen.extend(samples)
        return [float(len(s)) for s in samples]

    module = train(sft_dir, reward_fn, ["the cat", "a dog"], eval_prompts=["rain"], settings=SETTINGS, trainer=make_trainer(max_steps=2))
    assert len(seen) == 2 * 4 + 2 and all(s.startswith(("the cat", "a dog", "rain")) for s in seen)  # two rollouts and two validations
    module.policy.save(tmp_path / "hf")
    assert (tmp_path / "hf" / "config.json").exists()


def test_the_default_trainer_and_no_prompts(sft_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = train(sft_dir, lambda prompts, responses: [float(p == "") for p in prompts], iterations=2, settings=SETTINGS)
    assert module.iteration == 1 and module.trainer.global_step == 2
    assert float(module.trainer.callback_metrics["rollout/score"]) == 1.0


def test_forms_of_reward_functions():
    prompts, responses = ["a ", "b "], ["x", "y"]

    def call(fn, **columns):
        return FunctionScorer(with_samples(fn))(prompts, responses, columns).tolist()

    assert call(lambda samples: [s == "a x" for s in samples]) == [1, 0]
    assert call(lambda texts: [s == "a x" for s in texts]) == [1, 0]  # one argument, whatever its name
    assert call(lambda samples, prompts, outputs: [s == p + o for s, p, o in zip(samples, prompts, outputs, strict=True)]) == [1, 1]
    assert call(lambda samples, **kwargs: [float(len(kwargs["outputs"]))] * 2) == [2, 2]
    assert call(lambda prompts, responses: [r == "y" for r in responses]) == [0, 1]
    assert call(lambda prompts, responses, label: label, label=[3, 4]) == [3, 4]
    assert call(lambda samples, label: label, label=[3, 4]) == [3, 4]  # a column beside the samples


def test_a_pipeline_is_a_reward_function(sft_dir, reward_dir, make_trainer):
    module = train(
        sft_dir, pipeline("text-classification", model=reward_dir), ["the cat"] * 4, settings=SETTINGS, trainer=make_trainer(max_steps=1)
    )
    assert module.position == 1


def test_prompts():
    assert as_rows(["a", "b"]) == [{"prompt": "a"}, {"prompt": "b"}]
    assert as_rows([{"prompt": "a"}]) == [{"prompt": "a"}]
    assert as_rows("file.jsonl") == "file.jsonl" and as_rows(None) is None
    with pytest.raises(TypeError, match="reward_fn"):
        FunctionScorer(with_samples(lambda: []))
