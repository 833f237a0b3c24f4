"""The command: what it prints, writes and refuses."""

import json

import pytest

from lit_rlhf.__main__ import main
from lit_rlhf.winrate.run import short_names


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, words in (("a", "cat cat"), ("b", "cat")):
        (tmp_path / name).mkdir()
        rows = [{"prompt": f"p {i}", "response": f"{words} {'dog' * (i % 3)}", "score": 1.0} for i in range(12)]
        (tmp_path / name / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_judges.py").write_text(
        "def cats(prompts, responses):\n    return [r.count('cat') for r in responses]\n"
        "def first(prompts, first, second):\n    return [1.0] * len(prompts)\n"
    )
    return ["a/predictions.jsonl", "b/predictions.jsonl"]


def test_prints_and_writes(files, capsys, tmp_path, reward_dir, sft_dir):
    judges = ["my_judges.cats", "my_judges:first", reward_dir]
    assert main(["winrate", *files, "--judge", *judges, "--out", "report"]) == 0
    said = capsys.readouterr().out
    assert "a against b, 12 pairs" in said and "100.0% (100.0% to 100.0%): 12 won, 0 tied, 0 lost" in said
    assert "50.0% (50.0% to 50.0%): 0 won, 12 tied, 0 lost" in said and "100.0% of the answers name what was shown first" in said
    found = json.loads((tmp_path / "report/report.json").read_text())["judges"]
    assert list(found) == judges and found["my_judges.cats"]["wins"] == 12
    assert "Pairs, by my_judges.cats" in (tmp_path / "report/report.html").read_text()


def test_a_language_model(files, capsys, sft_dir, tmp_path):
    (tmp_path / "question.txt").write_text("{prompt} {first} {second}")
    code = main(["winrate", *files, "--judge", sft_dir, "--template", "question.txt"])
    said = capsys.readouterr()
    assert (
        code == 2 and "the judge gave no answer that counts to any of the 12 pairs" in said.err
    )  # untrained: it would say neither A nor B


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["none.jsonl", "b/predictions.jsonl", "--judge", "my_judges.cats"], "none.jsonl: no such file"),
        (["a/predictions.jsonl", "b/predictions.jsonl", "--judge", "my_judges.dogs"], "the module my_judges has no 'dogs'"),
        (["a/predictions.jsonl", "b/predictions.jsonl", "--judge", "no_such_module.f"], "no module 'no_such_module' to import"),
        (["a/predictions.jsonl", "b/predictions.jsonl", "--judge", "./nowhere"], "no model directory at './nowhere'"),
    ],
)
def test_refuses_in_one_line(files, capsys, args, said):
    assert main(["winrate", *args]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and err.startswith("lit-rlhf: error: winrate: ")


def test_judges_have_short_names_that_tell_them_apart():
    judges = ["runs/study/reward/hf", "runs/study/judge/hf", "/opt/smollm2/", "tutorials.study.rewards.rouge", "hf"]
    assert list(short_names(judges).values()) == ["reward", "judge", "smollm2", "rouge", "hf"]
    assert list(short_names(["a/reward/hf", "b/reward/hf"]).values()) == ["a/reward/hf", "b/reward/hf"]
