"""Joining two files of predictions."""

import json

import pytest

from lit_rlhf.winrate.pairs import join, read_predictions

A = [{"prompt": "p", "response": "a1"}, {"prompt": "q", "response": "a2", "reference": "r"}, {"prompt": "p", "response": "a3"}]
B = [{"prompt": "p", "response": "b1"}, {"prompt": "p", "response": "b3"}, {"prompt": "q", "response": "b2"}]
NAMES = ["A.jsonl", "B.jsonl"]


def test_the_kth_response_goes_with_the_kth():
    pairs = join(A, B, NAMES)
    assert [(p.prompt, p.first, p.second, p.number) for p in pairs] == [("p", "a1", "b1", 0), ("p", "a3", "b3", 0), ("q", "a2", "b2", 1)]
    assert pairs[2].columns == {"reference": "r"}


def test_prompts_of_one_side_alone():
    more = [*A, {"prompt": "only here", "response": "x"}]
    with pytest.raises(
        ValueError, match="1 prompts do not stand in both files equally often: 'only here' 1 times in A.jsonl, 0 in B.jsonl"
    ):
        join(more, B, NAMES)
    assert len(join(more, B, NAMES, common=True)) == 3
    with pytest.raises(ValueError, match="'p' 2 times in A.jsonl, 1 in B.jsonl"):
        join(A, B[1:], NAMES)
    assert [p.first for p in join(A, B[1:], NAMES, common=True)] == ["a1", "a2"]


def test_nothing_in_common():
    with pytest.raises(ValueError, match="share no prompt .*predict both on the same data"):
        join(A, [{"prompt": "z", "response": "b"}], NAMES, common=True)


def test_reads_what_predict_writes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in A) + "\n")
    assert read_predictions(path) == A


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "p", "response": "a"}\n{"prompt": "q", "resp', r"bad.jsonl:2: no JSON"),
        ('{"prompt": "p", "answer": "a"}\n', r'bad.jsonl:1: no text in the field "response" \(has: prompt, answer\)'),
        ('{"prompt": 3, "response": "a"}\n', r'bad.jsonl:1: no text in the field "prompt"'),
        ("[1]\n", r"bad.jsonl:1: .*\(has: list\)"),
        ("\n", "has no rows"),
    ],
)
def test_bad_files(tmp_path, text, said):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_predictions(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="lit-rlhf predict"):
        read_predictions(tmp_path / "none.jsonl")
