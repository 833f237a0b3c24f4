"""The command line: LightningCLI in subclass mode, with one-line errors, a predictions file and exit code 143 on SIGTERM.

    lit-rlhf fit|validate|test|predict --config FILE [--config OVERLAY ...] [--model.kl_coef 0.1 ...] [--debug]

Exit codes: 0 done, 1 failed while running, 2 refused before anything was loaded, 143 stopped by SIGTERM. `lit-rlhf quickstart` drives this
command line, so `__main__.py` starts it.
"""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers.utils.logging import disable_progress_bar

import lit_rlhf.callbacks
import lit_rlhf.data
import lit_rlhf.modules  # with the other two: YAML may then say `class_path: PPO` without a path
from lit_rlhf.callbacks import CheckpointGuard, JSONLWriter, LeanProgressBar, RewardReport, Throughput
from lit_rlhf.checkpoint_io import AtomicCheckpointIO, newest
from lit_rlhf.cli_errors import one_line, parameter_names
from lit_rlhf.generation import Sampling
from lit_rlhf.modules import PairwiseReward
from lit_rlhf.optim import Schedule
from lit_rlhf.strategies import refuse_strategy

PACKAGE = Path(__file__).parent
SIGTERM_EXIT = 143  # 128 + 15: a scheduler must not take a stopped run for a finished one, as Lightning's exit code 0 says
APART = {  # the commands that are no run of the Trainer: name, module with their `main`, what they do
    "quickstart": ("lit_rlhf.quickstart.run", "runs all stages on a small made-up world"),
    "plan": ("lit_rlhf.planning.run", "says before a run what memory and hours it takes"),
    "doctor": ("lit_rlhf.doctor.run", "finds which stage is broken"),
    "inspect": ("lit_rlhf.inspector.run", "shows one response token by token"),
    "learning-curve": ("lit_rlhf.learning_curve", "says whether more labels would help a reward model"),
    "frontier": ("lit_rlhf.frontier.run", "measures what PPO bought for its KL"),
    "winrate": ("lit_rlhf.winrate.run", "compares two files of responses"),
    "iterate": ("lit_rlhf.iterate.run", "samples, labels, refits the reward model and runs PPO, round after round"),
    "ai-feedback": ("lit_rlhf.ai_feedback.run", "has a language model label pairs or revise responses"),
    "consolidate": ("lit_rlhf.consolidate", "makes one file of a sharded checkpoint"),
}
DESCRIPTION = (
    f"Learning from human feedback. {'; '.join(f'`lit-rlhf {name}` {what}' for name, (_, what) in APART.items())}. The commands below take "
    "YAML files (--config, repeated for overlays) and any key of them as an option. --debug (or LIT_RLHF_DEBUG=1) shows tracebacks."
)


def config_dir() -> Path:
    """The folder with the shipped YAML files: configs/ of a checkout, or the copy inside an installed package."""
    return next((folder for folder in (PACKAGE.parent / "configs", PACKAGE / "_configs") if folder.is_dir()), PACKAGE / "_configs")


class Refused(Exception):
    """A configuration that cannot run, with the one line that says why."""


