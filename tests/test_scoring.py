"""Scores from functions, pipelines and reward models, and the error for each thing that a reward can get wrong."""

import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from lit_rlhf.networks import ScalarModel
from lit_rlhf.scoring import FunctionScorer, ModelScorer, PipelineReward, text_batch

PROMPTS, RESPONSES = ["the cat", "the cat", "my dog ran"], [" sat", " ran far away", ""]
COLUMNS = {"label": ["a", "a", "b"], "n": [1, 1, 2]}


def score(fn) -> list[float]:
    return FunctionScorer(fn)(PROMPTS, RESPONSES, COLUMNS).tolist()


def test_a_function_gets_texts_and_the_columns_it_names():
    def named(prompts, responses, label, missing="m"):
        assert (prompts, responses, label, missing) == (PROMPTS, RESPONSES, ["a", "a", "b"], "m")
        return [1, 2.5, True]

    def every(prompts, responses, **columns):
        assert columns == COLUMNS
        return torch.tensor([1, 2, 3])

    def only(prompts, responses, *, n):
        return n

    assert score(named) == [1.0, 2.5, 1.0]
    assert score(every) == [1.0, 2.0, 3.0]
    assert score(only) == [1.0, 1.0, 2.0]


def raises(prompts, responses):
    raise KeyError("lexicon")


WRONG = {
    "raises": (raises, RuntimeError, r"reward function raises raised KeyError: 'lexicon' \(called with prompt 0: 'the cat'\)"),
    "count": (lambda p, r: [1.0, 2.0], ValueError, r"returned 2 scores for 3 responses"),
    "nan": (lambda p, r: [1.0, 2.0, math.nan], ValueError, r"returned nan for response 2 \(prompt 2: 'my dog ran'\)"),
    "inf": (lambda p, r: [1.0, -math.inf, 2.0], ValueError, r"returned -inf for response 1 \(prompt 1: 'the cat'\)"),
    "none among numbers": (lambda p, r: [1.0, None, 2.0], TypeError, r"returned None for response 1, not a number \(prompt 1: 'the cat'\)"),
    "text among numbers": (lambda p, r: [1.0, 2.0, "good"], TypeError, r"returned 'good' for response 2.*prompt 2"),
    "none": (lambda p, r: None, TypeError, r"returned None; it must return one number per response, here 3"),
    "one number": (lambda p, r: 1.0, TypeError, r"returned 1.0; it must return one number per response"),
    "one text": (lambda p, r: "abc", TypeError, r"returned 'abc'"),
    "dict": (lambda p, r: {"a": 1, "b": 2, "c": 3}, TypeError, "returned .*one number per response"),
    "missing column": (lambda p, r, rating: [0] * 3, RuntimeError, r"asks for the column 'rating'.*has: label, n.*prompt 0: 'the cat'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_reward_gets_wrong_names_the_prompt(name):
    fn, error, said = WRONG[name]
    with pytest.raises(error, match=said):
        score(fn)


@pytest.mark.parametrize("fn", [lambda: [], lambda texts: [], 5, None])
def test_what_cannot_be_called_is_refused_at_once(fn):
    with pytest.raises(TypeError, match="reward_fn"):
        FunctionScorer(fn)


def test_the_reward_models_score_is_that_of_plain_transformers(reward_dir):
    """Prompt + response + EOS, minus the mean of 0.5, whatever else is in the batch and however it is cut into passes."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(reward_dir), AutoTokenizer.from_pretrained(reward_dir)
    wanted = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = tokenizer(prompt)["input_ids"] + tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            wanted.append(float(model(input_ids=torch.tensor([ids])).logits) - 0.5)
    for budget in (16384, 1):
        scorer = ModelScorer(ScalarModel.load(reward_dir), tokens_per_forward=budget)
        assert scorer(PROMPTS, RESPONSES, {}).tolist() == pytest.approx(wanted, abs=1e-5)
        assert scorer(PROMPTS[::-1], RESPONSES[::-1], {}).tolist() == pytest.approx(wanted[::-1], abs=1e-5)
    assert not any(p.requires_grad for p in scorer.parameters())


def test_equal_prompts_are_stored_once(tokenizer):
    batch = text_batch(tokenizer, PROMPTS, RESPONSES)
    assert (batch.num_prompts, batch.prompt_of.tolist()) == (2, [0, 0, 1])
    assert batch.response_ids[2][batch.response_mask[2]].tolist() == [tokenizer.eos_token_id]  # an empty response is its EOS


def test_pipelines(reward_dir, sft_dir, tmp_path, tokenizer):
    """One label: its raw score. Two labels: the probability of the one that is asked for."""
    plain = pipeline("text-classification", model=reward_dir)
    raw = [out["score"] for out in plain(RESPONSES[:2], function_to_apply="none")]
    for fn in (plain, PipelineReward(reward_dir)):
        assert FunctionScorer(fn)(PROMPTS[:2], RESPONSES[:2], {}).tolist() == pytest.approx(raw, abs=1e-5)
    both = [out["score"] for out in plain([p + r for p, r in zip(PROMPTS[:2], RESPONSES, strict=False)], function_to_apply="none")]
    assert PipelineReward(plain, with_prompt=True)(PROMPTS[:2], RESPONSES[:2]) == pytest.approx(both, abs=1e-5)
    two = AutoModelForSequenceClassification.from_pretrained(sft_dir, num_labels=2, id2label={0: "bad", 1: "good"})
    two.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    good, bad = (PipelineReward(str(tmp_path), label=x)(PROMPTS[:2], RESPONSES[:2]) for x in ("good", "bad"))
    assert [g + b for g, b in zip(good, bad, strict=True)] == pytest.approx([1, 1], abs=1e-6)
    with pytest.raises(ValueError, match="has labels .'bad', 'good'.; say whose"):
        PipelineReward(str(tmp_path))(PROMPTS[:2], RESPONSES[:2])
    with pytest.raises(ValueError, match="no label 'great'"):
        PipelineReward(str(tmp_path), label="great")(PROMPTS[:2], RESPONSES[:2])


def test_a_reward_function_computes_in_float32_whatever_the_trainer_makes_tensors_of():
    """1 + 1/256 is not a bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        scorer = FunctionScorer(lambda prompts, responses: torch.full((len(responses),), 1 + 1 / 256))
        assert scorer(["p"], ["r"], {}).tolist() == [1 + 1 / 256] and torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
