"""The page in a real browser: no console errors, every plot and table is drawn and has a size, light and dark."""

import json
import re

import numpy as np
import pytest
from browser import needs_chromium, open_page
from PIL import Image
from report_pages import FIGURES, everything

from lit_rlhf.report import Markup
from lit_rlhf.report.style import DARK, LIGHT

pytestmark = needs_chromium
# Chromium lays the page out; this script, which is the test's and not the page's, writes down what came of it.
MEASURE = """<script>addEventListener("load", () => {
const box = e => e.getBoundingClientRect();
const all = name => [...document.querySelectorAll(name)].map(e => [box(e).width, box(e).height]);
const leaves = (a, b) => a.left < b.left - 2 || a.right > b.right + 2 || a.bottom > b.bottom + 2;
const outside = t => leaves(box(t), box(t.closest("svg")));
const out = [...document.querySelectorAll("svg text")].filter(outside).map(t => t.textContent);
const wide = document.documentElement.scrollWidth - innerWidth;
document.body.dataset.sizes = JSON.stringify({svg: all("svg"), table: all("table"), article: all("article"), out, wide});
})</script>"""


def test_a_broken_page_is_noticed(tmp_path):
    (tmp_path / "bad.html").write_text("<script>nosuchname()</script>")
    assert open_page(tmp_path / "bad.html", tmp_path / "profile", "--dump-dom")[1]


def test_no_console_errors_and_everything_is_there(tmp_path):
    path = everything().write(tmp_path / "page")
    dom, console = open_page(path, tmp_path / "profile", "--dump-dom")
    assert console == []
    assert dom.count("<svg") == len(FIGURES) and dom.count("<table") == 1 and dom.count("<article") == 1
    assert "<script" not in dom and len(re.findall(r"<polyline|<polygon|<circle", dom)) > 50


@pytest.mark.parametrize("width", [1250, 500])  # 500: the least that headless Chromium makes a window
def test_everything_has_a_size_and_stays_inside(tmp_path, width):
    report = everything()
    report.add("measured", Markup(MEASURE))
    dom, console = open_page(report.write(tmp_path), tmp_path / "profile", "--dump-dom", f"--window-size={width},2000")
    assert console == []
    found = json.loads(re.search(r'data-sizes="([^"]*)"', dom)[1].replace("&quot;", '"').replace("&lt;", "<").replace("&amp;", "&"))
    assert len(found["svg"]) == len(FIGURES) and all(w > 280 and h > 80 for w, h in found["svg"])
    assert all(w > 100 and h > 30 for w, h in found["table"] + found["article"])
    assert found["out"] == [] and found["wide"] <= 0


@pytest.mark.parametrize(("scheme", "palette"), [(1, LIGHT), (0, DARK)])
def test_light_and_dark(tmp_path, scheme, palette):
    path, shot = everything().write(tmp_path), tmp_path / "shot.png"
    flags = (f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1250,1000", f"--screenshot={shot}")
    open_page(path, tmp_path / "profile", *flags)
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    page = [int(palette["page"][i : i + 2], 16) for i in (1, 3, 5)]
    assert pixels[2, 2].tolist() == page
    darkness = pixels.reshape(-1, 3).mean(axis=1)
    assert np.ptp(darkness) > 150  # there is something to read on it
