"""Iterations: for modules that sample, learn from that for some optimiser steps, and sample again; each is one Lightning epoch.

As in PPO the counters here say where a run stands, never Lightning's, and a checkpoint in mid-iteration holds what the rest of it learns
from.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lit_rlhf.batch import Batch, Experience
from lit_rlhf.checkpoints import load, save
from lit_rlhf.data.loader import permutation, run_seed, split_by_tokens
from lit_rlhf.generation import Sampling
from lit_rlhf.modules.ppo_state import Journal
from lit_rlhf.rollout import agree
from lit_rlhf.scoring import check_reward_fn
from lit_rlhf.sharding import shards
from lit_rlhf.strategies import check_strategy

KEY = "iterations"


class Iterations:
    """Where a run stands: the iteration's number, the micro-batch within it, and the data that it learns from (on the CPU, of all ranks).

    Args:
        epochs, minibatches: passes over the data in an iteration, and optimiser steps per pass.
    """

    def __init__(self, epochs: int, minibatches: int) -> None:
        for name, number in (("epochs", epochs), ("minibatches", minibatches)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.epochs, self.minibatches = epochs, minibatches
        self.number, self.position, self.step_position = 0, 0, 0
        self.data: Batch | Experience | None = None
        self.journal = Journal()

    @property
    def steps(self) -> int:
        """Optimiser steps an iteration."""
        return self.epochs * self.minibatches

    def begin(self, module: Any, batch_idx: int) -> bool:
        """A micro-batch starts (call it first in `on_train_batch_start`); whether `data` is used up, so that the module must `fill` it."""
        micro = module.run.begin(module.trainer, batch_idx)
        if self.position >= self.steps * module.trainer.accumulate_grad_batches:
            self.number, self.position, self.data = self.number + 1, 0, None
        self.step_position = self.position if micro == 0 else self.step_position
        self.journal.replay(module)
        return self.data is None

    def fill(self, module: Any, data: Batch | Experience, stats: dict[str, Tensor]) -> None:
        """What the iteration learns from, and what is logged of how it was made, as rollout/…

        Raises ValueError where the data's prompts cannot be split into the iteration's micro-batches.
        """
        prompts = batch_of(data).num_prompts
        parts = self.minibatches * module.trainer.accumulate_grad_batches * module.trainer.world_size
        if prompts < parts:
            raise ValueError(
                f"iteration {self.number}: {prompts} prompts to learn from cannot be split into minibatches {self.minibatches} x "
                f"accumulate_grad_batches {module.trainer.accumulate_grad_batches} x {module.trainer.world_size} ranks; sample for more "
                "prompts, or keep more of the responses"
            )
        self.data, self.journal.entries = data, []
        self.journal.add(module, {f"rollout/{name}": value for name, value in stats.items()})

    def micro_batch(self, module: Any) -> tuple[Any, int]:
        """This rank's part of the next micro-batch on its device, and the response tokens of its whole optimiser step.

        The prompts' order is a function of (seed, iteration, epoch); the responses of a prompt stay together.
        """
        trainer, batch = module.trainer, batch_of(self.data)
        step, micro = divmod(self.position, trainer.accumulate_grad_batches)
        epoch, minibatch = divmod(step, self.minibatches)
        order, total = permutation(batch.num_prompts, run_seed(), self.number, epoch).tolist(), batch.num_prompts
        prompts = order[minibatch * total // self.minibatches : (minibatch + 1) * total // self.minibatches]
        lengths = batch.response_mask.sum(1)
        tokens = lengths.new_zeros(total).index_add(0, batch.prompt_of, lengths)
        parts = split_by_tokens((batch.prompt_mask.sum(1) + tokens)[prompts].tolist(), trainer.accumulate_grad_batches * trainer.world_size)
        mine = {prompts[i] for i in parts[micro * trainer.world_size + module.global_rank]}
        rows = [n for n, m in enumerate(batch.prompt_of.tolist()) if m in mine]
        self.position += 1
        return self.data.select(rows).to(module.device), int(tokens[prompts].sum())

    def log(self, module: Any, stats: dict[str, Tensor]) -> None:
        """An update's numbers; call it in `on_before_optimizer_step`. After the last update the loggers get the iteration's means."""
        self.journal.add(module, stats)
        if self.position == self.steps * module.trainer.accumulate_grad_batches:
            self.journal.write(module.trainer)

    def begin_anew(self, module: Any) -> None:
        """For `on_train_start`: a fit that does not go on from a checkpoint begins by sampling, whatever an earlier one left half done."""
        if module.run.resumed is None and (self.position or self.data is not None):
            self.number, self.position, self.data = self.number + 1, 0, None

    # Checkpoints

    def save(self, module: Any, checkpoint: dict[str, Any]) -> None:
        """For `on_save_checkpoint`, instead of `checkpoints.save`."""
        save(module, checkpoint)
        updates = (self.step_position if module.run.unfinished(module.trainer) else self.position) // module.trainer.accumulate_grad_batches
        state = {"number": self.number, "updates": updates}
        if self.data is not None and updates < self.steps:
            data = {f.name: getattr(self.data, f.name) for f in fields(Batch)} if isinstance(self.data, Batch) else self.data.state()
            kind = type(self.data).__name__
            state |= {kind: data, "journal": self.journal.entries[: updates + 1], "fixed": self._fixed()}
        checkpoint[KEY] = state

    def load(self, module: Any, checkpoint: dict[str, Any]) -> None:
        """For `on_load_checkpoint`, instead of `checkpoints.load`; ValueError where what a half-done iteration depends on was changed."""
        load(module, checkpoint)
        state = checkpoint[KEY]
        if "fixed" in state and module._trainer is not None and module.trainer.training:
            changed = [
                f"{name} was {old} and is {self._fixed()[name]}" for name, old in state["fixed"].items() if self._fixed()[name] != old
            ]
            if changed:
                raise ValueError(
                    f"the checkpoint is from the middle of iteration {state['number']} (after update {state['updates']}), and "
                    f"{', '.join(changed)}: resume with what it was, or from a checkpoint at the end of an iteration"
                )
        self.data = (
            Batch(**state["Batch"]) if "Batch" in state else Experience.of_state(state["Experience"]) if "Experience" in state else None
        )
        ended = state["updates"] and self.data is None  # however many updates an iteration has now
        accumulate = 1 if module._trainer is None else module.trainer.accumulate_grad_batches
        self.number = state["number"]
        self.position = self.step_position = (self.steps if ended else state["updates"]) * accumulate
        self.journal.entries, self.journal.resumed = list(state.get("journal", [])), True

    def _fixed(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "minibatches": self.minibatches, "seed": run_seed()}


def batch_of(data: Any) -> Batch:
    """The data itself, or the batch that an experience is about."""
    return data if isinstance(data, Batch) else data.batch


def rank_rows(module: Any, total: int) -> range:
    """Which of an iteration's `total` prompts this rank samples for."""
    world, rank = module.trainer.world_size, module.global_rank
    return range(rank * total // world, (rank + 1) * total // world)


def gather_all(make: Callable[[], Any]) -> list[Any]:
    """What each rank makes, in the order of ranks, on every rank; what one rank raises, all raise."""
    made = agree(make)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [made]
    parts = [made] * dist.get_world_size()
    dist.all_gather_object(parts, made)
    return parts


def check_sampling(sampling: Sampling, reward_model: str | None, reward_fn: Any) -> None:
    """Raises ValueError or TypeError where there is not one reward, or nothing random to choose from."""
    if (reward_model is None) == (reward_fn is None):
        raise ValueError("give exactly one of reward_model and reward_fn" + (", not both" if reward_model else ""))
    if sampling.temperature <= 0:
        raise ValueError("sampling.temperature must be above 0: greedy responses to a prompt are all the same")
    if reward_fn is not None:
        check_reward_fn(reward_fn)


def check_iterating(module: Any, stage: str) -> None:
    """Raises TypeError or ValueError where the Trainer or the DataModule cannot serve a module that samples as it learns."""
    check_strategy(module)
    name = type(module).__name__
    if shards(module.trainer):
        raise ValueError(f"{name} samples outside of a forward that sharded strategies know of: use one device or ddp")
    if stage != "fit":
        return
    if not hasattr(module.trainer.datamodule, "prompts"):
        raise TypeError(f"{name} trains on a PromptDataModule, which draws each iteration's prompts by number")
    if module.trainer.limit_train_batches != 1.0 and not module.trainer.fast_dev_run and not module.trainer.overfit_batches:
        raise ValueError("limit_train_batches would cut iterations short; use max_steps, or fewer prompts or epochs an iteration")
