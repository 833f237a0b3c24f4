"""One rank of runs of every module under DDP, FSDP2 and FSDP1, or the whole run in one process; test_two_ranks.py starts it.

Usage: two_ranks.py RANKS SFT_DIR REWARD_DIR OUT.pt (with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, as torchrun does).
"""

import os
import sys
import tempfile

import datasets
import lightning as L
import torch
from strategy_zoo import strategy

from lit_rlhf import DPO, PPO, RLOO, SFT, PairwiseDataModule, PairwiseReward, PromptDataModule, Sampling, Schedule, SFTDataModule
from lit_rlhf.callbacks import Throughput
from lit_rlhf.sharding import gathered

WORDS = "the cat sat on a mat and then it ate my hat".split()
COMMON = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.05), "scheduler": Schedule("constant")}


def words(start: int, n: int) -> str:
    return " ".join(WORDS[(start * 5 + i * i) % len(WORDS)] for i in range(n))


ROWS = [{"prompt": words(i, 3 + i % 5), "label": words(i + 1, 1 + i % 6)} for i in range(16)]
PAIRS = [{"prompt": words(i, 3 + i % 5), "chosen": words(i, 1 + i % 6), "rejected": words(i + 2, 2 + i % 3)} for i in range(16)]


def trainer(name: str, sharded: bool = False, **more) -> L.Trainer:
    """A Trainer of one process ("one") or of both ranks under a strategy, clipping the gradients' norm."""
    more = (
        ({"devices": 1} if name == "one" else {"strategy": strategy(name, sharded=sharded), "devices": 2})
        | {"max_steps": 6, "gradient_clip_val": 0.5}
        | more
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", num_sanity_val_steps=0, accumulate_grad_batches=2, **(quiet | more))


def watched(kind: type, key: str) -> type:
    """The module class, writing down every optimiser step's metrics, and in one process the norm of its gradient before clipping."""

    class Watched(kind):
        def log_dict(self, metrics, *args, **kwargs):
            if any(name.startswith(key) for name in metrics):
                self.seen = [*getattr(self, "seen", []), {name: float(x) for name, x in metrics.items()}]
                if self.trainer.world_size == 1:
                    grads = [p.grad.flatten() for p in self.parameters() if p.grad is not None]
                    self.norms = [*getattr(self, "norms", []), float(torch.cat(grads).norm())]
            super().log_dict(metrics, *args, **kwargs)

    return Watched


def run(strategy_name: str, sft_dir: str, reward_dir: str) -> dict:
    """What every module did: 6 optimiser steps each, which for PPO and RLOO are 3 iterations.

    Two ranks recompute the activations of reward model and PPO, one process keeps them: no number depends on it.
    """
    sampling, common = Sampling(8, 1.0), COMMON | {"activation_checkpointing": strategy_name != "one"}
    stages = {
        "sft": (watched(SFT, "train/")(sft_dir, sampling=sampling, **COMMON), SFTDataModule(ROWS, val_data=ROWS[:6], batch_size=8)),
        "reward": (watched(PairwiseReward, "train/")(sft_dir, **common), PairwiseDataModule(PAIRS, val_data=PAIRS[:6], batch_size=8)),
        "dpo": (
            watched(DPO, "train/")(sft_dir, beta=0.5, sft_coef=0.1, **common),
            PairwiseDataModule(PAIRS, val_data=PAIRS[:6], batch_size=8),
        ),
        "rloo": (
            watched(RLOO, "rloo/")(
                sft_dir, reward_model=reward_dir, batch_size=16, responses_per_prompt=2, minibatches=2, sampling=sampling, **common
            ),
            PromptDataModule(ROWS, val_data=ROWS[:6], max_prompt_tokens=64, val_batch_size=4),
        ),
        "ppo": (
            watched(PPO, "ppo/")(
                sft_dir,
                reward_model=reward_dir,
                batch_size=16,
                responses_per_prompt=2,
                minibatches=2,
                ppo_epochs=1,
                sampling=sampling,
                **common,
            ),
            PromptDataModule(ROWS, val_data=ROWS[:6], max_prompt_tokens=64, val_batch_size=4),
        ),
    }
    found = {}
    for name, (module, data) in stages.items():
        fit = trainer(strategy_name, callbacks=[Throughput()], log_every_n_steps=2)
        fit.fit(module, datamodule=data)
        callback = next(c for c in fit.callbacks if isinstance(c, Throughput))
        speed = {"last": callback.last, "work": {name: [vars(w) for w in works] for name, works in callback.work.items()}}
        validation = {k: float(v) for k, v in fit.callback_metrics.items() if k.startswith("val/")}
        found[name] = {"steps": module.seen, "norms": getattr(module, "norms", []), "validation": validation, "speed": speed}
        networks = module.export_networks().values()
        with gathered(fit.model) as mine:
            if mine:
                found[name]["weights"] = torch.cat([x.float().flatten() for network in networks for x in network.weights().values()])
        if name == "reward":
            found[name]["mean"] = float(module.network.mean)
        if name in ("ppo", "rloo"):
            found[name]["texts"] = module.tokenizer.batch_decode(list(module.experience.batch.response_ids))
            found[name]["samples"] = sorted((row["prompt"], row["response"]) for row in module.samples)
    return found


def failing(strategy_name: str, sft_dir: str, act: str = "fit") -> str:
    """What this rank says when the reward function raises on the last rank alone, in a rollout (fit) or in a validation (validate)."""

    def reward_fn(prompts, responses):
        if int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
            raise KeyError("lexicon")
        return [0.0] * len(prompts)

    try:
        getattr(trainer(strategy_name), act)(
            PPO(sft_dir, reward_fn=reward_fn, batch_size=8, sampling=Sampling(4, 1.0)),
            datamodule=PromptDataModule(ROWS, val_data=ROWS[:4], max_prompt_tokens=64),
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


if __name__ == "__main__":
    ranks, sft_dir, reward_dir, out = int(sys.argv[1]), *sys.argv[2:]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = cache
        names = ["one"] if ranks == 1 else ["ddp", "fsdp2", "fsdp1"]
        result = {
            name: run(name, sft_dir, reward_dir) | {"failing": [failing(name, sft_dir), failing(name, sft_dir, "validate")]}
            for name in names
        }
    torch.save(result, f"{out}.{os.environ.get('RANK', 0)}")
