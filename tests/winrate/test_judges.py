"""What each kind of judge says, and how two orders become one verdict."""

import math

import pytest
import torch
from families import true_logprobs

from lit_rlhf.networks import CausalPolicy
from lit_rlhf.scorers import load_scorer
from lit_rlhf.winrate.judges import LMJudge, combined, fill, load_judge
from lit_rlhf.winrate.pairs import Pair

PAIRS = [
    Pair("the cat", " sat", " ran far away", {"reference": "x"}, 0),
    Pair("my dog", " ate it", " so I", {"reference": "y"}, 1),
    Pair("my hat", " same", " same", {"reference": "z"}, 2),
]


@pytest.mark.parametrize(
    ("one", "other", "preferred"),
    [(0.9, 0.6, 1.0), (0.4, 0.1, 0.0), (0.9, 0.3, 0.5), (0.5, 0.9, 0.5), (None, 0.9, None), (0.9, None, None), (None, None, None)],
)
def test_two_orders(one, other, preferred):
    assert combined(one, other).preferred == preferred and combined(one, other).orders == (one, other)


def test_a_reward_function_with_columns():
    def longer(prompts, responses, reference):
        assert reference == ["x", "y", "z"]
        return [len(r) for r in responses]

    verdicts = load_judge(longer)(PAIRS)
    assert [(v.preferred, v.margin) for v in verdicts] == [(0.0, -9.0), (1.0, 2.0), (0.5, 0.0)]


def test_a_reward_model(reward_dir):
    scores = [load_scorer(reward_dir)([p.prompt for p in PAIRS], [getattr(p, s) for p in PAIRS], {}) for s in ("first", "second")]
    verdicts = load_judge(reward_dir)(PAIRS)
    assert [v.margin for v in verdicts] == pytest.approx((scores[0] - scores[1]).tolist(), abs=1e-5)
    assert [v.preferred for v in verdicts] == [float(m > 0) if m else 0.5 for m in (scores[0] - scores[1]).tolist()]


def test_a_function_is_asked_in_both_orders():
    asked = []

    def judge(prompts, first, second):
        asked.append((first, second))
        return [None, 0.8, 0.7]  # the third: always what stands first

    verdicts = load_judge(judge)(PAIRS)
    assert asked[1] == asked[0][::-1]
    assert [v.preferred for v in verdicts] == [None, 0.5, 0.5] and verdicts[1].orders == (0.8, pytest.approx(0.2))
    decided = load_judge(lambda prompts, first, second: [float(len(a) > len(b)) for a, b in zip(first, second, strict=True)])(PAIRS)
    assert [v.preferred for v in decided] == [0.0, 1.0, 0.0 if decided[2].preferred == 0.0 else 0.5]


@pytest.mark.parametrize(("answers", "said"), [([1.0], "returned 1 answers for 3 pairs"), ([0.5, 2.0, 0.5], "returned 2 for pair 1")])
def test_a_function_that_answers_wrongly(answers, said):
    with pytest.raises(ValueError, match=said):
        load_judge(lambda prompts, first, second: answers)(PAIRS)


@pytest.fixture
def judge(sft_dir) -> LMJudge:
    return LMJudge(CausalPolicy.load(sft_dir).eval(), "{prompt}:{first}|{second} so", ("cat", "dog"), least_mass=0.0)


def test_a_language_models_log_probs(judge):
    """Against the model's own logits, one question at a time."""
    lm, tokenizer = judge.policy.lm, judge.policy.tokenizer
    for pair, found in zip(PAIRS, judge.ask([(p.prompt, p.first, p.second) for p in PAIRS]), strict=True):
        question = tokenizer(f"{pair.prompt}:{pair.first.strip()}|{pair.second.strip()} so")["input_ids"]
        with torch.no_grad():
            cat, dog = (math.exp(float(true_logprobs(lm, question, tokenizer(answer)["input_ids"]).sum())) for answer in (" cat", " dog"))
        assert found == pytest.approx(cat / (cat + dog), abs=1e-5)


def test_a_language_model_that_would_say_something_else_is_not_guessed(judge):
    judge.least_mass = 0.5  # an untrained model gives no two of its 300 tokens so much
    assert [v.preferred for v in judge(PAIRS)] == [None] * 3


def test_equal_responses_are_a_tie(judge):
    assert judge(PAIRS)[2].preferred == 0.5  # whatever it says in the one order contradicts the other


def test_a_directory_is_what_its_config_says(sft_dir):
    assert isinstance(load_judge(sft_dir), LMJudge)


def test_a_question_that_does_not_fit(judge):
    with pytest.raises(ValueError, match="does not fit in the judge's context of 96"):
        judge([Pair("cat " * 100, "a", "b", {}, 0)])


def test_a_template_without_a_field(judge):
    with pytest.raises(ValueError, match="no {second}"):
        LMJudge(judge.policy, "{prompt} {first}")


def test_braces_in_a_response_stay():
    assert fill("{prompt}-{first}-{second}", {"{prompt}": "{first}", "{first}": "{second}", "{second}": "x"}) == "{first}-{second}-x"
