"""What modules that learn from their own samples share (PPO, RLOO, NLPO, RFT, Quark): an iteration's responses, minibatches, validation.

One Lightning epoch is one iteration. `module` has the networks, settings and counters of PPO (`iteration`, `position`, `experience`, …);
only those counters say where an iteration stands, never Lightning's. RFT's and Quark's `experience` is a Batch: they learn by likelihood.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_rlhf.batch import Batch
from lit_rlhf.collapse import sign_stats, signs
from lit_rlhf.data.loader import permutation, run_seed, split_by_tokens
from lit_rlhf.functional import adapt_kl_coef, k1
from lit_rlhf.modules.common import VALIDATION, reset_metrics
from lit_rlhf.modules.sft import response_rows
from lit_rlhf.networks import ScalarModel
from lit_rlhf.rollout import Rollout, agree, collect, gather
from lit_rlhf.scoring import FunctionScorer, ModelScorer
from lit_rlhf.sharding import full_params, shard


def val_metrics(names: Sequence[str] = ("score", "kl", "length", "eos_rate")) -> nn.ModuleDict:
    """The means that validation reports beside ROUGE, of these entries of a row."""
    return nn.ModuleDict({name: MeanMetric() for name in names})


def load_reward(module: Any) -> nn.Module:
    """The scorer of `reward_fn` or `reward_model`."""
    if module.reward_fn is not None:
        return FunctionScorer(module.reward_fn, timeout=module.reward_timeout)
    network = ScalarModel.load(module.reward_model, **module.loading, trust_remote_code=module.source["trust_remote_code"])
    if module.reward_baseline != "mean":
        network.mean.zero_()
    return ModelScorer(shard(network.requires_grad_(False), module._trainer), tokens_per_forward=module.tokens_per_forward)


def begin(module: Any, batch_idx: int) -> None:
    """A micro-batch starts; where the experience is used up, the next iteration begins with `module._collect()`."""
    micro = module.run.begin(module.trainer, batch_idx)
    if module.position >= module.items:
        module.iteration, module.position, module.experience, module.stopped = module.iteration + 1, 0, None, False
    module.step_position = module.position if micro == 0 else module.step_position
    module.journal.replay(module)
    if module.experience is None:
        module._collect()


def own_prompts(module: Any) -> tuple[Batch, range]:
    """The iteration's prompts, of all ranks, and which of them are this rank's."""
    world, rank = module.trainer.world_size, module.global_rank
    prompts = module.trainer.datamodule.prompts(0 if module.trainer.overfit_batches else module.iteration, module.num_prompts)
    return prompts, range(rank * module.num_prompts // world, (rank + 1) * module.num_prompts // world)


def draw(module: Any) -> tuple[Rollout, dict[str, Tensor]]:
    """The iteration's responses, of all ranks, and what they look like; RuntimeError for a policy that has collapsed."""
    prompts, mine = own_prompts(module)
    setting = {"num_responses": module.responses_per_prompt, "tokens_per_forward": module.tokens_per_forward, "rows": mine}
    setting |= {"key": (run_seed(), module.iteration), "subtract_reference": module.reward_baseline == "reference", "clock": module.clock}
    with module.trainer.precision_plugin.forward_context(), full_params(module.trainer.model):  # networks only: bf16-true rounds all else
        rollout = gather(lambda: collect(module.actors, prompts.select_prompts(mine), module.sampling, **setting))
    found = signs(rollout.texts, rollout.batch.response_ids, rollout.batch.response_mask, rollout.finished)
    module.collapse(found, module.iteration)
    return rollout, sign_stats(found)


def note(module: Any, stats: dict[str, Tensor]) -> None:
    """Logs the rollout's statistics, and lets the KL coefficient adapt for the next iteration."""
    module.episodes += module.batch_size
    stats |= {"kl_coef": torch.tensor(module.kl_coef), "episodes": torch.tensor(float(module.episodes))}
    if module.kl_target is not None:
        kl, n = float(stats["kl"]), module.batch_size
        module.kl_coef = adapt_kl_coef(module.kl_coef, kl, target=module.kl_target, horizon=module.kl_horizon, n=n)
    log_rollout(module, stats)


