"""One rank of runs that save, resume, export and evaluate under sharded strategies; test_strategies.py starts it.

Usage: two_ranks_checkpoints.py RANKS SFT_DIR REWARD_DIR OUT (with torchrun's variables set). OUT/one.ckpt is a whole checkpoint of one
process, in mid-iteration; what the runs leave goes into OUT/<strategy>-<whole|sharded>/.
"""

import os
import sys
import tempfile
from pathlib import Path

import datasets
import torch
import two_ranks_uneven
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig
from two_ranks import ROWS, trainer

from lit_rlhf import PPO, SFT, PromptDataModule, Sampling, Schedule, SFTDataModule
from lit_rlhf.callbacks import ExportHF
from lit_rlhf.sharding import gathered

STEPS, AT = 6, 3  # 3 iterations of 2 steps; the checkpoint is from the middle of the second one
KINDS = [(name, sharded) for name in ("fsdp2", "fsdp1") for sharded in (False, True)]


def ppo(sft_dir: str, reward_dir: str) -> PPO:
    def adam(params):
        return torch.optim.AdamW(params, lr=1e-3)

    more = {"batch_size": 16, "responses_per_prompt": 2, "minibatches": 2, "ppo_epochs": 1, "scale_scores": True, "kl_target": 1.0}
    return PPO(sft_dir, reward_model=reward_dir, sampling=Sampling(8, 1.0), optimizer=adam, scheduler=Schedule("linear"), **more)


def data() -> PromptDataModule:
    return PromptDataModule(ROWS, val_data=ROWS[:7], test_data=ROWS[:5], max_prompt_tokens=64, val_batch_size=3)


def weights(fit, module: PPO) -> torch.Tensor | None:
    """Policy and value network as one vector, where this rank has them."""
    with gathered(fit.model) as mine:
        return torch.cat([x.flatten() for n in module.export_networks().values() for x in n.weights().values()]) if mine else None


def train(name: str, dirs: tuple[str, str], out: Path, **more) -> torch.Tensor | None:
    """A whole run that leaves out/step=3.ckpt and an export."""
    keeper = ModelCheckpoint(dirpath=out, filename="{step}", every_n_train_steps=AT, save_top_k=-1, save_last="link")
    fit, module = trainer(name, max_steps=STEPS, enable_checkpointing=True, callbacks=[keeper, ExportHF(f"{out}/hf")], **more), ppo(*dirs)
    fit.fit(module, datamodule=data())
    return weights(fit, module)


def resume(name: str, dirs: tuple[str, str], path: Path, **more) -> torch.Tensor | None:
    fit, module = trainer(name, max_steps=STEPS, **more), ppo(*dirs)
    fit.fit(module, datamodule=data(), ckpt_path=path)
    return weights(fit, module)


def evaluate(name: str, dirs: tuple[str, str], path: Path) -> dict:
    """What validate, test and predict of a checkpoint find, each by a new Trainer and module."""
    found = {}
    for act in ("validate", "test"):
        run = trainer(name)
        getattr(run, act)(ppo(*dirs), datamodule=data(), ckpt_path=path, verbose=False)
        found |= {k: float(v) for k, v in run.callback_metrics.items()}
    rows = [row for batch in trainer(name).predict(ppo(*dirs), datamodule=data(), ckpt_path=path) for row in batch]
    return found | {"rows": sorted((row["prompt"], row["response"]) for row in rows)}


def first_steps(name: str, dirs: tuple[str, str], precision: str) -> dict[str, float]:
    """The first step's loss of SFT and the first minibatch's distance from the rollout in PPO."""
    fit = trainer(name, max_steps=1, precision=precision)
    fit.fit(SFT(dirs[0]), datamodule=SFTDataModule(ROWS, batch_size=16))
    loss = float(fit.callback_metrics["train/loss"])
    fit = trainer(name, max_steps=1, precision=precision)
    fit.fit(ppo(*dirs), datamodule=data())
    return {"loss": loss, "away": float(fit.callback_metrics["ppo/ratio_max_dev"])}


def adapted(name: str, dirs: tuple[str, str]) -> torch.Tensor | None:
    """The policy's weights, adapter merged, after two iterations of PPO with LoRA, whose reference is the policy with its adapter off."""
    lora, sgd = LoraConfig(r=4, target_modules="all-linear"), lambda params: torch.optim.SGD(params, lr=0.5)
    more = {"batch_size": 16, "ppo_epochs": 1, "sampling": Sampling(8, 1.0), "optimizer": sgd, "scheduler": Schedule("constant")}
    more |= {"activation_checkpointing": name != "one"}  # which changes no number
    fit, module = trainer(name, max_steps=2), PPO(dirs[0], reward_model=dirs[1], peft=lora, **more)
    fit.fit(module, datamodule=data())
    return weights(fit, module)


def run(dirs: tuple[str, str], out: Path) -> dict:
    found = {}
    for name, sharded in KINDS:
        place = out / f"{name}-{'sharded' if sharded else 'whole'}"
        found[place.name] = {
            "trained": train(name, dirs, place, sharded=sharded),
            "resumed": resume(name, dirs, place / f"step={AT}.ckpt", sharded=sharded),
            "from one": resume(name, dirs, out / "one.ckpt", sharded=sharded),
        }
        found[place.name] |= {"evaluated": evaluate(name, dirs, place / f"step={STEPS}.ckpt")} if not sharded else {}
    found["ddp"] = {"from one": resume("ddp", dirs, out / "one.ckpt")}
    found["uneven"] = {name: two_ranks_uneven.run(name, *dirs) for name in ("ddp", "fsdp2", "fsdp1")}
    found["uneven texts"] = {name: two_ranks_uneven.same_texts(name, *dirs) for name in ("ddp", "fsdp2", "fsdp1")}
    found["adapted"] = {name: adapted(name, dirs) for name in ("ddp", "fsdp2", "fsdp1")}
    found["precision"] = {
        f"{name} {precision}": first_steps(name, dirs, precision)
        for name in ("ddp", "fsdp2", "fsdp1")
        for precision in ("32-true", "bf16-mixed", "bf16-true")
    }
    return found


if __name__ == "__main__":
    ranks, sft_dir, reward_dir, out = int(sys.argv[1]), *sys.argv[2:]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = cache
        torch.save(run((sft_dir, reward_dir), Path(out)), f"{out}/found.{os.environ.get('RANK', 0)}")
