import sys

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rlhf.callbacks import SampleTable
from lit_rlhf.callbacks.sample_table import markdown_table, rich_table

SAMPLES = [
    {
        "prompt": "POST: a|b\n# not a heading",
        "response": " <b>[red]bold[/red]</b> *x*",
        "reference": "fine",
        "score": 1.23456,
        "kl": 0.5,
        "row": 3,
    },
    {"prompt": "POST: second", "response": "\x1b[31mred", "score": None},
]


def test_markdown_shows_punctuation_as_it_is():
    table = markdown_table(SAMPLES).splitlines()
    assert table[0] == "| prompt | response | reference | score | kl |"  # unknown keys (row) stay out
    # | is 124, # is 35, < > are 60 62, [ ] 91 93, / 47, * 42
    assert "POST: a&#124;b<br>&#35; not a heading" in table[2]
    assert "&#60;b&#62;&#91;red&#93;bold&#91;&#47;red&#93;&#60;&#47;b&#62; &#42;x&#42;" in table[2]
    assert table[2].endswith("| 1&#46;235 | 0&#46;500 |") or table[2].endswith("| 1.235 | 0.500 |")
    assert len(table) == 4 and all(line.count("|") == 6 for line in table)


def test_terminal_table_has_no_markup_and_no_control_characters():
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(rich_table(SAMPLES, title="step 5"))
    text = console.export_text()
    assert "<b>[red]bold[/red]</b> *x*" in text and "step 5" in text and "1.235" in text
    assert "\x1b" not in text and "\N{REPLACEMENT CHARACTER}[31mred" in text


def test_a_long_text_keeps_both_ends():
    console = Console(width=2000, record=True, file=open("/dev/null", "w"))
    console.print(rich_table([{"prompt": "A" * 1000 + "TL;DR:", "response": "r"}]))
    text = console.export_text()
    assert "TL;DR:" in text and text.count("A") < 450


def test_tensorboard_gets_one_table_per_validation(fit, scripted, tmp_path):
    module = scripted([1.0, 2.0])
    module.samples = SAMPLES
    fit(module, SampleTable(rows=1), epochs=2, logger=TensorBoardLogger(tmp_path, version=0))
    events = EventAccumulator(str(tmp_path / "lightning_logs/version_0"))
    events.Reload()
    tensors = events.Tensors("samples/text_summary")
    assert [event.step for event in tensors] == [1, 2]  # one optimiser step per epoch; the sanity check writes none
    assert tensors[0].tensor_proto.string_val[0].decode().count("\n") == 2  # heading, rule, one row


def test_a_terminal_gets_a_table(fit, scripted, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    module = scripted([1.0])
    module.samples = SAMPLES
    fit(module, SampleTable(), epochs=1)
    assert "POST: second" in capsys.readouterr().out


def test_rows_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        SampleTable(rows=0)
