"""measure(): the bytes of all tensors that are alive in a real fit, by phase; what `plan` is checked against."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L

import lit_rlhf.modules.sft
import lit_rlhf.rollout
from lit_rlhf.planning.tracker import Tracker


class PhaseMarker(L.Callback):
    """Tells a tracker which phase of a fit begins; counting starts with the first batch, when the networks are there."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.tracker.watch([*pl_module.parameters(), *pl_module.buffers()])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.tracker.watch([*pl_module.parameters(), *pl_module.buffers()])
        self.tracker.forget()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.tracker.begin("training")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.tracker.begin("optimizer step")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.tracker.begin("validation")


def measure(fit: Callable[[L.Callback], Any]) -> dict[str, int]:
    """The peak of live tensor bytes by phase: training, optimizer step, sampling, scoring, validation.

    Args:
        fit: runs a Trainer's fit with the callback that it gets.
    """
    tracker = Tracker()
    with (
        tracker,
        _marked(tracker, lit_rlhf.rollout, "sample", "sampling"),
        _marked(tracker, lit_rlhf.modules.iterations, "collect", "scoring"),
        _marked(tracker, lit_rlhf.modules.sft, "sample", "sampling"),
    ):
        fit(PhaseMarker(tracker))
    return tracker.peaks()


@contextmanager
def _marked(tracker: Tracker, module: Any, name: str, phase: str) -> Iterator[None]:
    """While it lasts, the peak during `module.name` is kept under `phase`."""
    function = getattr(module, name)

    def marked(*args: Any, **kwargs: Any) -> Any:
        with tracker.phase(phase):
            return function(*args, **kwargs)

    setattr(module, name, marked)
    try:
        yield
    finally:
        setattr(module, name, function)