def log_rollout(module: Any, stats: dict[str, Tensor]) -> None:
    """Logs how an iteration's responses were made, as rollout/…; updates begin."""
    module.journal.entries = []
    module.journal.add(module, {f"rollout/{name}": value for name, value in stats.items()})
    module.clock.begin("update")


def minibatch(module: Any, position: int) -> tuple[Any, int, int]:
    """This rank's part of the minibatch at `position` in the iteration, and the minibatch's tokens and responses over all ranks.

    The prompts' order is a function of (seed, iteration, epoch); the responses of a prompt stay together.
    """
    step, micro = divmod(position, module.trainer.accumulate_grad_batches)
    epoch, number = divmod(step, module.minibatches)
    batch = module.experience if isinstance(module.experience, Batch) else module.experience.batch
    total, rows_of = batch.num_prompts, [[] for _ in range(batch.num_prompts)]  # type: tuple[int, list[list[int]]]
    for n, m in enumerate(batch.prompt_of.tolist()):
        rows_of[m].append(n)
    order = permutation(total, run_seed(), module.iteration, epoch).tolist()
    prompts = order[number * total // module.minibatches : (number + 1) * total // module.minibatches]
    lengths = batch.response_mask.sum(1)
    lengths = lengths.new_zeros(total).index_add(0, batch.prompt_of, lengths)
    sizes = (batch.prompt_mask.sum(1) + lengths)[prompts].tolist()
    parts = split_by_tokens(sizes, module.trainer.accumulate_grad_batches * module.trainer.world_size)
    mine = parts[micro * module.trainer.world_size + module.global_rank]
    rows = [n for i in mine for n in rows_of[prompts[i]]]
    return module.experience.select(rows).to(module.device), int(lengths[prompts].sum()), sum(len(rows_of[m]) for m in prompts)


def evaluate(module: Any, batch: Batch, batch_idx: int) -> None:
    """Samples at the training temperature with noise that is the same at every validation, and adds to the metrics."""
    add_rows(module, sampled_rows(module, batch, VALIDATION), batch_idx)


def sampled_rows(module: Any, batch: Batch, purpose: int) -> list[dict[str, Any]]:
    """One dictionary a prompt: prompt, response, reference where known, score, kl, length, eos_rate."""
    actors = replace(module.actors, value=None)
    setting = {"subtract_reference": module.reward_baseline == "reference", "tokens_per_forward": module.tokens_per_forward}
    made = agree(lambda: collect(actors, batch, module.sampling, key=(run_seed(), purpose), **setting))
    mask = made.batch.response_mask
    return response_rows(
        batch.columns,
        made.texts,
        score=made.scores.tolist(),
        kl=(k1(made.logprobs, made.ref_logprobs) * mask).sum(1).tolist(),
        length=mask.sum(1).tolist(),
        eos_rate=made.finished.tolist(),
    )


def add_rows(module: Any, rows: list[dict[str, Any]], batch_idx: int) -> None:
    """Adds one batch's rows to the metrics and to `module.samples`; ROUGE is of the rows that have a reference."""
    module.samples = rows if batch_idx == 0 else module.samples + rows
    for name, metric in module.val_metrics.items():
        if name in rows[0]:
            metric.update(torch.tensor([float(row[name]) for row in rows], device=module.device))
    scored = [row for row in rows if row.get("reference") is not None]
    module.rouge.update([row["response"] for row in scored], [row["reference"] for row in scored])


def report(module: Any, stage: str) -> None:
    """Logs the means of what was evaluated, and forgets it."""
    values = {name: metric.compute() for name, metric in module.val_metrics.items()} | module.rouge.compute()
    module.log_dict({f"{stage}/{name}": value for name, value in values.items()})
    reset_metrics(*module.val_metrics.values(), module.rouge)
