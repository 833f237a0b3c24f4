"""On the quickstart the doctor passes; on twelve broken set-ups it names the fault. `tutorials/doctor.md` shows the table.

LIT_RLHF_QUICKSTART names a finished quickstart to use instead of a new one; LIT_RLHF_WRITE_DOCTOR=1 writes the page's tables anew.
"""

import inspect
import os
import re
import time
from pathlib import Path

import pytest
from broken_setups import SETUPS, Bench, environment_quickstart

from lit_rlhf.doctor import CHECKS, Case, Finding, examine
from lit_rlhf.doctor.report import as_text
from lit_rlhf.doctor.run import main
from lit_rlhf.quickstart.run import main as quickstart

PAGE = Path(__file__).parents[2] / "tutorials" / "doctor.md"


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    quick = environment_quickstart() or folder / "quickstart"
    if not (quick / "ppo/hf/policy").exists():
        assert quickstart(["--out", str(quick)]) == 0
    return Bench(quick, folder)


@pytest.fixture(scope="module")
def written():
    """What the page's tables are made of, written when everything is there."""
    found: dict[str, str] = {}
    yield found
    if os.environ.get("LIT_RLHF_WRITE_DOCTOR") and len(found) == len(SETUPS) + 1:
        rows = "\n".join(found[setup.name] for setup in SETUPS)
        replace("setups", "| set-up | made by | the finding that names it | what else failed |\n| --- | --- | --- | --- |\n" + rows)
        replace("checks", checks_table())
        replace("healthy", "```\n" + found["healthy"] + "\n```")


def checks_table() -> str:
    """A row for each check, from its docstring: what it expects, then why and how much."""
    rows = []
    for name, check in CHECKS.items():
        if not name.endswith("(policy)"):
            first, _, rest = (inspect.getdoc(check) or "").partition("\n\n")
            rows.append(f"| `{name}` | {cell(first)} | {cell(rest)} |")
    return "\n".join(["| check | expects | why, and how much |", "| --- | --- | --- |", *rows])


def cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def replace(name: str, text: str) -> None:
    """Writes `text` between the page's marks of that name."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    PAGE.write_text(page[: page.index(begin) + len(begin)] + "\n" + text + "\n" + page[page.index(end) :], encoding="utf-8")


@pytest.mark.slow
def test_the_quickstart_passes_in_two_minutes(bench, capsys, written, tmp_path):
    paths = ["--sft", bench.sft, "--reward", bench.reward, "--base", bench.base, "--policy", str(bench.quick / "ppo/hf/policy")]
    begin = time.perf_counter()
    code = main([*paths, "--data", *bench.data, "--out", str(tmp_path)])
    seconds, said = time.perf_counter() - begin, capsys.readouterr().out
    assert code == 0, said
    assert seconds < 120, f"the doctor took {seconds:.0f} s"
    assert " 0 failed, 0 skipped" in said
    assert (tmp_path / "report.html").is_file()
    written["healthy"] = re.sub(r"\S*/(\w+\.jsonl)", r"\1", said.split(str(tmp_path))[0].strip())


@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS, ids=[setup.name for setup in SETUPS])
def test_names_the_fault(bench, setup, written):
    findings = examine(Case(**bench.healthy | setup.make(bench)))
    failed = {f.name: f for f in findings if f.status == "fail"}
    assert set(setup.checks) <= set(failed), as_text(findings, 0)
    named = failed[setup.checks[0]]
    assert named.reason and named.remedy
    written[setup.name] = row(setup, named, [name for name in failed if name != named.name])


def row(setup, named: Finding, others: list[str]) -> str:
    measured = re.sub(r"\S*/([\w-]+\.jsonl)", r"\1", named.measured)
    said = f"{measured}; {named.reason}".replace("<eos>", "`<eos>`")
    return f"| {setup.name} | {setup.how} | **{named.name}**: {cell(said)} | {', '.join(others)} |"


def test_the_page_has_every_check_and_every_setup():
    page = PAGE.read_text(encoding="utf-8")
    assert len(SETUPS) == 12
    for setup in SETUPS:
        assert f"| {setup.name} |" in page and f"**{setup.checks[0]}**" in page
    assert checks_table() in page, f"{PAGE.name} says something else of the checks; LIT_RLHF_WRITE_DOCTOR=1 writes it anew"
