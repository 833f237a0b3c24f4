"""Best-of-n as a function and as what `predict` runs: the best by the reward, and the same numbers by both ways."""

import math

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lit_rlhf
from lit_rlhf import BestOfN, PromptDataModule, Sampling, best_of_n
from lit_rlhf.best_of import candidates
from lit_rlhf.cli import main
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.scorers import load_scorer
from lit_rlhf.scoring import text_batch

SAMPLING = Sampling(max_new_tokens=6, temperature=1.0)
PROMPTS = ["the cat", "my dog ran", "the rain"]


def vowels(prompts, responses):
    return [float(sum(c in "aeiou" for c in r)) for r in responses]


def test_keeps_the_highest_of_all(sft_dir):
    policy = CausalPolicy.load(sft_dir).eval()
    batch = text_batch(policy.tokenizer, PROMPTS, PROMPTS).select_prompts([0, 1, 2])
    found = candidates(policy, load_scorer(vowels), batch, SAMPLING, 5, (0,))
    assert found.scores.shape == found.lengths.shape == found.finished.shape == (3, 5)
    for m in range(3):
        assert found.scores[m].tolist() == vowels([], found.texts[m])
        assert len(set(found.texts[m])) > 1  # they are not one sample five times
        assert found.scores[m, found.best[m]] == max(vowels([], found.texts[m]))
    assert found.lengths.max() <= 6 and not found.finished[found.lengths == 6].all()


def test_the_function(sft_dir):
    rows = best_of_n(sft_dir, vowels, PROMPTS, n=4, sampling=SAMPLING, seed=3)
    assert [row["prompt"] for row in rows] == PROMPTS
    assert all(row["score"] == vowels([], [row["response"]])[0] >= row["mean_score"] for row in rows)
    assert {row["kl_bound"] for row in rows} == {math.log(4) - 0.75}
    assert rows == best_of_n(sft_dir, vowels, PROMPTS, n=4, sampling=SAMPLING, seed=3)
    assert rows != best_of_n(sft_dir, vowels, PROMPTS, n=4, sampling=SAMPLING, seed=4)
    more = best_of_n(sft_dir, vowels, PROMPTS * 4, n=64, sampling=SAMPLING)
    assert sum(row["score"] for row in more) / 12 > sum(row["score"] for row in rows) / 3
    with pytest.raises(ValueError, match="n must be at least 1"):
        best_of_n(sft_dir, vowels, PROMPTS, n=0)


def test_predict_and_test(sft_dir, reward_dir, make_trainer):
    data = PromptDataModule([{"prompt": p, "label": "so"} for p in PROMPTS], test_data=[{"prompt": p, "label": "so"} for p in PROMPTS])
    trainer = make_trainer()
    (rows,) = trainer.predict(BestOfN(sft_dir, reward_model=reward_dir, n=3, sampling=SAMPLING), datamodule=data)
    assert [(row["prompt"], row["reference"], row["n"]) for row in rows] == [(p, "so", 3) for p in PROMPTS]
    scores = load_scorer(reward_dir)(PROMPTS, [row["response"] for row in rows], {})
    assert [row["score"] for row in rows] == pytest.approx(scores.tolist(), abs=1e-5)
    (logged,) = trainer.test(BestOfN(sft_dir, reward_fn=vowels, n=3, sampling=SAMPLING), datamodule=data, verbose=False)
    assert set(logged) == {"test/score", "test/mean_score", "test/length", "test/kl_bound"}
    assert logged["test/score"] > logged["test/mean_score"] and logged["test/kl_bound"] == pytest.approx(math.log(3) - 2 / 3)


def test_the_command(sft_dir, reward_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n')
    more = [f"--model.model={sft_dir}", f"--model.reward_model={reward_dir}", "--model.n=2", "--model.sampling.max_new_tokens=5"]
    data = ["--data=PromptDataModule", "--data.data=prompts.jsonl", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    assert main(["predict", "--model=BestOfN", *more, *data]) == 0
    assert '"kl_bound"' in (tmp_path / "predictions.jsonl").read_text()


def test_refuses(sft_dir, reward_dir, make_trainer):
    for wrong in ({}, {"reward_model": reward_dir, "reward_fn": vowels}):
        with pytest.raises(ValueError, match="exactly one of reward_model and reward_fn"):
            BestOfN(sft_dir, **wrong)
    for wrong in ({"n": 0}, {"sampling": Sampling(temperature=0.0)}):
        with pytest.raises(ValueError, match="n of at least 1 and a temperature above 0"):
            BestOfN(sft_dir, reward_fn=vowels, **wrong)
    with pytest.raises((ValueError, MisconfigurationException)):
        make_trainer().fit(BestOfN(sft_dir, reward_fn=vowels), PromptDataModule([{"prompt": "a"}]))


def test_is_at_hand():
    assert lit_rlhf.best_of_n is best_of_n and callable(lit_rlhf.best_of_n) and lit_rlhf.BestOfN is BestOfN
