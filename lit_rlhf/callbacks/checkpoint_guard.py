"""CheckpointGuard: the disk is tried before the run, and a run that is stopped from outside saves before it goes."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_rlhf.checkpoint_io import probe
from lit_rlhf.checkpoints import RunRecord


class CheckpointGuard(Callback):
    """Looks after the run's ModelCheckpoints; the command line adds it wherever there is one.

    At the start it raises RuntimeError where a checkpoint could not be written (permission, space). On SIGTERM and Ctrl-C it writes
    `interrupted.ckpt`, unless a ModelCheckpoint saves on exceptions by itself; `--ckpt_path last` goes on from there.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        problem = None
        if trainer.is_global_zero and not trainer.fast_dev_run:
            try:
                for folder in folders(trainer):
                    probe(folder, checkpoint_bytes(trainer, pl_module))
            except RuntimeError as error:
                problem = str(error)
        problem = trainer.strategy.broadcast(problem)
        if problem:
            raise RuntimeError(problem)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        fitting = trainer.training or (trainer.validating and trainer.state.fn == TrainerFn.FITTING)
        if not isinstance(exception, SIGTERMException | KeyboardInterrupt) or trainer.fast_dev_run or not fitting:
            return
        callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        if not callbacks or any(getattr(c, "save_on_exception", False) for c in callbacks):
            return
        run = getattr(pl_module, "run", None)
        if trainer.strategy.reduce_boolean_decision(isinstance(run, RunRecord) and run.changing(trainer), all=False):
            rank_zero_info(f"stopped by {type(exception).__name__} within an update: not saved; --ckpt_path last goes on from before it")
            return
        path = folders(trainer)[0] / "interrupted.ckpt"
        trainer.save_checkpoint(path)
        rank_zero_info(f"stopped by {type(exception).__name__}: saved {path}; --ckpt_path last goes on from there")


def folders(trainer: Trainer) -> list[Path]:
    """Where the run's ModelCheckpoints write (local directories only)."""
    named = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    return [Path(folder) for folder in dict.fromkeys(map(str, named)) if "://" not in folder]


def checkpoint_bytes(trainer: Trainer, module: LightningModule) -> int:
    """About what a checkpoint takes: the weights that train, and two optimiser states of the same size each, as AdamW has."""
    trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    return 3 * trained
