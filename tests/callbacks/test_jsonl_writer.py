import json

import lightning.pytorch as pl
import pytest
import torch

from lit_rlhf.batch import Batch
from lit_rlhf.callbacks import JSONLWriter


def predict(module, batches, tmp_path, *callbacks, **kwargs):
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    trainer.predict(module, batches, return_predictions=False)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines_in_the_order_of_the_batches(scripted, tmp_path):
    predict(scripted([]), torch.utils.data.DataLoader(torch.arange(5.0), batch_size=2), tmp_path, JSONLWriter())
    written = lines(tmp_path / "predictions.jsonl")
    assert [line["prompt"] for line in written] == ["p0", "p1", "p2", "p3", "p4"]
    assert "größe 大" in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")  # readable, not \\u escapes


def test_the_rows_give_the_order_of_the_data_set(scripted, tmp_path):
    class Rows(scripted):
        def predict_step(self, batch, batch_idx):
            return [{"prompt": p, "score": torch.tensor(0.5)} for p in batch.columns["prompt"]]

    # Two batches whose rows are out of order, as a loader that balances tokens hands them out.
    batches = [
        Batch.of([[1], [1]], columns={"prompt": ["d", "a"]}, rows=[3, 0]),
        Batch.of([[1], [1]], columns={"prompt": ["c", "b"]}, rows=[2, 1]),
    ]
    path = tmp_path / "new/folder/out.jsonl"
    predict(Rows([]), torch.utils.data.DataLoader(batches, batch_size=None), tmp_path, JSONLWriter(str(path)))
    assert lines(path) == [{"prompt": p, "score": 0.5} for p in "abcd"]


def test_two_responses_of_a_prompt_stand_together(scripted, tmp_path):
    class Scores(scripted):
        def predict_step(self, batch, batch_idx):
            return [{"response": r} for r in ("b1", "b2", "a1", "a2")]

    batch = Batch.of([[1], [1]], [[2], [3], [4], [5]], prompt_of=[0, 0, 1, 1], columns={"prompt": ["b", "a"]}, rows=[1, 0])
    predict(Scores([]), torch.utils.data.DataLoader([batch], batch_size=None), tmp_path, JSONLWriter())
    assert [line["response"] for line in lines(tmp_path / "predictions.jsonl")] == ["a1", "a2", "b1", "b2"]


def test_two_ranks_write_one_file(tmp_path):
    batches = [Batch.of([[1]], columns={"prompt": [f"p{row}"]}, rows=[row]) for row in (4, 1, 3, 0, 2, 5)]
    loader = torch.utils.data.DataLoader(batches, batch_size=1, collate_fn=lambda rows: rows[0])
    predict(Named(), loader, tmp_path, JSONLWriter(), devices=2, strategy="ddp_fork")
    # rank 0 has the rows 4, 3, 2 and rank 1 the rows 1, 0, 5
    assert [line["prompt"] for line in lines(tmp_path / "predictions.jsonl")] == ["p0", "p1", "p2", "p3", "p4", "p5"]


class Named(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def predict_step(self, batch, batch_idx):
        return [{"prompt": p} for p in batch.columns["prompt"]]


def test_what_json_cannot_hold_is_named(scripted, tmp_path):
    class Odd(scripted):
        def predict_step(self, batch, batch_idx):
            return [{"x": object()}]

    with pytest.raises(TypeError, match="a prediction holds a object"):
        predict(Odd([]), torch.utils.data.DataLoader(torch.arange(1.0)), tmp_path, JSONLWriter())
