"""One rank of a run of all three stages under DDP, or the whole run in one process; test_two_ranks.py starts it.

Usage: two_ranks.py RANKS SFT_DIR REWARD_DIR OUT.pt (with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, as torchrun does).
"""

import os
import sys
import tempfile

import datasets
import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy

from lit_rlhf import PPO, SFT, PairwiseDataModule, PairwiseReward, PromptDataModule, Sampling, Schedule, SFTDataModule

WORDS = "the cat sat on a mat and then it ate my hat".split()
COMMON = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.05), "scheduler": Schedule("constant")}


def words(start: int, n: int) -> str:
    return " ".join(WORDS[(start * 5 + i * i) % len(WORDS)] for i in range(n))


ROWS = [{"prompt": words(i, 3 + i % 5), "label": words(i + 1, 1 + i % 6)} for i in range(16)]
PAIRS = [{"prompt": words(i, 3 + i % 5), "chosen": words(i, 1 + i % 6), "rejected": words(i + 2, 2 + i % 3)} for i in range(16)]


def trainer(ranks: int) -> L.Trainer:
    more = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": ranks} if ranks > 1 else {"devices": 1}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", max_steps=4, num_sanity_val_steps=0, accumulate_grad_batches=2, **more, **quiet)


def watched(kind: type, key: str) -> type:
    """The module class, writing down every optimiser step's metrics."""

    class Watched(kind):
        def log_dict(self, metrics, *args, **kwargs):
            if any(name.startswith(key) for name in metrics):
                self.seen = [*getattr(self, "seen", []), {name: float(x) for name, x in metrics.items()}]
            super().log_dict(metrics, *args, **kwargs)

    return Watched


def run(ranks: int, sft_dir: str, reward_dir: str) -> dict:
    sampling = Sampling(8, 1.0)
    stages = {
        "sft": (watched(SFT, "train/")(sft_dir, sampling=sampling, **COMMON), SFTDataModule(ROWS, val_data=ROWS[:6], batch_size=8)),
        "reward": (watched(PairwiseReward, "train/")(sft_dir, **COMMON), PairwiseDataModule(PAIRS, val_data=PAIRS[:6], batch_size=8)),
        "ppo": (
            watched(PPO, "ppo/")(
                sft_dir,
                reward_model=reward_dir,
                batch_size=16,
                responses_per_prompt=2,
                minibatches=2,
                ppo_epochs=1,
                sampling=sampling,
                **COMMON,
            ),
            PromptDataModule(ROWS, val_data=ROWS[:6], max_prompt_tokens=64, val_batch_size=4),
        ),
    }
    found = {}
    for name, (module, data) in stages.items():
        fit = trainer(ranks)
        fit.fit(module, datamodule=data)
        weights = torch.cat([p.detach().flatten() for p in module.parameters()])
        validation = {k: float(v) for k, v in fit.callback_metrics.items() if k.startswith("val/")}
        found[name] = {"weights": weights, "steps": module.seen, "validation": validation}
        if name == "reward":
            module.export_networks()
            found[name]["mean"] = float(module.network.mean)
        if name == "ppo":
            found[name]["texts"] = module.tokenizer.batch_decode(list(module.experience.batch.response_ids))
            found[name]["samples"] = sorted((row["prompt"], row["response"]) for row in module.samples)
    return found


def failing(ranks: int, sft_dir: str) -> str:
    """What this rank says when the reward function raises on the last rank alone."""

    def reward_fn(prompts, responses):
        if int(os.environ.get("RANK", 0)) == ranks - 1:
            raise KeyError("lexicon")
        return [0.0] * len(prompts)

    try:
        trainer(ranks).fit(
            PPO(sft_dir, reward_fn=reward_fn, batch_size=8, sampling=Sampling(4, 1.0)),
            datamodule=PromptDataModule(ROWS, max_prompt_tokens=64),
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


if __name__ == "__main__":
    ranks, sft_dir, reward_dir, out = int(sys.argv[1]), *sys.argv[2:]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = cache
        result = run(ranks, sft_dir, reward_dir)
        result["failing"] = failing(ranks, sft_dir)
    torch.save(result, f"{out}.{os.environ.get('RANK', 0)}")
