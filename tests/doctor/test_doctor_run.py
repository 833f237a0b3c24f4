"""The command and `examine`: exit codes, what is printed and written, errors of a check, names that are none."""

import json

import pytest
from handover import write_rows

from lit_rlhf.__main__ import main
from lit_rlhf.doctor import CHECKS, examine
from lit_rlhf.doctor import run as doctor_run

FINE = ["merged", "loads", "tokenizer", "pad", "eos", "kl", "ratio", "paths", "accuracy"]


@pytest.fixture
def command(sft_dir, reward_dir, reference_rows, judged_rows, tmp_path):
    files = [write_rows(tmp_path / "train.jsonl", reference_rows), write_rows(tmp_path / "pairs.jsonl", judged_rows)]
    return ["doctor", "--sft", sft_dir, "--reward", reward_dir, "--data", *files, "--rows", "32", "--max_new_tokens", "20"]


def test_what_passes_exits_with_0(command, capsys):
    assert main([*command, "--only", *FINE]) == 0
    said = capsys.readouterr().out
    assert [line.split()[1] for line in said.splitlines()[: len(FINE)]] == FINE
    assert f"{len(FINE)} passed, 0 warned, 0 failed, 0 skipped" in said


def test_what_fails_exits_with_1_and_says_why_and_what_to_do(command, capsys, tmp_path, changed, reward_dir):
    command[4] = changed(reward_dir, {"adapter_config.json": {}})
    assert main([*command, "--only", "merged", "drift", "--out", str(tmp_path / "report")]) == 1
    said = capsys.readouterr().out
    assert "FAIL  merged" in said and "why: the adapter (LoRA) is not merged" in said and "do: merge it" in said
    assert "skip  drift   no --policy was given" in said and "1 failed, 1 skipped" in said and said.count("merged\n") == 1
    found = json.loads((tmp_path / "report/report.json").read_text())["findings"]
    assert [(f["name"], f["status"]) for f in found] == [("merged", "fail"), ("drift", "skip")]
    assert main([*command, "--only", "merged", "--allow", "merged"]) == 0


def test_the_report_shows_what_was_measured(command, tmp_path):
    main([*command, "--only", "length", "order", "--out", str(tmp_path / "report")])
    page = (tmp_path / "report/report.html").read_text()
    assert page.count("<svg") == 2 and "Nobody checked these texts" in page and "http" not in page


def test_a_reward_function(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_reward.py").write_text("def cats(prompts, responses):\n    return [float(r.count('cat')) for r in responses]\n")
    command[4] = "my_reward.cats"
    assert main([*command, "--only", "paths", "head", "loads"]) == 0
    said = capsys.readouterr().out
    assert "4 paths" in said and "skip  head   the reward is a function, not a reward model" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--only", "acuracy"], "there is no check 'acuracy'"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_refuses_in_one_line(command, capsys, change, said):
    assert main([*command, *change]) == 2
    err = capsys.readouterr().err
    assert said in err and err.strip().count("\n") == 0


def test_an_error_in_a_check_fails_and_the_others_run(case, monkeypatch):
    def broken(case):
        raise KeyError("what is this")

    monkeypatch.setitem(CHECKS, "pad", broken)
    found = examine(case(), ["pad", "eos"])
    assert [(f.name, f.status) for f in found] == [("pad", "fail"), ("eos", "pass")]
    assert "could not be measured (KeyError: 'what is this')" in found[0].measured and "--only pad --debug" in found[0].remedy
    with pytest.raises(KeyError):
        examine(case(), ["pad"], debug=True)


def test_every_check_says_what_it_expects():
    for name, check in CHECKS.items():
        function = getattr(check, "func", check)
        assert (function.__doc__ or "").strip(), name
    assert len(CHECKS) == 27 and doctor_run.CHECKS is CHECKS
