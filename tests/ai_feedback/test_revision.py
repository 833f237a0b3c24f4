"""Critique and revision: what the model is asked, and files that SFT reads as they are."""

import json

import pytest

from lit_rlhf.__main__ import main
from lit_rlhf.ai_feedback import revision
from lit_rlhf.ai_feedback.revision import ask, check_template, revise
from lit_rlhf.data import SFTDataModule
from lit_rlhf.generation import Sampling
from lit_rlhf.modules import SFT
from lit_rlhf.networks import CausalPolicy

ROWS = [{"prompt": "the cat", "response": " sat {critique}"}, {"prompt": "my dog", "response": "ran"}]
CRITIQUE, REVISION = "{principle}? {prompt}|{response}", "{prompt}|{response}|{critique}|{principle}!"


def scripted(monkeypatch, answers):
    """Has `answers`, one list a question round, said in the model's place; returns what was asked."""
    asked, left = [], iter(answers)
    monkeypatch.setattr(revision, "ask", lambda policy, questions, sampling, key, rows: (asked.append(list(questions)), next(left))[1])
    return asked


def test_one_round_by_hand(monkeypatch):
    asked = scripted(monkeypatch, [["too short", "{response}"], ["sat down", "walked"]])
    made = revise(None, ROWS, ["be kind"], Sampling(), critique=CRITIQUE, revision=REVISION)
    assert asked[0] == ["be kind? the cat|sat {critique}", "be kind? my dog|ran"]
    assert asked[1] == ["the cat|sat {critique}|too short|be kind!", "my dog|ran|{response}|be kind!"]  # what texts say in braces stays
    assert made == [
        {"prompt": "the cat", "label": " sat down", "original": " sat {critique}",
         "principles": ["be kind"], "critiques": ["too short"], "revisions": ["sat down"]},
        {"prompt": "my dog", "label": "walked", "original": "ran",
         "principles": ["be kind"], "critiques": ["{response}"], "revisions": ["walked"]},
    ]  # fmt: skip


def test_rounds_go_on_from_the_last_revision_by_another_principle(monkeypatch):
    asked = scripted(monkeypatch, [["c1", "d1"], ["r1", ""], ["c2", "d2"], ["r2", ""], ["c3", "d3"], ["r3", "s3"]])
    made = revise(None, ROWS, ["A", "B"], Sampling(), rounds=3, critique=CRITIQUE, revision=REVISION)
    one, other = made[0]["principles"][:2]
    assert {one, other} == {"A", "B"} and made[0]["principles"] == [one, other, one]  # both before either comes again
    assert asked[2][0] == f"{other}? the cat|r1" and asked[3][0] == f"the cat|r1|c2|{other}!"
    assert asked[4][1].endswith("? my dog|ran")  # empty revisions leave the response as it is
    assert [row["label"] for row in made] == [" r3", "s3"] and made[1]["revisions"] == ["", "", "s3"]


def test_what_did_not_change_is_left_out(monkeypatch):
    scripted(monkeypatch, [["c", "d"], ["", "ran"]])
    assert revise(None, ROWS, ["A"], Sampling(), critique=CRITIQUE, revision=REVISION) == []


def test_answers_are_the_models_whatever_the_batches(sft_dir, monkeypatch):
    """Greedy answers against transformers' generate; sampled ones do not depend on the size of the batches."""
    policy = CausalPolicy.load(sft_dir).eval()
    questions = ["the cat sat", "my dog ran far away", "it ate"]
    found = ask(policy, questions, Sampling(8, 0.0), (0,), [0, 1, 2])
    for question, answer in zip(questions, found, strict=True):
        ids = policy.tokenizer(question, return_tensors="pt")
        out = policy.lm.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert answer == policy.tokenizer.decode(out, skip_special_tokens=True).strip()
    sampled = ask(policy, questions, Sampling(8, 1.0), (0,), [0, 1, 2])
    monkeypatch.setattr(revision, "ROWS", 2)
    assert ask(policy, questions, Sampling(8, 1.0), (0,), [0, 1, 2]) == sampled != ask(policy, questions, Sampling(8, 1.0), (1,), [0, 1, 2])


def test_a_chat_model_is_asked_in_its_template(sft_dir):
    policy = CausalPolicy.load(sft_dir).eval()
    plain = ask(policy, ["<the cat>"], Sampling(6, 0.0), (0,), [0])
    policy.tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    try:
        assert ask(policy, ["the cat"], Sampling(6, 0.0), (0,), [0]) == plain
    finally:
        policy.tokenizer.chat_template = None


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made.jsonl").write_text("".join(json.dumps({**row, "score": 1.0}) + "\n" for row in ROWS))
    (tmp_path / "principles.txt").write_text("be kind\nbe brief\n")
    (tmp_path / "c.txt").write_text(CRITIQUE)
    (tmp_path / "r.txt").write_text(REVISION)
    return ["--principles=principles.txt", "--critique=c.txt", "--revision=r.txt", "--max_new_tokens=8", "--out=out/sft.jsonl"]


def test_the_file_trains_sft(files, sft_dir, tmp_path, make_trainer, capsys):
    assert main(["ai-feedback", "revise", "made.jsonl", f"--model={sft_dir}", "--seed=3", *files]) == 0
    assert "of 2 responses revised" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out/sft.jsonl").read_text().splitlines()]
    module, data = SFT(sft_dir), SFTDataModule("out/sft.jsonl", batch_size=2)
    make_trainer(max_steps=1).fit(module, data)
    batch = data.batch("train", list(range(len(rows))))
    texts = module.tokenizer.batch_decode(batch.response_ids, skip_special_tokens=True)
    assert texts == [row["label"] for row in rows] and batch.columns["prompt"] == [row["prompt"] for row in rows]
    assert all(row["label"].strip() == row["revisions"][-1] != row["original"].strip() for row in rows)
    assert rows[0]["label"].startswith(" ")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model=./nowhere"], "no model directory at './nowhere'"),
        (["--rounds=0"], "--rounds must be at least 1, got 0"),
        (["--max_new_tokens=90"], "do not fit in the model's context of 96; lower --max_new_tokens"),
        (["--critique=r.txt", "--revision=c.txt"], "the revision template has no {critique}"),
        (["--principles=none.txt"], "none.txt"),
        (["--temperature=-1"], "temperature must be 0 (greedy) or more"),
    ],
)
def test_refuses_in_one_line(files, sft_dir, capsys, more, said):
    assert main(["ai-feedback", "revise", "made.jsonl", f"--model={sft_dir}", *files, *more]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and err.startswith("lit-rlhf: error: ai-feedback revise: ")


def test_rows_without_a_response(files, sft_dir, tmp_path, capsys):
    (tmp_path / "made.jsonl").write_text('{"prompt": "p", "response": " "}\n')
    assert main(["ai-feedback", "revise", "made.jsonl", f"--model={sft_dir}", *files]) == 2
    assert 'made.jsonl:1: no text in "prompt" or in "response"' in capsys.readouterr().err


def test_templates_need_their_fields():
    with pytest.raises(ValueError, match="the critique template has no {principle}"):
        check_template("critique", "{prompt} {response}")
    assert check_template("critique", revision.CRITIQUE) and check_template("revision", revision.REVISION)
