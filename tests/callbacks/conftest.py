"""A LightningModule without a language model: it logs a scripted metric and exports a network that writes its number."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch


class Network:
    def __init__(self, number: float, fail: bool = False) -> None:
        self.number, self.fail = number, fail

    def weights(self) -> dict[str, float]:
        return {"number": self.number}

    def save(self, directory: Path, weights: dict[str, float]) -> None:
        (Path(directory) / "config.json").write_text(json.dumps(weights))
        if self.fail:
            raise OSError(28, "No space left on device")


class Scripted(pl.LightningModule):
    """Validation number i logs `values[i]` as val/score; `names` are the subdirectories of its export."""

    def __init__(self, values: list[float], names: tuple[str, ...] = ("",)) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.values, self.names, self.validations, self.fail = list(values), names, 0, False
        self.samples: list[dict] = []

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.log("val/score", self.values[self.validations], batch_size=1)

    def on_validation_epoch_end(self):
        self.validations += not self.trainer.sanity_checking

    def predict_step(self, batch, batch_idx):
        return [{"prompt": f"p{int(x)}", "response": "größe 大"} for x in batch]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def export_networks(self):
        return {name: Network(self.validations, self.fail) for name in self.names}


@pytest.fixture
def fit(tmp_path):
    """fit(module, callback, epochs=..., **trainer) on one batch per epoch, in tmp_path."""

    def run(module: pl.LightningModule, *callbacks: pl.Callback, epochs: int = 3, logger=False, ckpt_path=None, **kwargs) -> pl.Trainer:
        trainer = pl.Trainer(
            default_root_dir=tmp_path,
            max_epochs=epochs,
            accelerator="cpu",
            logger=logger,
            callbacks=list(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            **{"enable_checkpointing": False, "num_sanity_val_steps": 1} | kwargs,
        )
        loader = torch.utils.data.DataLoader(torch.ones(1, 1))
        trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
        return trainer

    return run


@pytest.fixture
def scripted():
    return Scripted
