"""The loaders under a real Trainer, with a module that only writes down what it is given."""

import itertools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlhf.data import PairwiseDataModule, PromptDataModule, SFTDataModule

ROWS = [{"prompt": f"{i:02}" + "x" * (i % 5), "label": "y" * (1 + i % 7)} for i in range(20)]


class Recorder(L.LightningModule):
    context_length = None

    def __init__(self, tokenizer, steps_per_iteration=3):
        super().__init__()
        self.tokenizer, self.steps_per_iteration = tokenizer, steps_per_iteration
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_rows, self.val_rows, self.counts, self.epochs = [], [], [], []

    def training_step(self, batch, index):
        self.epochs.append(self.current_epoch)
        self.train_rows.append(batch if isinstance(batch, int) else batch.columns["prompt"])
        self.counts.append(None if isinstance(batch, int) else batch.count)
        return self.weight * 1.0

    def validation_step(self, batch, index):
        self.val_rows.append(batch.columns["prompt"])
        self.log("val/x", 1.0, batch_size=batch.num_prompts)

    test_step = validation_step

    def predict_step(self, batch, index):
        return batch.columns["prompt"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(path, **kwargs):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
    return L.Trainer(accelerator="cpu", devices=1, default_root_dir=path, **(quiet | kwargs))


def fit(path, tokenizer, ckpt_path=None, data=None, batch_size=8, **kwargs):
    module = Recorder(tokenizer)
    run = trainer(path, **kwargs)
    run.fit(module, data or SFTDataModule(ROWS, val_data=ROWS[:5], batch_size=batch_size, val_batch_size=2), ckpt_path=ckpt_path)
    return module, run


def flat(lists):
    return list(itertools.chain(*lists))


def test_epochs(chars, tmp_path):
    module, run = fit(tmp_path, chars, max_epochs=3)
    assert run.global_step == 9
    assert [len(rows) for rows in module.train_rows] == [8, 8, 4] * 3
    for epoch in range(3):
        assert sorted(flat(module.train_rows[3 * epoch : 3 * epoch + 3])) == sorted(row["prompt"] for row in ROWS)
    assert module.train_rows[:3] != module.train_rows[3:6] != module.train_rows[6:]
    sanity, epoch = module.val_rows[:2], module.val_rows[2:5]
    assert epoch[:2] == sanity
    assert flat(epoch) == [row["prompt"] for row in ROWS[:5]]


def test_accumulation_changes_no_step(chars, tmp_path):
    one, _ = fit(tmp_path, chars, max_epochs=2)
    two, run = fit(tmp_path, chars, max_epochs=2, accumulate_grad_batches=4)
    assert run.global_step == 6
    steps = [sorted(flat(two.train_rows[i : i + 4])) for i in range(0, 24, 4)]
    assert steps == [sorted(rows) for rows in one.train_rows]
    assert two.counts == [count for count in one.counts for _ in range(4)]


def test_limits(chars, tmp_path):
    module, run = fit(tmp_path, chars, max_epochs=2, limit_train_batches=2, limit_val_batches=1, num_sanity_val_steps=0)
    assert (run.global_step, len(module.train_rows), len(module.val_rows)) == (4, 4, 2)
    assert module.train_rows[:2] != module.train_rows[2:]  # each epoch begins anew, in another order
    module, _ = fit(tmp_path, chars, max_epochs=1, limit_train_batches=0.7)
    assert len(module.train_rows) == 2
    module, _ = fit(tmp_path, chars, fast_dev_run=True)
    assert (len(module.train_rows), len(module.val_rows)) == (1, 1)
    module, _ = fit(tmp_path, chars, max_epochs=2, limit_val_batches=0)
    assert module.val_rows == []


def test_overfit_batches(chars, tmp_path):
    module, _ = fit(tmp_path, chars, max_epochs=3, overfit_batches=2)
    assert module.train_rows[:2] == module.train_rows[2:4] == module.train_rows[4:]


def test_reloading_goes_on_with_the_epochs(chars, tmp_path):
    plain, _ = fit(tmp_path, chars, max_epochs=3)
    reloaded, _ = fit(tmp_path, chars, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert reloaded.train_rows == plain.train_rows


@pytest.mark.parametrize("extra", [{}, {"accumulate_grad_batches": 2}, {"limit_train_batches": 2}])
def test_resume_gives_the_rows_that_were_to_come(chars, tmp_path, extra):
    whole, _ = fit(tmp_path, chars, max_steps=8, max_epochs=-1, **extra)
    every = extra.get("accumulate_grad_batches", 1)
    keep = ModelCheckpoint(tmp_path / "all", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(tmp_path, chars, max_steps=8, max_epochs=-1, callbacks=[keep], enable_checkpointing=True, **extra)
    for step in range(1, 8):
        resumed, _ = fit(tmp_path, chars, str(tmp_path / "all" / f"step={step}.ckpt"), max_steps=8, max_epochs=-1, **extra)
        assert resumed.train_rows == whole.train_rows[step * every :], step
        assert resumed.counts == whole.counts[step * every :]


def test_resume_with_another_batch_size_is_refused(chars, tmp_path):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="one")
    fit(tmp_path, chars, max_steps=1, max_epochs=-1, callbacks=[keep], enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"from the middle of epoch 0 \(batch 1\), and batch_size was 8 and is 5"):
        fit(tmp_path, chars, str(tmp_path / "one.ckpt"), batch_size=5, max_steps=2, max_epochs=-1)


def test_pairs(chars, tmp_path):
    rows = [{"prompt": row["prompt"], "chosen": "a", "rejected": "b"} for row in ROWS]
    module, _ = fit(tmp_path, chars, max_epochs=1, data=PairwiseDataModule(rows, val_fraction=0.2, batch_size=4))
    assert module.counts == [4.0] * 4
    assert [len(rows) for rows in module.val_rows] == [4, 4]  # the sanity check, and the epoch


def test_validate_test_and_predict(chars, tmp_path):
    module, run = Recorder(chars), trainer(tmp_path)
    data = SFTDataModule(ROWS, val_data=ROWS[:5], test_data=ROWS[5:8], batch_size=2)
    run.validate(module, data, verbose=False)
    assert flat(module.val_rows) == [row["prompt"] for row in ROWS[:5]]
    module.val_rows.clear()
    run.test(module, data, verbose=False)
    assert flat(module.val_rows) == [row["prompt"] for row in ROWS[5:8]]
    assert flat(run.predict(module, data)) == [row["prompt"] for row in ROWS[5:8]]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_prompts_count_steps(chars, tmp_path, accumulate):
    data = PromptDataModule(ROWS, val_data=ROWS[:3])
    module, run = fit(tmp_path, chars, max_steps=7, max_epochs=-1, accumulate_grad_batches=accumulate, data=data)
    assert run.global_step == 7
    one_epoch = list(range(3 * accumulate))
    assert module.train_rows == (one_epoch * 3)[: 7 * accumulate]
    assert flat(module.val_rows[:1]) == [row["prompt"] for row in ROWS[:3]]


def test_prompts_resume_in_the_middle_of_an_iteration(chars, tmp_path):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    fit(tmp_path, chars, max_steps=4, max_epochs=-1, data=PromptDataModule(ROWS), callbacks=[keep], enable_checkpointing=True)
    module, _ = fit(tmp_path, chars, str(tmp_path / "step=2.ckpt"), max_steps=6, max_epochs=-1, data=PromptDataModule(ROWS))
    assert module.train_rows == [2, 0, 1, 2]


def test_what_was_read_is_logged(chars, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    fit(tmp_path, chars, max_steps=1, max_epochs=-1, logger=logger, data=SFTDataModule(ROWS, val_data=ROWS[:5], min_words=1))
    logged = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    first = dict(zip(logged[0].split(","), logged[1].split(","), strict=True))
    assert (first["data/train/rows"], first["data/train/prompt_tokens/max"], first["data/shared_prompts/train+val"]) == (
        "20.0",
        "6.0",
        "5.0",
    )
