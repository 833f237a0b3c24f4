"""What the modules share, as functions and small objects: they have no common parent."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torchmetrics import Metric

from lit_rlhf.batch import Batch
from lit_rlhf.checkpoints import group_settings
from lit_rlhf.data.loader import run_seed
from lit_rlhf.generation import Sampling
from lit_rlhf.optim import fix_max_steps, fuse

VALIDATION = 0x56414C  # keys of sampling noise that is the same at every validation
PREDICTION = 0x505245


def record(module: L.LightningModule, sampling: Sampling | None = None) -> None:
    """Saves the arguments that are plain data as hyper-parameters, so that checkpoints load with `weights_only=True`.

    Callables and objects given from Python (optimizer, scheduler, peft, reward_fn) are not written; `load_from_checkpoint` takes them as
    arguments again. Under the command line everything is plain and the config is written as it was given.
    """
    frame = _caller()
    module.save_hyperparameters(ignore=["optimizer", "scheduler", "peft", "reward_fn", "sampling", "rouge_tokenizer"], frame=frame)
    if sampling is not None:
        module.hparams["sampling"] = asdict(sampling)


def _caller() -> Any:
    return inspect.currentframe().f_back.f_back  # type: ignore[union-attr]


def as_sampling(sampling: Sampling | Mapping[str, Any]) -> Sampling:
    """The Sampling itself, or made from the mapping that a checkpoint holds."""
    return sampling if isinstance(sampling, Sampling) else Sampling(**sampling)


def loss_scale(trainer: L.Trainer) -> float:
    """The factor on local sum / step count: Lightning divides by the one, and DDP and FSDP average over the other."""
    return trainer.accumulate_grad_batches * trainer.world_size


def reseed(*counters: int) -> None:
    """Seeds torch from the run's seed and counters, so that no RNG state needs saving for dropout to be the same after a resume."""
    seed = 0x9E3779B97F4A7C15
    for part in (run_seed(), *counters):
        seed = ((seed ^ part) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % (1 << 63)
    torch.manual_seed(seed)


def optimizers(module: L.LightningModule, groups: list[dict[str, Any]], optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Lightning's optimizer dictionary: one optimizer over the groups, its schedule over the whole run, stepped every update."""
    groups = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
    built: Optimizer = fuse(optimizer(groups))
    schedule = scheduler(built, fix_max_steps(module.trainer))
    module.run.groups = group_settings(built)  # type: ignore[union-attr]
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class StepMeter:
    """Adds up the stats of an optimiser step's micro-batches and gives their sum over all ranks.

    A stat with "max" in its name takes the largest instead.
    """

    def __init__(self) -> None:
        self.stats: dict[str, Tensor] = {}

    def add(self, stats: Mapping[str, Tensor]) -> None:
        for name, value in stats.items():
            value, old = value.detach().float(), self.stats.get(name)
            self.stats[name] = value if old is None else torch.maximum(old, value) if "max" in name else old + value

    def pop(self, prefix: str) -> dict[str, Tensor]:
        """The stats since the last call, joined over ranks, with `prefix` before their names."""
        stats, self.stats = self.stats, {}
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for name, value in stats.items():
                dist.all_reduce(value, dist.ReduceOp.MAX if "max" in name else dist.ReduceOp.SUM)
        return {prefix + name: value for name, value in stats.items()}


def step_stats(module: Any, prefix: str, where: str = "") -> dict[str, Tensor]:
    """The finished optimiser step's stats over all ranks with its gradient norm; call it on every rank in `on_before_optimizer_step`.

    Raises RuntimeError on all ranks where one of them is not finite: the weights and the files are still those of the step before.
    where: what its message says beside the step's number.
    """
    stats = module.meter.pop(prefix) | {f"{prefix}grad_norm": grad_norm(module)}
    wrong = [name for name, value in stats.items() if not torch.isfinite(value).all()]
    scaler = getattr(module.trainer.precision_plugin, "scaler", None)
    if scaler is not None and wrong == [f"{prefix}grad_norm"]:
        return stats  # float16: the scaler skips such a step and lowers its scale
    if wrong:
        seen = ", ".join(f"{name.removeprefix(prefix)} {float(value):.4g}" for name, value in stats.items())
        raise RuntimeError(
            f"step {module.trainer.global_step}{where}: {', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not finite, so "
            f"the run stops before this step changes any weight ({seen}). The checkpoints are sound: lower the learning rate, clip "
            "gradients (trainer.gradient_clip_val), or look at this step's rows, and go on with --ckpt_path last"
        )
    module.run.stepping = module.trainer.global_step
    return stats


def grad_norm(module: Any) -> Tensor:
    """The 2-norm of all gradients before any clipping, over all shards."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    norm = get_total_norm(grads) if grads else torch.zeros((), device=module.device)
    if isinstance(norm, DTensor):
        return norm.full_tensor()
    if isinstance(module.trainer.model, FullyShardedDataParallel):  # each rank has a part of every gradient
        squared = norm.float().square().to(module.device)
        dist.all_reduce(squared)
        return squared.sqrt()
    return norm


def scored_rows(tokenizer: Any, batch: Batch, scores: Tensor) -> list[dict[str, Any]]:
    """One dictionary a response for sample tables and jsonl files: prompt, response, score."""
    ids = [row[kept].tolist() for row, kept in zip(batch.response_ids, batch.response_mask, strict=True)]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [{"prompt": p, "response": r, "score": s} for p, r, s in zip(batch.column("prompt"), texts, scores.tolist(), strict=True)]


def reset_metrics(*metrics: Metric) -> None:
    """Empties them with ordinary tensors: those that `Trainer.validate`'s inference mode would make cannot be updated in a later fit."""
    with torch.inference_mode(False):
        for metric in metrics:
            metric.reset()
