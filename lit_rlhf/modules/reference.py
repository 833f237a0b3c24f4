"""Log-probabilities of given responses under a frozen reference, each computed once, before the first step that needs it."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lit_rlhf.batch import Batch
from lit_rlhf.data.loader import StepLoader
from lit_rlhf.decoding import like_lengths
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.sharding import full_params, shard


class ReferenceLogprobs:
    """The sum of the log-probs of every response of a DataModule's rows, one number each, on every rank.

    Rows are known by their number in the table, so shuffling and epochs change nothing. The reference is the directory that the policy
    started from, loaded for the time of the pass alone; or the policy with its adapter off. Passes are over the rows of one optimiser step
    of the first epoch, whatever the ranks and whatever is known already, so that a run that goes on has the same numbers to the bit.
    (Under FSDP1 each rank holds a whole reference meanwhile.)
    """

    def __init__(self) -> None:
        self.tables: dict[str, Any] = {}
        self.sums: dict[str, dict[int, list[float]]] = {}
        self._network: CausalPolicy | None = None

    def of(self, batch: Batch, split: str) -> Tensor:
        """(N,) nats, for a batch of the split's loader."""
        known = self.sums[split]
        return torch.tensor([x for row in batch.rows or () for x in known[row]], device=batch.response_ids.device)

    def fill(self, module: Any, split: str, loader: StepLoader, steps: int, *, keep: bool = False) -> None:
        """Computes what the loader's next `steps` need and is not known yet; all ranks must call it.

        keep: the loaded network stays for the next call.
        """
        table = module.trainer.datamodule.tables[split]
        if self.tables.get(split) is not table:
            self.tables[split], self.sums[split] = table, {}
        wanted = loader.ahead(steps) - self.sums[split].keys()
        passes = [part for rows in _steps(loader) if wanted & set(rows) for part in _parts(loader, rows, module.tokens_per_forward)]
        if passes:
            rank_zero_info(f"reference log-probs of {sum(map(len, passes)):,} {split} rows")
            self.sums[split] |= self._compute(module, split, passes)
        self._network = self._network if keep else None

    @torch.no_grad()
    def _compute(self, module: Any, split: str, passes: list[list[int]]) -> dict[int, list[float]]:
        """The sums by row; the ranks take the passes in turn and exchange what they found."""
        trainer, found = module.trainer, {}  # type: tuple[Any, dict[int, list[float]]]
        network, adapter = self._load(module)
        with trainer.precision_plugin.forward_context(), full_params(trainer.model if network is module.policy else network):
            for turn in range(0, len(passes), trainer.world_size):  # equally many passes on each rank, as sharded networks need
                rows = passes[(turn + trainer.global_rank) % len(passes)]
                batch = trainer.datamodule.batch(split, rows).to(module.device)
                sums = network(batch, adapter=adapter)[0].sum(1).tolist()
                found |= {row: [] for row in rows}
                for x, m in zip(sums, batch.prompt_of.tolist(), strict=True):
                    found[rows[m]].append(x)
        if not (dist.is_available() and dist.is_initialized()) or trainer.world_size == 1:
            return found
        parts = [found] * trainer.world_size
        dist.all_gather_object(parts, found)
        return {row: sums for part in parts for row, sums in part.items()}

    def _load(self, module: Any) -> tuple[CausalPolicy, bool]:
        """The reference network, and whether its adapter is on."""
        if module.adapted:
            return module.policy, False
        if self._network is None:
            network = CausalPolicy.load(module.model, tokenizer=module.tokenizer, **module.source, **module.loading).requires_grad_(False)
            network = module.trainer.precision_plugin.convert_module(network)
            self._network = shard(network, module.trainer).to(module.device).eval()
        return self._network, True


def _steps(loader: StepLoader) -> Iterator[list[int]]:
    """The rows of each optimiser step of the loader's first epoch."""
    order = loader.order(0)
    return (loader.step_rows(order, step).tolist() for step in range(loader.steps))


def _parts(loader: StepLoader, rows: list[int], budget: int) -> list[list[int]]:
    """The rows in groups of at most `budget` tokens, or one row."""
    return [[rows[i] for i in group] for group in like_lengths(loader.lengths[rows].tolist(), budget)]
