"""train(): each algorithm in one call, with prompts or without, and with both forms of reward function."""

import pytest
from transformers import pipeline

from lit_rlhf import DPO, ILQL, NLPO, RFT, RLOO, Quark, Sampling, train
from lit_rlhf.api import as_rows, with_samples
from lit_rlhf.scoring import FunctionScorer

SHORT = {"sampling": Sampling(8, 1.0)}
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


def test_rloo(sft_dir, make_trainer):
    settings = {"batch_size": 4, "responses_per_prompt": 2, "sampling": Sampling(5, 1.0)}
    module = train(
        sft_dir,
        lambda samples: [float(len(s)) for s in samples],
        ["a", "b"],
        method="rloo",
        settings=settings,
        trainer=make_trainer(max_steps=2),
    )
    assert isinstance(module, RLOO) and module.iteration == 1 and len(set(module.experience.batch.columns["prompt"])) == 2


def test_dpo(sft_dir, pair_rows, tmp_path, monkeypatch):
    """By default one pass over the rows; two where asked."""
    monkeypatch.chdir(tmp_path)
    module = train(sft_dir, method="dpo", dataset=pair_rows, eval_dataset=pair_rows[:4], settings={"beta": 0.3})
    assert isinstance(module, DPO) and module.setting["beta"] == 0.3 and module.trainer.global_step == 1
    assert 0 <= float(module.trainer.callback_metrics["val/accuracy"]) <= 1
    assert train(sft_dir, method="dpo", dataset=pair_rows, iterations=2).trainer.global_step == 2


@pytest.mark.parametrize(
    ("method", "cls", "settings", "steps"),
    [
        ("rft", RFT, {"n": 4, "num_prompts": 8, "minibatches": 2}, 2),
        ("quark", Quark, {"num_prompts": 4, "minibatches": 3, "minibatch_size": 2}, 3),
        ("nlpo", NLPO, {"batch_size": 4, "ppo_epochs": 2, "min_tokens": 5}, 2),
    ],
)
def test_other_methods_that_sample(sft_dir, tmp_path, monkeypatch, method, cls, settings, steps):
    """One iteration of the default trainer; the reward sees trlX's samples, prompt + response."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def reward_fn(samples):
        seen.extend(samples)
        return [float(len(s)) for s in samples]

    module = train(
        sft_dir, reward_fn, ["the cat", "a dog"], method=method, settings=settings | {"sampling": Sampling(8, 1.0)}, iterations=1
    )
    assert isinstance(module, cls) and module.trainer.global_step == steps and module.iteration == 0
    assert {s[:5] for s in seen} == {"the c", "a dog"} and len(seen) == {"rft": 32, "quark": 4, "nlpo": 4}[method]
    module.policy.save(tmp_path / "hf")
    assert (tmp_path / "hf" / "config.json").exists()


def test_ilql(sft_dir, tmp_path, monkeypatch):
    """trlX's second example: texts and rewards; the second text's standardised reward is 1/sqrt 2 of the other sign."""
    monkeypatch.chdir(tmp_path)
    pairs = ([("the", " cat"), ("the", " dog")], [1.0, 100.0])
    settings = {"sampling": Sampling(5, 1.0), "tau": 0.6}
    module = train(
        sft_dir, lambda samples: [3.0] * len(samples), method="ilql", dataset=(["dolphins", "geese"], [1.0, 100.0]), eval_dataset=pairs,
        settings=settings, iterations=2,
    )  # fmt: skip
    assert isinstance(module, ILQL) and module.setting["tau"] == 0.6 and module.trainer.global_step == 2
    assert module.moments == pytest.approx((50.5, 99 / 2**0.5)) and float(module.trainer.callback_metrics["val/score"]) == 3.0
    assert [row["prompt"] for row in module.samples] == ["the", "the"]
    rows = [{"prompt": "the", "response": " cat", "reward": 2}]
    assert train(sft_dir, method="ilql", dataset=rows, settings=settings).moments == (2.0, 1.0)


def test_a_reward_model_in_place_of_a_function(sft_dir, reward_dir, make_trainer):
    module = train(sft_dir, None, ["a"], settings=SETTINGS | {"reward_model": reward_dir}, trainer=make_trainer(max_steps=1))
    assert module.reward_model == reward_dir


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "sac"}, "method 'sac' is not known: give one of ppo, rloo, nlpo, rft, quark, dpo, ilql"),
        ({"method": "dpo"}, "method 'dpo' learns from dataset: rows with prompt, chosen and rejected, and none is given"),
        ({"method": "dpo", "dataset": [], "prompts": ["a"], "reward_fn": len}, "takes no prompts and no reward_fn: it learns from dataset"),
        ({"method": "rloo", "dataset": []}, "method 'rloo' takes no dataset: it learns from reward_fn"),
        ({"eval_dataset": []}, "method 'ppo' takes no eval_dataset"),
        ({"method": "ilql"}, "method 'ilql' learns from dataset: .texts, rewards., or rows with prompt, response and reward, and none is"),
        ({"method": "ilql", "dataset": ([], []), "prompts": ["a"]}, "method 'ilql' takes no prompts"),
        ({"method": "ilql", "dataset": (["a"], [])}, "1 samples and 0 rewards"),
        ({"method": "quark", "dataset": []}, "method 'quark' takes no dataset"),
        ({"method": "rloo"}, "give exactly one of reward_model and reward_fn"),
    ],
)
def test_arguments_of_another_method_are_refused(sft_dir, arguments, said):
    with pytest.raises(ValueError, match=said):
        train(sft_dir, **arguments)