class Parser(LightningArgumentParser):
    """LightningArgumentParser that takes no abbreviated keys and raises its errors instead of printing its usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise Refused(message) from ex


class CLI(LightningCLI):
    """LightningCLI whose command line and YAML always win, and whose `predict` always leaves a file."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)  # without the warning that both `args` and sys.argv are there

    def _parse_ckpt_path(self) -> None:
        """Does nothing, where Lightning puts the checkpoint's values over the user's (a private name, pinned by a test)."""

    def before_instantiate_classes(self) -> None:
        """Refuses strategies by name, before Lightning asks for their packages."""
        refuse_strategy(self._get(self.config, "trainer", default={}).get("strategy"))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds, unless the user gives one of its kind: progress bar, Throughput for `fit`, JSONLWriter for `predict`, RewardReport
        for `validate` and `test` of a PairwiseReward, checkpoints that are whole or absent."""
        given = self._get(self.config_init, "trainer")
        callbacks = given["callbacks"] or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        if given["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(LeanProgressBar())
        if self.subcommand == "predict" and not any(isinstance(c, JSONLWriter) for c in callbacks):
            callbacks.append(JSONLWriter())
        if self.subcommand == "fit" and not any(isinstance(c, Throughput) for c in callbacks):
            callbacks.insert(0, Throughput())  # whose phases end before another callback does something at the end of a batch
        judged = isinstance(self.model, PairwiseReward) and self.subcommand in ("validate", "test")
        if judged and not any(isinstance(c, RewardReport) for c in callbacks):
            callbacks.append(RewardReport())
        saves = given["enable_checkpointing"] is not False and self.subcommand == "fit"
        if saves and not any(isinstance(c, CheckpointGuard) for c in callbacks):
            callbacks.append(CheckpointGuard())
        plugins = given["plugins"] or []
        plugins = list(plugins) if isinstance(plugins, list) else [plugins]
        if not any(isinstance(p, CheckpointIO) for p in plugins):
            plugins.append(AtomicCheckpointIO())
        return super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        """Leaves the run to `main`, which reports errors of setting up and of running differently."""

    def run(self) -> None:
        """Runs the subcommand that was parsed; `--ckpt_path last` takes the newest checkpoint of the run that can be read."""
        config = self.config_init[str(self.subcommand)]
        if config.get("ckpt_path") == "last":
            config["ckpt_path"] = self.last_checkpoint()
        super()._run_subcommand(str(self.subcommand))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # or the rank that holds the store could be gone while another still asks it
            torch.distributed.destroy_process_group()

    def last_checkpoint(self) -> str | None:
        """The newest readable checkpoint in the folders of the ModelCheckpoints, or below default_root_dir where those name none."""
        named = [c.dirpath for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        folders = [Path(folder or self.trainer.default_root_dir) for folder in named] or [Path(self.trainer.default_root_dir)]
        found = newest((folder for folder in folders if folder.is_dir()), whole=self.subcommand == "fit")
        if found is None:
            rank_zero_info(f"--ckpt_path last: no checkpoint in {', '.join(map(str, folders))} yet, so the run starts from the beginning")
        return str(found) if found else None


def build(args: Sequence[str], cli_class: type[CLI] = CLI) -> CLI:
    """Parses `args` and makes Trainer, module and DataModule without running anything; raises Refused or the constructors' errors."""
    return cli_class(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},  # a requeued job starts in the same log directory
        parser_class=Parser,
        parser_kwargs={"description": DESCRIPTION, "prog": "lit-rlhf"},
        auto_configure_optimizers=False,  # optimisers are arguments of the modules
        args=list(args),
    )


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line `args` (sys.argv[1:] if None) and returns its exit code; a traceback only with --debug."""
    args = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in args or os.environ.get("LIT_RLHF_DEBUG", "0") not in ("", "0")
    args = [arg for arg in args if arg != "--debug"]
    quiet()
    try:
        cli = build(args)
    except Exception as error:
        names = parameter_names(Trainer, Sampling, Schedule, lit_rlhf.modules, lit_rlhf.data, lit_rlhf.callbacks)
        return report(one_line(error, args, names), error, debug, code=2)
    try:
        cli.run()
    except SIGTERMException:
        return SIGTERM_EXIT
    except Exception as error:
        if not (raised_here(error) or isinstance(error, MisconfigurationException)):
            raise
        return report(one_line(error), error, debug, code=1)
    return SIGTERM_EXIT if cli.trainer.received_sigterm else 0


def quiet() -> None:
    """Leaves out what a user can do nothing about: advertisements, warnings from inside Lightning, bars in log files."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    ours = r"It is recommended to use `self.log\('(val|test)/.*sync_dist"  # our metrics are joined over ranks before they are logged
    warnings.filterwarnings("ignore", message=ours)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        disable_progress_bar()


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "💡" not in record.getMessage()


def report(line: str, error: BaseException, debug: bool, code: int) -> int:
    """Prints the traceback (debug) and the one line to stderr; returns `code`."""
    if debug:
        traceback.print_exception(error)
    sys.stderr.write(f"lit-rlhf: error: {line}\n")
    return code


def raised_here(error: BaseException) -> bool:
    """Whether a `raise` statement of lit_rlhf raised `error`, so that its message was written for the user."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and PACKAGE in Path(frames[-1].filename).parents and (frames[-1].line or "").startswith("raise")
