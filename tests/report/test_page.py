"""The page: everything is there and escaped, it needs nothing but itself, and report.json holds the same."""

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from report_pages import EVIL, FIGURES, everything

from lit_rlhf.functional.statistics import Estimate
from lit_rlhf.report import Answer, Report, Sample, Samples, Table
from lit_rlhf.report.page import SAMPLES_WARNING, cell, page, plain
from lit_rlhf.report.text import as_markdown, visible


class Tags(HTMLParser):
    """Counts tags and checks that they close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_escapes_every_text_and_loads_nothing():
    html = page(everything())
    tags = Tags(html)
    assert tags.open == [] and "script" not in tags.seen and "\x1b" not in html
    # title, h1, lead, h2, two paragraphs, two cells and a note of the table, sample's title, prompt, name and text;
    # the caption of BAND, a point's hint, a bar's name and hint
    assert html.count("&lt;script&gt;") == 13 + 4
    for outside in ("http", "src=", "href=", "url(", "@import", "//"):
        assert outside not in html
    assert tags.seen.count("svg") == tags.seen.count("figure") == len(FIGURES)  # the empty one is left out
    assert tags.seen.count("table") == 1 and tags.seen.count("tr") == 4 and tags.seen.count("article") == 1
    assert "prefers-color-scheme: dark" in html


def test_samples_stand_under_a_warning():
    report = Report("t")
    report.add("s", Samples([Sample("prompt", [Answer("SFT", "text")])], "scores"))
    html = page(report)
    assert "trained on" in SAMPLES_WARNING and html.index(SAMPLES_WARNING) < html.index("prompt</p>")
    assert "The numbers are scores." in html


def test_cells_by_hand():
    assert cell(0.12345, 2) == "0.12" and cell(1234, 2) == "1,234" and cell(None, 2) == cell(float("nan"), 2) == ""
    assert cell(Estimate(0.5, 0.05, 0.4, 0.6), 1) == "0.5 (0.4 to 0.6)" and cell(True, 1) == "yes"


def test_status_words_are_coloured():
    html = page(everything())
    assert 'class="words pass">pass<' in html and 'class="words fail">fail<' in html and 'class="words warn">warn<' in html


def test_a_long_table_can_be_folded():
    report = Report("t")
    report.add("s", Table("Long", ["a"], [[1], [2]], folded=True))
    assert "<details><summary>Long, 2 rows</summary><div" in page(report) and "<h3>" not in page(report)


def test_a_row_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="row 1 has 1 cells for 2 columns"):
        Table("t", ["a", "b"], [[1, 2], [1]])


def test_json_holds_every_figure_and_table(tmp_path):
    path = everything().write(tmp_path / "new")
    assert path.name == "report.html" and sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json"]
    data = json.loads((path.parent / "report.json").read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert data["seed"] == 3 and data["accuracy"] is None and data["title"] == EVIL
    figures, table, samples = (section["blocks"] for section in data["sections"])
    assert [b["kind"] for b in figures] == ["plot", "plot", "plot", "plot", "bars", "plot"]
    assert figures[0]["series"][1] == {
        "name": "b",
        "x": [0, 10],
        "y": [2.0, None],
        "low": None,
        "high": None,
        "kind": "dashed",
        "hints": None,
        "like": None,
        "labels": None,
    }
    assert table[2]["rows"][1] == ["KL", "fail", {"mean": 0.5, "error": 0.05, "low": 0.4, "high": 0.6}, None]
    assert samples[0]["samples"][0]["answers"][1] == {"name": "SFT", "text": " fine.", "number": None}


def test_plain_takes_tensors_and_broken_texts():
    assert plain({"x": torch.tensor([1.0, float("inf")]), 3: "\ud800"}) == {"x": [1.0, None], "3": "?"}


def test_visible_keeps_what_people_write():
    assert visible("a\tb\nc\u00a0d 👩\u200d🔧") == "a\tb\nc\u00a0d 👩\u200d🔧"
    assert visible("\x1b[31m\x00\u202e\ud800") == "�[31m���"
    assert as_markdown(" a|b\n<c> ") == "a&#124;b<br>&#60;c&#62;"


def test_the_report_is_made_in_no_time(tmp_path):
    report = everything()
    for i in range(50):
        report.add(f"more {i}", *FIGURES)
    begin = time.process_time()
    report.write(tmp_path)
    assert time.process_time() - begin < 10
    assert len(re.findall("<svg", (tmp_path / "report.html").read_text(encoding="utf-8"))) == 51 * len(FIGURES)


def test_the_documented_report_is_made(tmp_path, monkeypatch):
    """The last Python block of tutorials/reports.md."""
    text = (Path(__file__).parents[2] / "tutorials" / "reports.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1], {})
    html = (tmp_path / "runs" / "sweep" / "report.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 1 and ">0.000001<" in html
