"""Points of the frontier: while PPO runs, every few iterations the policy is measured on the held-out prompts."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from lit_rlhf.data.loader import run_seed
from lit_rlhf.functional import k1
from lit_rlhf.modules.common import VALIDATION
from lit_rlhf.rollout import Actors, agree, collect, score_texts
from lit_rlhf.sharding import full_params


@dataclass
class Point:
    """What a policy is worth on the held-out prompts after an iteration; every list has one number a prompt, in the order of the data."""

    iteration: int
    """Iterations learnt; 0 is the SFT policy."""
    kl: list[float] = field(default_factory=list)
    """Nats from the SFT policy, of the one response sampled."""
    proxy: list[float] = field(default_factory=list)
    gold: list[float] = field(default_factory=list)
    """Empty where there is no gold reward."""
    length: list[float] = field(default_factory=list)
    finished: list[float] = field(default_factory=list)


def read_points(path: Path) -> list[Point]:
    """The points in a jsonl file, by iteration; of two of one iteration the later; a last line that was cut off does not count."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            point = Point(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[point.iteration] = point
    return [found[iteration] for iteration in sorted(found)]


class Points(Callback):
    """Measures the policy before the first iteration, after every `every` and after the last, and keeps what gold likes best so far.

    Args:
        folder: gets `points.jsonl`, and `best/` with the policy as a Hugging Face directory.
        gold: the gold reward's scorer; None measures the proxy alone, and by it picks.
        iterations: the run's number of them.
    """

    def __init__(self, folder: Path, gold: nn.Module | None, every: int, iterations: int) -> None:
        self.folder, self.gold, self.every, self.iterations = folder, gold, every, iterations
        self.path = folder / "points.jsonl"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.iteration == 0 and pl_module.position == 0:
            self.measure(trainer, pl_module, 0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        done = pl_module.iteration + 1
        if pl_module.position == pl_module.items and (done % self.every == 0 or done == self.iterations):
            self.measure(trainer, pl_module, done)

    @torch.no_grad()
    def measure(self, trainer: Trainer, module: Any, iteration: int) -> None:
        """Adds the point, unless it is there already (the run was resumed from before it)."""
        known = read_points(self.path)
        if any(point.iteration == iteration for point in known):
            return
        with trainer.precision_plugin.forward_context(), full_params(trainer.model):
            rows = [row for batch in held_out(trainer.datamodule) for row in self._rows(module, batch.to(module.device))]
        point = Point(iteration, **columns(gathered(rows)))
        best = max((mean(p.gold or p.proxy) for p in known), default=float("-inf"))
        if iteration and mean(point.gold or point.proxy) > best:
            keep(trainer, module, self.folder / "best")
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(point)) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def _rows(self, module: Any, batch: Any) -> list[dict[str, Any]]:
        """One dictionary a prompt of this rank's."""
        actors = Actors(module.policy, module.reference, None, module.scorer)

        def make() -> Any:
            made = collect(actors, batch, module.sampling, key=(run_seed(), VALIDATION), tokens_per_forward=module.tokens_per_forward)
            return made, None if self.gold is None else score_texts(self.gold, made.batch, made.texts).tolist()

        made, gold = agree(make)
        mask = made.batch.response_mask
        kl = (k1(made.logprobs, made.ref_logprobs) * mask).sum(1).tolist()
        numbers = {"kl": kl, "proxy": made.scores.tolist(), "length": mask.sum(1).tolist(), "finished": made.finished.float().tolist()}
        numbers |= {} if gold is None else {"gold": gold}
        rows = batch.rows or range(batch.num_prompts)
        return [{"row": row} | {name: values[i] for name, values in numbers.items()} for i, row in enumerate(rows)]


def held_out(data: Any) -> Any:
    """The DataModule's batches of validation prompts; ValueError where it has none."""
    loader = data.val_dataloader()
    if isinstance(loader, list):
        raise ValueError("a frontier is measured on held-out prompts: give data.val_data, or val_fraction")
    return loader


def gathered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    parts: list[list[dict[str, Any]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def columns(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Lists by name, in the order of the rows' numbers."""
    rows = sorted(rows, key=lambda row: row["row"])
    return {name: [float(row[name]) for row in rows] for name in rows[0] if name != "row"}


def keep(trainer: Trainer, module: Any, folder: Path) -> None:
    """Writes the policy's Hugging Face directory, whole or not at all."""
    from lit_rlhf.callbacks import ExportHF

    only: Any = _Only(module)
    ExportHF(str(folder)).export(trainer, only, "the best so far")


class _Only:
    """A module whose export is the policy alone."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def export_networks(self) -> dict[str, Any]:
        return {"": self.module.policy}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
