"""The learning curve: nested training rows from one start, people's agreement, annotators who were not trained on, and what is refused."""

import json

import numpy as np
import pytest
import torch

from lit_rlhf import learning_curve
from lit_rlhf.__main__ import main
from lit_rlhf.learning_curve import agreement_of, held_out, last_gain


@pytest.fixture
def command(tmp_path, sft_dir, pair_rows):
    """command(*more, train=..., val=...) -> arguments of a short run on the CPU."""

    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def make(*more, train=pair_rows, val=pair_rows):
        files = [f"--data.data={write('train.jsonl', train)}"] + ([f"--data.val_data={write('val.jsonl', val)}"] if val else [])
        trainer = [
            "accelerator=cpu",
            "enable_progress_bar=false",
            "max_epochs=1",
            f"default_root_dir={tmp_path}",
            "enable_model_summary=false",
        ]
        modules = ["--model=PairwiseReward", f"--model.model={sft_dir}", "--data=PairwiseDataModule", "--data.batch_size=4"]
        return [*modules, *files, *(f"--trainer.{setting}" for setting in trainer), *more]

    return make


@pytest.fixture
def runs(monkeypatch):
    """The training rows and the weights at the start of every run."""
    seen = []
    train = learning_curve.TrainOn

    class Spy(train):
        def on_train_start(self, trainer, pl_module):
            table = trainer.datamodule.tables["train"]
            prompts = [row["prompt"] for row in table.fetch(range(len(table)))]
            seen.append((prompts, torch.cat([p.detach().flatten().clone() for p in pl_module.parameters()])))

    monkeypatch.setattr(learning_curve, "TrainOn", Spy)
    return seen


def read(path):
    return json.loads((path / "report.json").read_text(encoding="utf-8"))


