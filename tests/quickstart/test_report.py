"""The quickstart's report: its numbers, curves and summaries are there, and escaped."""

import pytest
from torch.utils.tensorboard import SummaryWriter

from lit_rlhf.quickstart.report import curves, make_report, stage_table
from lit_rlhf.report.page import page

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


def test_every_number_and_text_is_there_and_escaped(tmp_path):
    html = page(make_report(REPORT, [SAMPLE], tmp_path))
    assert "<script" not in html and "\x1b" not in html
    assert html.count("&lt;script&gt;") == 5  # stage name, title, post, two summaries
    for text in ("1.25 (1.15 to 1.35)", ">14.5<", ">0.375<", "+1.00 ± 0.10", "10 standard errors", "87.5%", "trained on", ">100<"):
        assert text in html
    assert html.count("<tr>") == 4 + 3  # header and three stages; header and two times


def test_curves_come_from_the_logs(tmp_path):
    for stage, tag in (("sft", "train/loss"), ("reward", "val/accuracy"), ("ppo", "rollout/kl")):
        writer = SummaryWriter(tmp_path / stage / "version_0")
        for step in range(3):
            writer.add_scalar(tag, 0.5 * step, step)
        writer.close()
    report = make_report(REPORT, [SAMPLE], tmp_path)
    assert page(report).count("<svg") == 3
    found = {plot.title: plot for plot in report.sections[1].blocks}
    assert list(found["PPO: KL"].series[0].y) == [0.0, 0.5, 1.0] and found["PPO: KL"].levels == {"target": 6.0}
    assert len(curves({"sft": {}, "reward": {}, "ppo": {}}, None)) == 9


@pytest.mark.parametrize("text", ["untrained", "1.25 ± 0.05", "14.5", "0.375", "+1.00 ± 0.10", "10 standard errors", "87.5%"])
def test_stage_table_says(text):
    assert text in stage_table(REPORT)
