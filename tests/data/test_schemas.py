"""Every schema, from raw rows to the Example that comes of them."""

import pytest

from lit_rlhf.data.read import BadRow
from lit_rlhf.data.schemas import PAIR_SCHEMAS, PROMPT_SCHEMAS, SFT_SCHEMAS, examples

POST = "SUBREDDIT: r/cats\n\nTITLE: Help\n\nPOST: It ate.\n\nTL;DR:"
USER, OTHER = {"role": "user", "content": "Hi"}, {"role": "user", "content": "Why?"}
GOOD, BAD = {"role": "assistant", "content": "Hello"}, {"role": "assistant", "content": "No"}


def parse(row, schemas, **columns):
    (found,) = examples([("x:1", row)], "x", schemas, columns)
    if isinstance(found, BadRow):
        raise found
    return found


@pytest.mark.parametrize("label", ["label", "completion", "summary", "response"])
def test_prompt_and_label(label):
    found = parse({"prompt": "Q", label: " A ", "extra": 3}, SFT_SCHEMAS)
    assert (found.prompt, found.responses, found.reference) == ("Q", [" A "], "A")
    assert found.columns == {"prompt": "Q", label: " A ", "extra": 3}


def test_renamed_columns():
    found = parse({"question": "Q", "answer": "A"}, SFT_SCHEMAS, prompt="question", label="answer")
    assert (found.prompt, found.responses) == ("Q", ["A"])
    found = parse({"prompt": "Q", "chosen": "A", "rejected": "B"}, SFT_SCHEMAS, label="chosen")  # to learn from what was preferred
    assert (found.prompt, found.responses) == ("Q", ["A"])


def test_raw_tldr():
    found = parse({"id": 1, "subreddit": "cats", "title": "Help", "post": "It ate.", "summary": "cat ate"}, SFT_SCHEMAS)
    assert (found.prompt, found.responses, found.reference) == (POST, [" cat ate"], "cat ate")


def test_messages():
    found = parse({"messages": [USER, GOOD, OTHER, BAD]}, SFT_SCHEMAS)
    assert (found.prompt, found.responses, found.reference) == ([USER, GOOD, OTHER], [[BAD]], "No")
    found = parse({"prompt": [USER], "completion": [GOOD]}, SFT_SCHEMAS)
    assert (found.prompt, found.responses, found.reference) == ([USER], [[GOOD]], "Hello")


def test_pair_with_margin_and_target():
    found = parse({"prompt": "Q", "chosen": "A", "rejected": "B", "margin": 0.5, "target": 0.9}, PAIR_SCHEMAS)
    assert (found.prompt, found.responses, found.pairs) == ("Q", ["A", "B"], [(0, 1)])
    assert (found.margin, found.target, found.reference) == ([0.5], [0.9], "A")
    found = parse({"prompt": "Q", "chosen": "A", "rejected": "B", "margin": None}, PAIR_SCHEMAS)
    assert (found.margin, found.target) == (None, None)
    assert parse({"prompt": "Q", "chosen": "A", "rejected": "B", "margin": "2"}, PAIR_SCHEMAS).margin == [2.0]  # a csv file


def test_hh_strings_split_at_the_last_shared_assistant():
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    found = parse({"chosen": start + " Because.", "rejected": start + " Bah."}, PAIR_SCHEMAS)
    assert found.prompt == start.lstrip()
    assert found.responses == [" Because.", " Bah."]


def test_hh_messages():
    found = parse({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, PAIR_SCHEMAS)
    assert (found.prompt, found.responses, found.pairs) == ([USER], [[GOOD], [BAD]], [(0, 1)])
    # UltraFeedback's: a prompt text beside whole conversations
    assert parse({"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, PAIR_SCHEMAS).prompt == [USER]
    # prompt and answers as messages
    assert parse({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, PAIR_SCHEMAS).responses == [[GOOD], [BAD]]


def comparison(**changes):
    info = {"id": "t3", "post": "It ate.", "title": "Help", "subreddit": "cats", "site": None, "article": None}
    summaries = [{"text": " cat ate", "policy": "sup2", "note": "ok"}, {"text": " cat", "policy": "ref", "note": None}]
    row = {
        "info": info,
        "summaries": summaries,
        "choice": 1,
        "worker": "w1",
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": 7},
    }
    return row | changes


def test_openai_comparison():
    found = parse(comparison(), PAIR_SCHEMAS)
    assert (found.prompt, found.responses, found.pairs, found.reference) == (POST, [" cat", " cat ate"], [(0, 1)], "cat")
    kept = {"policy_chosen": "ref", "policy_rejected": "sup2", "note_chosen": None, "note_rejected": "ok", "policies": "ref--sup2"}
    kept |= {"worker": "w1", "batch": "batch3", "split": "train", "confidence": 7}
    assert kept.items() <= found.columns.items()
    assert parse(comparison(choice=0, extra=None), PAIR_SCHEMAS).responses == [" cat ate", " cat"]
    assert parse(comparison(extra={}), PAIR_SCHEMAS).columns["confidence"] is None


def test_openai_comparison_of_news():
    info = {"id": "x", "post": None, "title": None, "subreddit": None, "site": "cnn", "article": "News."}
    assert parse(comparison(info=info), PAIR_SCHEMAS).prompt == "Article:\nNews.\n\nTL;DR:\n"


def test_ratings():
    found = parse({"prompt": "Q", "responses": ["a", "b", "c"], "scores": [1, 3, 1]}, PAIR_SCHEMAS)
    assert found.responses == ["a", "b", "c"]
    # (a, b): b is better; (a, c): a tie; (b, c): b is better
    assert list(zip(found.pairs, found.target, strict=True)) == [((1, 0), 1.0), ((0, 2), 0.5), ((1, 2), 1.0)]
    assert found.reference == "b"


def test_labelled_pairs_of_several_responses():
    row = {"prompt": "Q", "responses": ["a", "b", "c"], "pairs": [[1, 0], [2, 1]], "target": [1, 0.9], "margin": [2, "0.5"]}
    found = parse(row, PAIR_SCHEMAS)
    assert (found.responses, found.pairs) == (["a", "b", "c"], [(1, 0), (2, 1)])
    # b won one and lost most of another, c won most of one: c is the best
    assert (found.target, found.margin, found.reference) == ([1.0, 0.9], [2.0, 0.5], "c")
    assert parse(row | {"scores": [3, 2, 1]}, PAIR_SCHEMAS).pairs == [(1, 0), (2, 1)]  # what people said of pairs, not of each
    hard = parse({name: row[name] for name in ("prompt", "responses", "pairs")}, PAIR_SCHEMAS)
    assert hard.target is None and hard.margin is None


def test_prompts_from_any_rows():
    assert parse({"prompt": "Q"}, PROMPT_SCHEMAS).prompt == "Q"
    assert parse({"prompt": [USER]}, PROMPT_SCHEMAS).prompt == [USER]
    assert parse({"messages": [USER, GOOD, OTHER]}, PROMPT_SCHEMAS).prompt == [USER, GOOD, OTHER]
    assert parse({"messages": [USER, GOOD]}, PROMPT_SCHEMAS).prompt == [USER]
    assert parse({"subreddit": "cats", "title": "Help", "post": "It ate."}, PROMPT_SCHEMAS).prompt == POST
    assert parse({"prompt": "Q", "label": "A"}, PROMPT_SCHEMAS).reference == "A"
    assert parse({"prompt": "Q", "chosen": "A", "rejected": "B"}, PROMPT_SCHEMAS).reference == "A"
