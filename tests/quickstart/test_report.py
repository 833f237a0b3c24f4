"""The report: charts by hand, escaping, and that it needs nothing but itself."""

import re

import pytest

from lit_rlhf.quickstart.chart import Chart, smoothed, svg, ticks
from lit_rlhf.quickstart.report import page, stage_table

EVIL = '<script>alert("x")</script> & <b>'
STAGE = {"gold": 1.25, "gold_stderr": 0.05, "score": 0.5, "kl": 2.0, "length": 14.5, "rouge1": 0.4, "rouge2": 0.25, "rougeL": 0.375}
REPORT = {
    "seed": 3,
    "posts": 256,
    "stages": [{"name": name, **STAGE} for name in ("untrained", "SFT", EVIL)],
    "people": {"gold": 2.5},
    "ppo_minus_sft": {"gold": 1.0, "gold_stderr": 0.1, "standard_errors": 10.0},
    "reward_accuracy": 0.875,
    "kl_target": 6.0,
    "seconds": {"sft": 61.2, "total": 99.6},
}
SAMPLE = {
    "prompt": f"SUBREDDIT: r/x\n\nTITLE: {EVIL}\n\nPOST: {EVIL}\n\nTL;DR:",
    "summaries": {"a person": (EVIL, 1.0), "SFT": (EVIL + "\x1b[31m", 0.5), "PPO": (" fine.", 2.25)},
}
CHART = Chart("Loss <1>", "step", "nats & bits", {"<a>": [(0, 1.0), (10, 0.5)], "b": [(0, 2.0), (10, float("nan"))]}, level=("goal", 0.25))


def test_ticks_by_hand():
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.13, 0.52, 4) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]  # step 0.1 is the first of 0.1, 0.2, 0.5 with at most 4 steps in 0.39
    assert ticks(-1.5, 3, 4) == [-2, 0, 2, 4]
    assert ticks(5, 5, 4)[0] <= 5 < ticks(5, 5, 4)[-1]  # a flat line still gets an axis


def test_smoothed_by_hand():
    assert smoothed([(0, 1.0), (1, 3.0), (2, 8.0)], 2) == [(0, 1.0), (1, 2.0), (2, 5.5)]


def test_chart_is_labelled_and_escaped():
    drawn = svg(CHART)
    for text in ("Loss &lt;1&gt;", "step", "nats &amp; bits", "&lt;a&gt;", "goal"):
        assert f">{text}<" in drawn
    assert drawn.count("<polyline") == 2 and "nan" not in drawn
    assert svg(Chart("empty", "x", "y", {"a": []})) == ""


def test_chart_places_points_by_hand():
    # plot area x 46..348, y 26..182; x 0..10, y ticks 0..1: (0, 0) lower left, (10, 1) upper right, (5, 0.5) the middle
    drawn = svg(Chart("t", "x", "y", {"a": [(0, 0.0), (5, 0.5), (10, 1.0)]}))
    assert 'points="46.0,182.0 197.0,104.0 348.0,26.0"' in drawn


def test_page_escapes_every_text_and_loads_nothing():
    html = page(REPORT, [SAMPLE], [svg(CHART)])
    assert "<script" not in html and "<b> " not in html and "\x1b" not in html
    assert html.count("&lt;script&gt;") == 5  # stage name, title, post, two summaries
    for outside in ("http", "src=", "href=", "url(", "@import", "//"):
        assert outside not in html
    assert html.count("<svg") == html.count("</svg>") == 1
    assert len(re.findall(r"<tr>", html)) == 4 + 2  # header and three stages; two times
    assert "prefers-color-scheme: dark" in html


@pytest.mark.parametrize("text", ["untrained", "1.25 ± 0.05", "14.5", "0.375", "+1.00 ± 0.10", "10 standard errors", "87.5%"])
def test_stage_table_says(text):
    assert text in stage_table(REPORT)
