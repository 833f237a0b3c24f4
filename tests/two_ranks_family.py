"""One rank of runs of ILQL, RFT, Quark and NLPO under DDP, or the whole run in one process; test_two_ranks_family.py starts it.

Usage: two_ranks_family.py RANKS SFT_DIR REWARD_DIR OUT (with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set).
"""

import os
import sys
import tempfile

import datasets
import torch
from two_ranks import COMMON, ROWS, trainer, watched

from lit_rlhf import ILQL, NLPO, RFT, PromptDataModule, Quark, Sampling, SFTDataModule
from lit_rlhf.callbacks import RewardParts
from lit_rlhf.rewards import Rule, WeightedRewards

REWARDED = [row | {"reward": i % 3} for i, row in enumerate(ROWS)]
SAMPLING = Sampling(8, 1.0)


def prompts() -> PromptDataModule:
    return PromptDataModule(ROWS, val_data=ROWS[:6], max_prompt_tokens=64, val_batch_size=4)


def run(ranks: int, sft_dir: str, reward_dir: str) -> dict:
    """Six optimiser steps of each, of two micro-batches; RFT has an odd number of prompts, so that the ranks' parts are unequal."""
    setting = {"reward_model": reward_dir, "sampling": SAMPLING, **COMMON}
    reward = WeightedRewards({"model": reward_dir, "t": Rule("t")}, {"t": -1.0})
    many = {"n": 12, "keep": 2, "num_prompts": 15, "minibatches": 2}
    stages = {
        "ilql": (
            watched(ILQL, "train/")(sft_dir, sampling=SAMPLING, target_every=2, target_rate=0.5, **COMMON),
            SFTDataModule(REWARDED, val_data=REWARDED[:6], batch_size=8),
        ),
        "rft": (watched(RFT, "train/")(sft_dir, reward_fn=reward, sampling=SAMPLING, **many, **COMMON), prompts()),
        "quark": (watched(Quark, "train/")(sft_dir, num_prompts=8, minibatches=2, minibatch_size=8, **setting), prompts()),
        "nlpo": (
            watched(NLPO, "ppo/")(sft_dir, batch_size=16, responses_per_prompt=2, minibatches=2, ppo_epochs=1, min_tokens=2, **setting),
            prompts(),
        ),
    }
    found = {}
    for name, (module, data) in stages.items():
        parts = [RewardParts()] if name == "rft" else []
        fit = trainer("one" if ranks == 1 else "ddp", callbacks=parts)
        fit.fit(module, datamodule=data)
        validation = {k: float(v) for k, v in fit.callback_metrics.items() if k.startswith("val/")}
        weights = [x.float().flatten() for network in module.export_networks().values() for x in network.weights().values()]
        found[name] = {"steps": module.seen, "validation": validation, "weights": torch.cat(weights)}
        found[name] |= {"parts": parts[0].last} if parts else {}
        if name != "ilql":
            batch = getattr(module.experience, "batch", module.experience)
            found[name]["texts"] = module.tokenizer.batch_decode(list(batch.response_ids))
    return found


if __name__ == "__main__":
    ranks, sft_dir, reward_dir, out = int(sys.argv[1]), *sys.argv[2:]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = cache
        result = run(ranks, sft_dir, reward_dir)
    torch.save(result, f"{out}.{os.environ.get('RANK', 0)}")
