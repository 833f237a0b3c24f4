"""How far two ranks drift from one process in 20 PPO iterations: prints the table of tutorials/strategies.md (no test; by hand).

Usage: two_ranks_long.py SFT_DIR REWARD_DIR [ITERATIONS]; starts the processes itself.
"""

import os
import sys
import tempfile
from pathlib import Path

import datasets
import torch
from ranks import start
from test_two_ranks import STRATEGIES
from two_ranks import ROWS, trainer

from lit_rlhf import PPO, PromptDataModule, Sampling, Schedule
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.sharding import gathered


def run(name: str, sft_dir: str, reward_dir: str, iterations: int) -> dict:
    """Every iteration's response ids, and the policy's weights at the end."""
    seen: list = []

    class Watched(PPO):
        def _collect(self):
            super()._collect()
            batch = self.experience.batch
            seen.append([row[kept].tolist() for row, kept in zip(batch.response_ids, batch.response_mask, strict=True)])

    def adam(params):
        return torch.optim.AdamW(params, lr=1e-3)

    more = {"batch_size": 32, "minibatches": 2, "ppo_epochs": 2, "sampling": Sampling(16, 1.0)}
    module = Watched(sft_dir, reward_model=reward_dir, optimizer=adam, scheduler=Schedule("constant"), **more)
    fit = trainer(name, max_steps=4 * iterations)
    fit.fit(module, datamodule=PromptDataModule(ROWS, max_prompt_tokens=64))
    with gathered(fit.model) as mine:
        weights = torch.cat([x.flatten() for x in module.policy.weights().values()]) if mine else None
    return {"texts": seen, "weights": weights}


def compare(one: dict, other: dict) -> str:
    """The largest difference of a weight, and the first token that differs."""
    gap = float((one["weights"] - other["weights"]).abs().max())
    tokens = sum(len(row) for rows in one["texts"] for row in rows)
    for i, (a, b) in enumerate(zip(one["texts"], other["texts"], strict=True)):
        for n, (x, y) in enumerate(zip(a, b, strict=True)):
            if x != y:
                t = next((t for t, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), min(len(x), len(y)))
                return f"{gap:.1e}, first token that differs: iteration {i}, response {n}, token {t}"
    return f"{gap:.1e}, none of {tokens} tokens differs"


def main(sft_dir: str, reward_dir: str, iterations: int) -> None:
    for count in dict.fromkeys((3, iterations)):
        with tempfile.TemporaryDirectory() as out:
            arguments = [sft_dir, reward_dir, str(count), f"{out}/found"]
            for process in start(1, arguments, Path(__file__)) + start(2, arguments, Path(__file__)):
                _, errors = process.communicate()
                assert process.returncode == 0, errors[-3000:]
            found = torch.load(f"{out}/found.1.0") | torch.load(f"{out}/found.2.0")
        begin = torch.cat([x.flatten() for x in CausalPolicy.load(sft_dir).weights().values()])
        print(f"{count} iterations; the policy's weights moved by up to {float((found['one']['weights'] - begin).abs().max()):.1e}")
        for name in STRATEGIES:
            print(f"  {name}: {compare(found['one'], found[name])}")


if __name__ == "__main__":
    if len(sys.argv) < 6:
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) == 4 else 20)
        sys.exit()
    ranks, sft_dir, reward_dir, iterations, out = int(sys.argv[1]), *sys.argv[2:]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = cache
        names = ["one"] if ranks == 1 else STRATEGIES
        result = {name: run(name, sft_dir, reward_dir, int(iterations)) for name in names}
    torch.save(result, f"{out}.{ranks}.{os.environ.get('RANK', 0)}")
