"""Soft labels by hand, and files that the data module and the reward model read as they are."""

import json
import math
from pathlib import Path

import pytest
import torch
from families import true_logprobs
from transformers import AutoModelForCausalLM

from lit_rlhf.__main__ import main
from lit_rlhf.ai_feedback.labels import (
    draw_principles,
    judged,
    label_rows,
    limited,
    make_pairs,
    named_first,
    read_candidates,
    read_principles,
    soft_label,
)
from lit_rlhf.data import PairwiseDataModule
from lit_rlhf.modules import PairwiseReward
from lit_rlhf.winrate.judges import LMJudge, Verdict
from lit_rlhf.winrate.pairs import Pair

PAIRS = [Pair("p 0", " a", " b", {}, 0), Pair("p 1", " c", " d", {}, 1), Pair("p 2", " e", " f", {}, 2)]


@pytest.mark.parametrize(
    ("verdict", "label"),
    [
        (Verdict(1.0, (0.9, 0.6)), 0.75),
        (Verdict(0.5, (0.9, 0.3)), 0.6),  # the two orders contradict each other; what is left when position cancels is 0.6
        (Verdict(0.0, (0.0, 0.25)), 0.125),
        (Verdict(None, (None, 0.9)), None),
        (Verdict(1.0), 1.0),  # asked once
        (Verdict(None), None),
    ],
)
def test_soft_labels_by_hand(verdict, label):
    assert soft_label(verdict) == (None if label is None else pytest.approx(label))


def test_a_limit_on_how_sure_a_label_may_be():
    assert [limited(p, 0.6) for p in (0.0, 0.4, 0.55, 0.95)] == pytest.approx([0.4, 0.4, 0.55, 0.6])
    assert limited(0.95, 1.0) == 0.95


def test_rows_by_hand():
    verdicts = [Verdict(0.0, (0.2, 0.1)), Verdict(None, (None, 0.9)), Verdict(1.0, (1.0, 0.7))]
    rows = label_rows(PAIRS, verdicts, ["be kind", "be brief", "be true"], 0.8, judge="J")
    assert rows == [
        {"prompt": "p 0", "chosen": " b", "rejected": " a", "target": 0.8, "principle": "be kind", "orders": [0.2, 0.1], "judge": "J"},
        {"prompt": "p 2", "chosen": " e", "rejected": " f", "target": 0.8, "principle": "be true", "orders": [1.0, 0.7], "judge": "J"},
    ]
    # first order: 0.2 names the second shown, 1.0 the first; second order: the second response is shown first, so 0.1 names what is
    # shown first and 0.7 what is shown second
    assert named_first(verdicts) == 0.5 and named_first([Verdict(1.0)]) is None
    with pytest.raises(ValueError, match="no answer that counts to any of 3 pairs"):
        label_rows(PAIRS, [Verdict(None, (None, None))] * 3, None, 1.0)


def test_candidates_are_joined_by_prompt(tmp_path):
    rows = [{"prompt": "p", "response": "a"}, {"prompt": "q", "responses": ["x", "y", " "]}, {"prompt": "p", "response": "a"}]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "two.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "b", "rejected": "c"}) + "\n\n")
    found = read_candidates([tmp_path / "one.jsonl", tmp_path / "two.jsonl"])
    assert found == {"p": ["a", "b", "c"], "q": ["x", "y"]}
    pairs = [(p.prompt, p.first, p.second) for p in make_pairs(found, None, 0)]
    assert sorted(pairs) == [("p", "a", "b"), ("p", "a", "c"), ("p", "b", "c"), ("q", "x", "y")]
    drawn = {tuple((p.first, p.second) for p in make_pairs(found, 1, seed)) for seed in range(40)}
    assert drawn == {((a, b), ("x", "y")) for a, b in (("a", "b"), ("a", "c"), ("b", "c"))}


def test_a_language_model_is_asked_by_each_pairs_principle(sft_dir, tokenizer, monkeypatch):
    """Against the model's own logits, one question at a time."""
    monkeypatch.setattr("lit_rlhf.winrate.judges.LEAST_MASS", 0.0)
    monkeypatch.setattr(LMJudge.__init__, "__defaults__", (*LMJudge.__init__.__defaults__[:1], ("cat", "dog"), 0.0))
    template, principles = "{principle}: {prompt}|{first}|{second} so", ["my hat", "the rain", "my hat"]
    lm = AutoModelForCausalLM.from_pretrained(sft_dir)

    def first(principle, pair, one, other):
        question = tokenizer(f"{principle}: {pair.prompt}|{one.strip()}|{other.strip()} so")["input_ids"]
        with torch.no_grad():
            cat, dog = (math.exp(float(true_logprobs(lm, question, tokenizer(a)["input_ids"]).sum())) for a in (" cat", " dog"))
        return cat / (cat + dog)

    verdicts = judged(sft_dir, PAIRS, principles, template)
    for pair, principle, verdict in zip(PAIRS, principles, verdicts, strict=True):
        expected = (first(principle, pair, pair.first, pair.second), 1 - first(principle, pair, pair.second, pair.first))
        assert verdict.orders == pytest.approx(expected, abs=1e-5)
    swapped = judged(sft_dir, PAIRS, ["the rain", "my hat", "my hat"], template)
    assert abs(swapped[0].orders[0] - verdicts[0].orders[0]) > 1e-4 and swapped[2].orders == pytest.approx(verdicts[2].orders)


