"""Bad input of every kind ends in one line that says what, where and what to do; `tutorials/errors.md` shows the lines.

`pytest -s tests/test_bad_table.py` prints them. LIT_RLHF_WRITE_ERRORS=1 in the environment writes the page anew.
"""

import os
import re
import shutil
from pathlib import Path

import pytest
from bad_cases_checkpoints import CASES as CHECKPOINTS
from bad_cases_data import CASES as DATA
from bad_cases_reports import CASES as REPORTS
from bad_cases_setup import CASES as SETUP
from bad_inputs import OK, QUIET, Case, lines, pairs, sft

from lit_rlhf.__main__ import main
from lit_rlhf.cli import build

CASES = DATA + SETUP + CHECKPOINTS + REPORTS
PAGE = Path(__file__).parents[1] / "tutorials" / "errors.md"
HEAD = """# What it says when something is wrong

Every mistake in data, directories, settings or rewards ends a run in one line on the terminal that says what is wrong, where, and what to
do about it, and in exit code 2 (refused before anything was loaded) or 1 (while reading, loading or running). `--debug` shows the traceback
as well. An error that keeps its traceback without `--debug` is a bug of ours: please report it. This page is made from the tests
(`tests/test_bad_table.py`), so the lines are those that are printed.
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, sft_dir):
    """`good.ckpt` and `reward.ckpt`, each after one step."""
    folder, before = tmp_path_factory.mktemp("checkpoints"), Path.cwd()
    os.chdir(folder)
    try:
        (folder / "sft").symlink_to(sft_dir)
        save = ["--trainer.enable_checkpointing=true", "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=."]
        assert main([*sft(lines(*[OK] * 4)), *save, "--trainer.callbacks.filename=good"]) == 0
        assert main([*pairs(), *save, "--trainer.callbacks.filename=reward"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, sft_dir, reward_dir):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIT_RLHF_DEBUG", raising=False)
    (tmp_path / "sft").symlink_to(sft_dir)
    (tmp_path / "reward").symlink_to(reward_dir)
    return tmp_path


def answer(case: Case, capsys, here: Path) -> tuple[int, str]:
    """Exit code and the one line."""
    args = case.make()
    capsys.readouterr()
    code = main(args)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    found = [line for line in err.splitlines() if line.startswith("lit-rlhf: error: ")]
    assert len(found) == 1 and err.splitlines()[-1] == found[0], err
    return code, found[0].removeprefix("lit-rlhf: error: ").replace(str(here), "/home/you")


@pytest.mark.parametrize("case", CASES, ids=[f"{case.group}: {case.what}" for case in CASES])
def test_one_line(case, capsys, here, written, request):
    if case in CHECKPOINTS:
        for path in request.getfixturevalue("checkpoints").glob("*.ckpt"):
            shutil.copy(path, here)
    code, line = answer(case, capsys, here)
    assert code == case.code, line
    assert not [part for part in case.says if part not in line], line
    assert len(line) < 700 and not (here / "canary").exists()
    row = f"| {case.what} | {cell(line)} | {code} |"
    print(f"\n{case.group}: {case.what} -> {code}\n    {line}")
    if os.environ.get("LIT_RLHF_WRITE_ERRORS"):
        written.append((case.group, row))
    else:
        assert plain(row) in {plain(line) for line in PAGE.read_text(encoding="utf-8").splitlines()}, f"{PAGE.name} is out of date"


def cell(line: str) -> str:
    """The line as it is, for a cell of a Markdown table."""
    return "`` " + line.replace("|", "\\|") + " ``"


def plain(row: str) -> str:
    """The row without what stands in parentheses: the libraries' own words are theirs to change."""
    return re.sub(r"\([^()]*\)", "", row)


@pytest.fixture(scope="module")
def written():
    """Rows for the page, which is written when all are there."""
    rows: list[tuple[str, str]] = []
    yield rows
    if len(rows) == len(CASES):
        groups = list(dict.fromkeys(group for group, _ in rows))
        tables = ["\n".join([f"## {g.capitalize()}", "", "| given | answer | exit code |", "| --- | --- | ---: |"]) for g in groups]
        bodies = ["\n".join(row for group, row in rows if group == g) for g in groups]
        PAGE.write_text(HEAD + "".join(f"\n{t}\n{b}\n" for t, b in zip(tables, bodies, strict=True)), encoding="utf-8")


def test_the_table_is_whole():
    """No case twice, at least 40 of them, and the page has a row for each and no other."""
    assert len(CASES) == len({case.what for case in CASES}) >= 40
    rows = [
        line
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith(("| given", "| ---"))
    ]
    assert len(rows) == len(CASES)


@pytest.mark.parametrize("name", ["x.csv", "x.json", "x.jsonl", "x.parquet"])
def test_a_data_files_name_stays_a_name(name, here):
    """jsonargparse once read the file in its place, and gave a csv's text to the DataModule as if it were a hub name."""
    Path(name).write_text('[{"prompt": "Q", "label": "A"}]' if name == "x.json" else "prompt,label\nQ,A\n")
    assert build(sft(name)).datamodule.sources.data == name
    Path("data.yaml").write_text(f"data:\n  class_path: SFTDataModule\n  init_args:\n    data: {name}\n    val_data: {name}\n")
    sources = build(["fit", "--model=SFT", "--model.model=sft", "--config=data.yaml", *QUIET]).datamodule.sources
    assert sources.data == sources.val_data == name
