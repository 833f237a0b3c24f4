"""One measuring process of lit_rlhf: its Trainer, modules and DataModules as a user runs them, no logger and no checkpoints.

python tests/benchmarks/ours.py ppo --work .bench/work [--precision bf16] [--batch 32] [--responses 4] [--steps 1] [--profile table.txt]
"""

import json
import logging
import warnings
from typing import Any

import datasets
import job
import lightning as L
import measuring
import torch
from job import Job
from work_done import Tally

import lit_rlhf.modules.reference
import lit_rlhf.networks
import lit_rlhf.rollout
from lit_rlhf.batch import Batch
from lit_rlhf.data import PairwiseDataModule, PromptDataModule, SFTDataModule
from lit_rlhf.data.tokenise import Encoder
from lit_rlhf.functional import dpo_loss, leave_one_out, rloo_loss, token_rewards
from lit_rlhf.generation import Sampling
from lit_rlhf.modules import DPO, PPO, RLOO, SFT, PairwiseReward
from lit_rlhf.networks import CausalPolicy, ScalarModel, score_of
from lit_rlhf.optim import Schedule


class Watch(L.Callback):
    """Marks the end of every step (PPO: of every iteration), keeps the losses and the first step's token ids."""

    def __init__(self, clock: measuring.Clock, updates: int = 1) -> None:
        self.clock, self.updates = clock, updates
        self.losses: list[float] = []
        self.first: dict[str, Any] = {}
        self.loaded = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.loaded = measuring.reset_peak()
        self.clock.mark()

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.first and hasattr(batch, "response_ids"):
            rows = paths(batch)
            self.first = {"ids": measuring.hash_ids(rows), "tokens": sum(map(len, rows)), "loss_tokens": int(batch.response_mask.sum())}

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.updates == 0:
            self.clock.mark()
        if "train/loss" in trainer.callback_metrics:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


def paths(batch: Any) -> list[list[int]]:
    """Prompt + response ids, one list per response."""
    prompts = [ids[mask].tolist() for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]
    responses = [ids[mask].tolist() for ids, mask in zip(batch.response_ids, batch.response_mask, strict=True)]
    return [prompts[m] + response for m, response in zip(batch.prompt_of.tolist(), responses, strict=True)]


def optimizer(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=job.LEARNING_RATE, eps=job.EPS, weight_decay=job.WEIGHT_DECAY)


def build(run: Job) -> tuple[L.LightningModule, L.LightningDataModule, int]:
    """Module, data module, and the optimiser steps of one measured step."""
    file, common = str(run.work / f"{run.data}.jsonl"), {"optimizer": optimizer, "scheduler": Schedule("constant")}
    policy, reward = str(run.work / "policy"), str(run.work / "reward")
    if run.stage == "sft":
        return SFT(policy, **common), SFTDataModule(file, batch_size=run.batch, **job.CUT), 1
    if run.stage == "reward":
        return PairwiseReward(reward, **common), PairwiseDataModule(file, batch_size=run.batch, **job.CUT), 1
    if run.stage == "dpo":
        return DPO(policy, beta=job.BETA["dpo"], **common), PairwiseDataModule(file, batch_size=run.batch, **job.CUT), 1
    common |= {"sampling": Sampling(max_new_tokens=job.NEW_TOKENS, temperature=job.TEMPERATURE), "batch_size": run.batch}
    common |= {"reward_model": reward, "responses_per_prompt": run.responses, "collapse_patience": None}  # random weights
    if run.stage == "rloo":
        return RLOO(policy, kl_coef=job.BETA["rloo"], **common), PromptDataModule(file, **job.CUT), 1
    ppo = PPO(policy, ppo_epochs=job.PPO_EPOCHS, **common)
    return ppo, PromptDataModule(file, **job.CUT), job.PPO_EPOCHS


@torch.no_grad()
def check(run: Job) -> None:
    """Log-probs, values and scores of given responses, by the networks that PPO loads, in its packed rows."""
    policy, scalar = CausalPolicy.load(str(run.work / "policy")), ScalarModel.load(str(run.work / "reward"))
    encoder = Encoder(policy.tokenizer)
    with open(run.work / f"{run.data}.jsonl") as lines:
        prompts = encoder.ids([json.loads(line)["prompt"] for line in lines])
    batch = Batch.of(prompts, job.check_responses(len(prompts), len(policy.tokenizer), encoder.eos))
    scalars, mask = scalar(batch), batch.response_mask
    logprobs = {name: policy(batch, temperature=job.TEMPERATURE, ban=ban)[0] for name, ban in (("", False), ("_without_pad", True))}
    dump = {f"logprobs{name}": found for name, found in logprobs.items()}
    torch.save(dump | {"mask": mask, "values": scalars[:, :-1] * mask, "scores": score_of(scalars, mask)}, run.out)