def test_each_pair_draws_a_principle():
    drawn = draw_principles(["a", "b", "c"], 600, 0)
    assert all(abs(drawn.count(p) - 200) < 60 for p in "abc")  # 200 +- 5 standard deviations of 11.5
    assert drawn == draw_principles(["a", "b", "c"], 600, 0) != draw_principles(["a", "b", "c"], 600, 1)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "cat sat hat mat rat".split()
    for name, extra in (("a", ""), ("b", " ran")):
        rows = [{"prompt": f"the {words[i % 5]} and {words[i // 5]}", "response": f" my {words[i % 5]}{extra}"} for i in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = (
        "def likes(prompts, first, second):\n    return [0.5 + 0.3 * (('ran' in a) - ('ran' in b)) + 0.1 for a, b in zip(first, second)]\n"
    )
    (tmp_path / "ai_judge.py").write_text(judge)
    (tmp_path / "principles.txt").write_text("# of ours\n\nBe kind.\n  Be brief.\n")
    return ["a.jsonl", "b.jsonl"]


def test_the_file_trains_a_reward_model_with_soft_targets(files, sft_dir, make_trainer, capsys):
    assert main(["ai-feedback", "label", *files, "--judge=ai_judge.likes", "--out=labels/train.jsonl"]) == 0
    said = capsys.readouterr().out
    # the judge says 0.5 + 0.3 + 0.1 where the better one stands first, 0.5 - 0.3 + 0.1 where it stands second: (0.9 + 0.7)/2 = 0.8
    assert "10 of 10 pairs labelled, 0 without an answer that counts; mean target 0.800" in said and "50.0% of the answers" in said
    model = PairwiseReward(sft_dir)
    data = PairwiseDataModule("labels/train.jsonl", val_data="labels/train.jsonl", batch_size=10)
    trainer = make_trainer(max_steps=1)
    trainer.fit(model, data)
    batch = data.batch("train", list(range(10)))
    assert batch.target.tolist() == pytest.approx([0.8] * 10)
    chosen = model.tokenizer.batch_decode(batch.response_ids[batch.pairs[:, 0]], skip_special_tokens=True)
    assert all(text.endswith(" ran") for text in chosen)
    # the loss is the soft cross-entropy of the score differences d: -0.8 log sigmoid(d) - 0.2 log sigmoid(-d)
    with torch.no_grad():
        scores = model.predict_step(batch, 0)
        d = torch.tensor([scores[i]["score"] - scores[j]["score"] for i, j in batch.pairs.tolist()])
        loss = model._loss(batch, model.network(batch), None)[0]
    expected = sum(0.8 * math.log1p(math.exp(-x)) + 0.2 * math.log1p(math.exp(x)) for x in d.tolist()) / 10
    assert float(loss) == pytest.approx(expected, abs=1e-5)


def test_principles_and_the_limit(files, tmp_path):
    assert read_principles("principles.txt") == ["Be kind.", "Be brief."]
    assert main(["ai-feedback", "label", *files, "--judge=ai_judge.likes", "--most=0.6", "--out=out.jsonl"]) == 0
    assert [json.loads(line)["target"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == pytest.approx([0.6] * 10)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--judge=ai_judge.none"], "the module ai_judge has no 'none'"),
        (["--judge=ai_judge.likes", "--principles=principles.txt"], "ai_judge.likes is a reward or a function"),
        (["--judge=ai_judge.likes", "--most=0.5"], "--most is 0.5; give more than 0.5"),
        (["--judge=ai_judge.likes", "--pairs_per_prompt=0"], "--pairs_per_prompt must be at least 1"),
        (["none.jsonl", "--judge=ai_judge.likes"], "none.jsonl: no such file"),
        (["bad.jsonl", "--judge=ai_judge.likes"], 'bad.jsonl:2: no text in "prompt", or none in "response"'),
        (["cut.jsonl", "--judge=ai_judge.likes"], "cut.jsonl:1: no JSON"),
        (["number.jsonl", "--judge=ai_judge.likes"], "number.jsonl:1: int, not an object"),
        (["empty.jsonl", "--judge=ai_judge.likes"], "empty.jsonl has no rows"),
    ],
)
def test_refuses_in_one_line(files, tmp_path, capsys, more, said):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "response": "r"}\n{"prompt": "p", "answer": "r"}\n')
    (tmp_path / "cut.jsonl").write_text('{"prompt": "p", "resp')
    (tmp_path / "number.jsonl").write_text("7\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    given = more if more[0].endswith("jsonl") else [*files, *more]
    assert main(["ai-feedback", "label", *given, "--out=out.jsonl"]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and err.startswith("lit-rlhf: error: ai-feedback label: ")
    assert not (tmp_path / "out.jsonl").exists()


def test_one_response_a_prompt_is_no_pair(files, capsys):
    assert main(["ai-feedback", "label", "a.jsonl", "--judge=ai_judge.likes", "--out=out.jsonl"]) == 2
    assert "none of 10 prompts has two different responses to compare; give a second file" in capsys.readouterr().err


def test_a_model_that_does_not_answer(files, sft_dir, capsys):
    Path("short.txt").write_text("{prompt} {first} {second}")
    assert main(["ai-feedback", "label", *files, f"--judge={sft_dir}", "--template=short.txt", "--out=out.jsonl"]) == 2
    assert "the judge gave no answer that counts to any of 10 pairs" in capsys.readouterr().err


def test_a_template_without_the_principle(files, sft_dir, capsys):
    Path("short.txt").write_text("{prompt} {first} {second}")
    more = ["--principles=principles.txt", "--template=short.txt", "--out=out.jsonl"]
    assert main(["ai-feedback", "label", *files, f"--judge={sft_dir}", *more]) == 2
    assert "the template has no {principle}" in capsys.readouterr().err


def test_principles_are_plain_words(tmp_path):
    (tmp_path / "p.txt").write_text("Do as {response} says.\n")
    with pytest.raises(ValueError, match="has a field of the question in it"):
        read_principles(tmp_path / "p.txt")
    (tmp_path / "p.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="has no principle"):
        read_principles(tmp_path / "p.txt")