def test_sizes_are_nested_and_start_alike(command, runs, tmp_path, pair_rows):
    assert main(["learning-curve", *command(), "--sizes", "4", "16", "8"]) == 0
    (first, start), (second, same), (third, last) = runs
    assert [len(first), len(second), len(third)] == [4, 8, 16]
    assert set(first) < set(second) < set(third) == {row["prompt"] for row in pair_rows}
    assert torch.equal(start, same) and torch.equal(start, last)
    found = read(tmp_path / "learning_curve")
    assert found["sizes"] == found["pairs"] == [4, 8, 16]
    (curve,) = found["accuracy"].values()
    assert all(0 <= e["low"] <= e["mean"] <= e["high"] <= 1 for e in curve)
    assert found["last_gain"]["mean"] == pytest.approx(curve[2]["mean"] - curve[1]["mean"])
    html = (tmp_path / "learning_curve" / "report.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 1 and "labelled twice" in html and "--hold_out_workers 0.2" in html


def test_what_is_done_is_not_trained_again(command, runs, tmp_path, pair_rows):
    assert main(["learning-curve", *command(), "--sizes", "4", "8"]) == 0
    before = read(tmp_path / "learning_curve")["accuracy"]
    assert main(["learning-curve", *command(), "--sizes", "4", "8", "16"]) == 0
    assert [len(prompts) for prompts, _ in runs] == [4, 8, 16]  # the second call trained the new size alone
    (old,), (new,) = before.values(), read(tmp_path / "learning_curve")["accuracy"].values()
    assert new[:2] == old
    assert main(["learning-curve", *command(train=pair_rows[::-1]), "--sizes", "4", "8"]) == 0  # other rows: nothing is reused
    assert main(["learning-curve", *command("--model.optimizer=AdamW", "--model.optimizer.lr=0.1"), "--sizes", "4", "8"]) == 0
    assert [len(prompts) for prompts, _ in runs[3:]] == [4, 8, 4, 8]


def test_default_sizes_halve_down_to_a_batch(command, runs, tmp_path):
    assert main(["learning-curve", *command(), "--out", str(tmp_path / "here")]) == 0
    assert read(tmp_path / "here")["sizes"] == [4, 8, 16]


def test_held_out_annotators_are_not_trained_on(command, runs, tmp_path, pair_rows):
    assert main(["learning-curve", *command(), "--sizes", "4", "8", "--hold_out_workers", "0.4"]) == 0
    found = read(tmp_path / "learning_curve")
    (left_out,) = found["held_out_workers"]
    allowed = {row["prompt"] for row in pair_rows if row["worker"] != left_out}
    assert set(runs[1][0]) == allowed
    assert list(found["accuracy"]) == ["all validation pairs", "annotators not trained on", "annotators trained on"]
    everyone, new, old = (curve[1]["mean"] for curve in found["accuracy"].values())
    assert everyone == pytest.approx((new + old) / 2)  # eight pairs of each


def test_agreement_of_a_table(command, pair_rows, monkeypatch):
    # The first two rows three times more: once agreeing, once the other way round, once as a tie.
    def turned(row):
        return row | {"chosen": row["rejected"], "rejected": row["chosen"]}

    rows = [*pair_rows, pair_rows[0], turned(pair_rows[1]), pair_rows[0] | {"target": 0.5}, pair_rows[1] | {"target": 0.0}]
    built = learning_curve.build(command(val=rows))
    labels = learning_curve.read_labels(built)
    # item 0: two labels that agree, the tie left out: 1 of 1; item 1: one for, two against (turned; target 0): 1 of 3
    assert labels.agreement.mean == pytest.approx(2 / 4)
    assert agreement_of(built.datamodule.tables["train"]) is None
    assert labels.workers == ["a", "b"] * 8


def test_held_out_by_hand():
    assert held_out(["a", "b", None, "c"], 0.0) == set()
    assert len(held_out(["a", "b", None, "c", "d", "a"], 0.5)) == 2 and held_out(["a", "b"], 0.99) < {"a", "b"}
    assert held_out([1, 2, 3, 4], 0.25) == held_out([4, 3, 2, 1], 0.25)
    with pytest.raises(ValueError, match="1 annotators in a column 'worker'; it takes two"):
        held_out(["a", None], 0.5)


def test_the_last_gain_is_paired():
    class Scored:
        groups = torch.arange(4)

        def __init__(self, margins):
            self.margins = torch.tensor(margins)

    points = [learning_curve.Point(1, 1, Scored(m), 0.0) for m in ([1.0, -1, 1, -1], [1.0, 1, 1, -1])]
    found = last_gain(points)
    # differences 0, 1, 0, 0: mean .25, variance .25, over 4: error .25
    assert found.mean == 0.25 and found.error == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--sizes", "16"], "sizes .* make no curve"),
        (["--sizes", "4", "17"], "of 16 training rows"),
        (["--hold_out_workers", "1"], "below 1"),
        (["--model.no_such=1"], "no such key"),
    ],
)
def test_what_is_refused(command, capsys, more, said):
    import re

    assert main(["learning-curve", *command(), *more]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("lit-rlhf: error: ") and re.search(said, line), line


def test_other_stages_and_no_validation_are_refused(command, capsys, sft_dir):
    assert main(["learning-curve", "--model=SFT", f"--model.model={sft_dir}", "--data=SFTDataModule", "--data.data=x.jsonl"]) == 2
    assert "not of SFT" in capsys.readouterr().err
    assert main(["learning-curve", *command(val=None)]) == 2
    assert "--data.val_fraction 0.1" in capsys.readouterr().err


def test_rows_are_taken_once():
    callback = learning_curve.TrainOn(np.array([0]))

    class Table:
        def take(self, rows):
            return ("taken", rows.tolist())

    class Trainer:
        datamodule = type("Data", (), {"tables": {"train": Table()}})

    callback.setup(Trainer, None, "validate")
    assert isinstance(Trainer.datamodule.tables["train"], Table)
    callback.setup(Trainer, None, "fit")
    assert Trainer.datamodule.tables["train"] == ("taken", [0])
