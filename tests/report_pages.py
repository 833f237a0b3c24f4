"""A report with one block of every kind, and texts that try to break out."""

from lit_rlhf.functional.statistics import Estimate
from lit_rlhf.report import Answer, Bars, Plot, Report, Sample, Samples, Series, Table, Text, histogram, lines

EVIL = '<script>alert("x")</script> & <b>'
NAN = float("nan")

BAND = Plot(
    "Loss <1>",
    "step",
    "nats & bits",
    [Series("<a>", [0, 5, 10], [1.0, 0.75, 0.5], [0.9, 0.5, 0.4], [1.1, 0.8, 0.6]), Series("b", [0, 10], [2.0, NAN], kind="dashed")],
    levels={"goal": 0.25},
    note=EVIL,
)
RELIABILITY = Plot(
    "Reliability",
    "confidence",
    "share right",
    [Series("", [0.55, 0.95], [0.5, 0.9], [0.4, 0.8], [0.6, 1.0], kind="points", hints=["12 pairs", EVIL])],
    diagonal=True,
    x_range=(0.5, 1.0),
)
FIGURES = [
    BAND,
    RELIABILITY,
    Plot("Best of n", "n", "score", [Series("proxy", [1, 2, 4, 8], [0.0, 1.0, 1.5, 1.75])], x_log=True),
    histogram("Scores", "score", {"chosen": [1.0, 2.0, 2.5], "rejected": [0.0, 0.5, NAN]}, bins=5),
    Bars("By <pair>", "share", [EVIL, "b"], [0.75, 0.5], [0.5, NAN], [0.9, NAN], texts=["12", "4"], levels={"chance": 0.5}, range=(0, 1)),
]
EMPTY = lines("nothing yet", "x", "y", {"a": []})
TABLE = Table(
    "Checks",
    ["check", "status", "value", "why"],
    [["tokenizer", "pass", 1.25, EVIL], ["KL", "fail", Estimate(0.5, 0.05, 0.4, 0.6), None], [EVIL, "warn", 12345, True]],
    digits={"value": 2},
    status="status",
    note=EVIL,
)
SAMPLES = Samples([Sample(EVIL, [Answer(EVIL, EVIL + "\x1b[31m", 0.5), Answer("SFT", " fine.", None)], title=EVIL)], "gold rewards")


def everything() -> Report:
    report = Report(EVIL, EVIL, data={"seed": 3, "accuracy": NAN})
    report.add("Figures", *FIGURES, EMPTY)
    report.add(EVIL, Text(EVIL), Text(EVIL, soft=True), TABLE)
    report.add("Texts", SAMPLES)
    return report