@torch.no_grad()
def check_dpo(run: Job) -> None:
    """The losses of the first batch by a policy that has moved away from its reference."""
    network, data = CausalPolicy.load(str(run.work / "policy")), PairwiseDataModule(str(run.work / f"{run.data}.jsonl"), **job.CUT)
    data.tokenizer, data.batch_size = network.tokenizer, run.batch
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    reference = network(batch)[0].sum(1)
    measuring.move(network.lm, 5e-3, 1)
    ratios, lengths, (first, second) = network(batch)[0].sum(1) - reference, batch.response_mask.sum(1), batch.pairs.unbind(1)
    found = {"sigmoid": ratios, "ipo": ratios / lengths}
    dump = {kind: dpo_loss(r[first], r[second], beta=job.BETA["dpo"], kind=kind)[0] for kind, r in found.items()}  # type: ignore[arg-type]
    torch.save(dump | {"tokens": batch.response_mask.sum()}, run.out)


@torch.no_grad()
def check_rloo(run: Job) -> None:
    """Advantages of given responses and scores, and the loss after the policy has moved on."""
    network = CausalPolicy.load(str(run.work / "policy"))
    encoder = Encoder(network.tokenizer)
    with open(run.work / f"{run.data}.jsonl") as lines:
        prompts = encoder.ids([json.loads(line)["prompt"] for line in lines])
    k = run.responses
    responses = job.check_responses(k * len(prompts), len(network.tokenizer), encoder.eos)
    batch = Batch.of(prompts, responses, [m for m in range(len(prompts)) for _ in range(k)])
    reference, mask = network(batch, temperature=job.TEMPERATURE)[0], batch.response_mask
    measuring.move(network.lm, 1e-3, 1)
    old = network(batch, temperature=job.TEMPERATURE)[0]
    rewards = token_rewards(old, reference, torch.tensor(job.check_scores(responses)), mask, kl_coef=job.BETA["rloo"])
    advantages = leave_one_out(rewards.sum(1), k)
    measuring.move(network.lm, 3e-4, 2)
    loss, stats = rloo_loss(network(batch, temperature=job.TEMPERATURE)[0], old, advantages, mask)
    torch.save({"loss": loss, "advantages": advantages, "logprobs": old.sum(1), "clip_fraction": stats["clip_fraction"]}, run.out)


def main() -> None:
    run = job.parse()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    measuring.set_threads(run)
    if run.stage.startswith("check"):
        return {"check": check, "check_dpo": check_dpo, "check_rloo": check_rloo}[run.stage](run)
    L.seed_everything(job.SEED, verbose=False)
    module, data, updates = build(run)
    clock = measuring.Clock()
    measuring.watch_gc(clock)
    watch, tally = Watch(clock, updates), Tally()
    for owner, name, phase in (
        (module, "_collect", "collect"),
        (lit_rlhf.rollout, "sample", "sampling"),
        (lit_rlhf.rollout, "in_parts", "log-probs and values"),
        (lit_rlhf.rollout, "score_texts", "reward model"),
        (lit_rlhf.modules.reference.ReferenceLogprobs, "_compute", "reference"),
    ):
        clock.watch(owner, name, phase)
    tally.watch(lit_rlhf.networks)
    trainer = L.Trainer(
        max_steps=updates * (run.warm_up + run.steps),
        max_epochs=-1,
        precision="bf16-mixed" if run.precision == "bf16" else "32-true",
        gradient_clip_val=None if run.stage == "ppo" else 1.0,  # TRL's PPO does not clip, its other trainers do
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run.work,
        callbacks=[watch],
    )
    measuring.profiled(run, lambda: trainer.fit(module, data))
    found = measuring.result(run, "ours", clock, watch.loaded, run.batch, losses=watch.losses, first=watch.first)
    if run.stage == "dpo":
        found |= with_reference(found, clock, watch)
    measuring.emit(run, found | tally.figures(run, found))


def with_reference(found: dict[str, Any], clock: measuring.Clock, watch: Watch) -> dict[str, Any]:
    """DPO's figures with each step's share of the reference's log-probs, which are computed before the first step, once for all of them."""
    share = sum(clock.phases["reference"]) / max(len(watch.losses), 1)
    seconds = [s + share for s in found["seconds"]]
    rate = found["units"] * len(seconds) / (sum(seconds) or 1)
    return {"seconds": seconds, "seconds_per_step": found["seconds_per_step"] + share, "units_per_second": rate, "reference_seconds": share}


if __name__ == "__main__":
    main()
