"""Loaders whose order is a function of (seed, epoch) and whose position is two numbers, so that a resume needs no saved RNG."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lit_rlhf.batch import Batch


def run_seed() -> int:
    """The run's one seed: what `lightning.seed_everything` set, else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of range(size) that depends on `key` alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([abs(k) for k in key]))).permutation(size)


def rolling(rows: int, start: int, size: int, *key: int) -> list[int]:
    """Entries start..start+size of an endless sequence of permutations of range(rows), a function of `key` alone."""
    orders = {turn: permutation(rows, *key, turn) for turn in range(start // rows, (start + size - 1) // rows + 1)}
    return [int(orders[at // rows][at % rows]) for at in range(start, start + size)]


def split_by_tokens(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Row positions 0..len(lengths)-1 in `parts` non-empty parts of nearly equal token sums (longest row first, into the lightest part)."""
    if len(lengths) < parts:
        raise ValueError(f"{len(lengths)} rows cannot be split into {parts} non-empty parts")
    loads, out = [0] * parts, [[] for _ in range(parts)]  # type: tuple[list[int], list[list[int]]]
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        part = min(range(parts), key=lambda part: (loads[part], part))
        loads[part] += max(int(lengths[row]), 1)
        out[part].append(row)
    heaviest_first = sorted(range(parts), key=lambda part: (-loads[part], part))
    return [sorted(out[part]) for part in heaviest_first]


class StepLoader:
    """A sized iterable of one rank's micro-batches, `accumulate` of them per optimiser step.

    `lengths`, `counts` (one per row): tokens, and what the row adds to the loss divisor. `batch_size` is the number of rows of one
    optimiser step over all ranks and micro-batches; its rows are split over those by tokens, and every Batch carries `count`, the sum
    of the whole step. A short last step stays, unless it has fewer rows than parts: then they join the step before. `epoch` is the first
    epoch's number; `limit` the number of micro-batches after which the Trainer ends an epoch (limit_train_batches), needed to resume from
    there. ValueError where there are too few rows to give each rank and micro-batch one. Lightning adds no sampler.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        counts: Sequence[float],
        collate: Callable[[list[int]], Batch],
        *,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        limit: int | None = None,
    ) -> None:
        self.lengths, self.counts, self.collate = np.asarray(lengths), np.asarray(counts, dtype=np.float64), collate
        self.batch_size, self.accumulate, self.rank, self.world = batch_size, accumulate, rank, world
        self.shuffle, self.seed = shuffle, seed
        self.epoch, self.position = epoch - 1, 0
        self._resumed = False
        parts, rows = accumulate * world, len(self.lengths)
        if batch_size < parts:
            raise ValueError(
                f"batch_size {batch_size} is less than accumulate_grad_batches x processes = {accumulate} x {world}: some would get no row"
            )
        if rows < parts:
            raise ValueError(
                f"{rows} rows are too few for accumulate_grad_batches x processes = {accumulate} x {world}: use fewer, or more rows"
            )
        full, rest = divmod(rows, batch_size)
        self.steps = full + (rest >= parts or (full == 0 and rest > 0))
        self.limit = min(limit, len(self)) if limit else len(self)

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def order(self, epoch: int) -> np.ndarray:
        """Row numbers in the order of that epoch."""
        rows = len(self.lengths)
        return permutation(rows, self.seed, epoch) if self.shuffle else np.arange(rows)

    def step_rows(self, order: np.ndarray, step: int) -> np.ndarray:
        """The rows of one optimiser step, over all ranks and micro-batches."""
        return order[step * self.batch_size : None if step == self.steps - 1 else (step + 1) * self.batch_size]

    def ahead(self, steps: int) -> set[int]:
        """The rows of the next `steps` optimiser steps, over all ranks and micro-batches."""
        resumed = self._resumed and self.position < self.limit
        epoch, first = (self.epoch, self.position // self.accumulate) if resumed else (self.epoch + 1, 0)
        rows: set[int] = set()
        for step in range(first, first + steps):
            if len(rows) == len(self.lengths):
                break
            turn, at = divmod(step, -(-self.limit // self.accumulate))
            rows |= set(self.step_rows(self.order(epoch + turn), at).tolist())
        return rows

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing happens before the first batch is asked for, so an iterator that Lightning makes and drops costs nothing,
        # and a state loaded after it was made still counts.
        resume, self._resumed = self._resumed, False
        if not resume or self.position >= self.limit:
            self.epoch, self.position = self.epoch + 1, 0
        order, step, parts = self.order(self.epoch), -1, []  # type: tuple[np.ndarray, int, list[list[int]]]
        while self.position < len(self):
            wanted, micro = divmod(self.position, self.accumulate)
            if wanted != step:
                step, rows = wanted, self.step_rows(order, wanted)
                parts = split_by_tokens(self.lengths[rows].tolist(), self.accumulate * self.world)
                count = float(self.counts[rows].sum())
            mine = [int(rows[i]) for i in parts[micro * self.world + self.rank]]
            batch = self.collate(mine)
            batch.rows, batch.count = mine, count
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from, and what that depends on."""
        now = {"epoch": self.epoch, "position": self.position, "end": self.limit}
        return now | {"accumulate": self.accumulate, "batch_size": self.batch_size, "rows": len(self.lengths), "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch handed out last; ValueError where rows, batch size or seed differ in the middle of an epoch."""
        if not state:
            return
        ended = state["position"] >= state["end"]
        now = {"rows": len(self.lengths), "batch_size": self.batch_size, "seed": self.seed}
        changed = [f"{key} was {state[key]} and is {now[key]}" for key in now if state[key] != now[key]]
        if changed and not ended and state["position"] > 0:
            raise ValueError(
                f"the checkpoint is from the middle of epoch {state['epoch']} (batch {state['position']}), and {', '.join(changed)}: "
                "resume with the same data, batch_size and seed, from a checkpoint at the end of an epoch, or from an exported directory"
            )
        self.epoch, self._resumed = state["epoch"], True
        if ended or changed:
            self.position = len(self) if state["position"] else 0
        else:
            self.position = state["position"] * self.accumulate // state["accumulate"]


class StepNumbers:
    """A sized iterable of 0..n-1 whose position is saved: what PPO's epoch runs over (lightning-facts section 1)."""

    def __init__(self, n: int) -> None:
        self.n, self.position, self._start = n, 0, 0

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        self.position, self._start = self._start, 0
        while self.position < self.n:
            self.position += 1
            yield self.position - 1

    def state_dict(self) -> dict[str, int]:
        """The number of the next item, 0 after the last, and how many there are."""
        return {"position": self.position % self.n, "of": self.n}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next pass there; where there are now more or fewer items (micro-batches of the same steps), in proportion."""
        of = state.get("of", self.n)
        self._start = state.get("position", 0) % of * self.n // of
