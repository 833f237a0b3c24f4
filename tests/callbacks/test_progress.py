import sys

import lightning.pytorch as pl
import torch

from lit_rlhf.callbacks import LeanProgressBar, progress


class Logs(pl.LightningModule):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names, self.layer = names, torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        self.log_dict(dict.fromkeys(self.names, 0.123456), prog_bar=True)
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def shown(tmp_path, names: list[str]) -> dict:
    bar, module = LeanProgressBar(), Logs(names)
    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_steps=2, accelerator="cpu", callbacks=[bar], enable_model_summary=False, enable_checkpointing=False
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(4, 1)))
    return bar.get_metrics(trainer, module)


def test_the_numbers_that_matter(tmp_path):
    names = ["rollout/value", "rollout/kl", "rollout/score", "val/score", "val/accuracy"]
    assert shown(tmp_path, names) == {"rollout/score": "0.1235", "rollout/kl": "0.1235", "val/accuracy": "0.1235"}


def test_a_module_of_ones_own_keeps_its_choice(tmp_path):
    assert list(shown(tmp_path, ["mine"])) == ["mine"]  # and no version number


def test_a_log_file_gets_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    shown(tmp_path, ["train/loss"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch")]
    assert lines == ["epoch 0  step 1/2  train/loss 0.1235", "epoch 0  step 2/2  train/loss 0.1235"]
