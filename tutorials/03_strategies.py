# %% [markdown]
# # 3. Swapping strategies
#
# How a run is spread over devices is the Trainer's business. The modules do not know it, and the numbers do not depend
# on it: a batch is counted in rows over **all** devices, losses are divided by the tokens of the whole step, and the
# noise of sampling belongs to a prompt and a token, not to a process.
#
# Here one PPO run is done three times: in one process, in one process with micro-batches, and with DDP in two
# processes. On this page they are CPU processes, started from the command line as you would start them on GPUs. Then
# come the lines for FSDP, several machines and torchrun.

# %%
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

from lit_rlhf.cli import config_dir
from lit_rlhf.quickstart.model import train_tokenizer, write_untrained

RUNS = Path("runs/03_strategies").absolute()
shutil.rmtree(RUNS, ignore_errors=True)
RUNS.mkdir(parents=True)

# %% [markdown]
# ## A run in a YAML file
#
# The model is a small Llama with random weights, the reward is a function in a file of our own: the share of vowels in
# a response. Neither matters here. Three iterations of 16 responses are enough to see whether the numbers agree.

# %%
prompts = [{"prompt": f"Write a line about the {thing}"} for thing in "sun moon sea wind rain snow fire stone tree bird fish road".split()]
(RUNS / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
write_untrained(RUNS / "model", train_tokenizer(p["prompt"] for p in prompts), seed=0)
(RUNS / "my_rewards.py").write_text("""
def vowels(prompts, responses):
    return [sum(c in "aeiou" for c in r.lower()) / max(len(r), 1) for r in responses]
""")

config = {
    "seed_everything": 1,
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,  # iterations
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    },
    "model": {
        "class_path": "PPO",
        "init_args": {
            "model": str(RUNS / "model"),
            "reward_fn": "my_rewards.vowels",
            "batch_size": 16,
            "ppo_epochs": 2,
            "sampling": {
                "class_path": "lit_rlhf.generation.Sampling",
                "init_args": {"max_new_tokens": 24, "temperature": 1.0, "stop": ["t"]},
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3}},
        },
    },
    "data": {"class_path": "PromptDataModule", "init_args": {"data": str(RUNS / "prompts.jsonl")}},
}
(RUNS / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


# %%
def fit(name, *more):
    """Runs `lit-rlhf fit` with the run's YAML and whatever comes on top, and returns the metrics of each iteration."""
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(RUNS), "name": name, "version": 0}}
    command = [sys.executable, "-m", "lit_rlhf", "fit", "--config", str(RUNS / "run.yaml"), *map(str, more)]
    print("lit-rlhf", " ".join(command[3:]).replace(f"{RUNS}/", "").replace(f"{config_dir().parent}/", ""))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(RUNS), os.environ.get("PYTHONPATH", "")])}  # where my_rewards is found
    start = time.time()
    done = subprocess.run([*command, "--trainer.logger", json.dumps(logger)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    print(f"  {time.time() - start:.0f} s")
    with open(RUNS / name / "version_0" / "metrics.csv") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file) if row.get("rollout/score")]


one = fit("one")

# %% [markdown]
# ## Micro-batches
#
# `accumulate_grad_batches: 4` computes each optimiser step in four parts, for a quarter of the memory. Where other
# libraries average the parts' means, and so weigh the tokens of short parts more, here every part is divided by the
# token count of the whole step.

# %%
accumulated = fit("accumulated", "--trainer.accumulate_grad_batches", 4)

# %% [markdown]
# ## DDP: two processes
#
# An overlay is a second `--config`. `configs/strategy/ddp.yaml` says `accelerator: gpu, devices: -1, strategy: ddp`;
# what comes later on the line wins, so two more arguments turn it into two CPU processes. Each samples and scores half
# of the prompts; then they exchange what they made.

# %%
ddp = fit("ddp", "--config", config_dir() / "strategy" / "ddp.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", 2)

# %% [markdown]
# ## Do they agree?

# %%
NAMES = ["rollout/score", "rollout/kl", "rollout/length", "rollout/entropy", "ppo/policy_loss", "ppo/value_loss", "ppo/approx_kl"]
print(f"{'':20}{'iteration':>10}{'one':>14}{'micro-batches':>16}{'DDP':>14}")
for name in NAMES:
    for i, (a, b, c) in enumerate(zip(one, accumulated, ddp, strict=True)):
        print(f"{name if i == 0 else '':20}{i:>10}{a[name]:>14.6f}{b[name]:>16.6f}{c[name]:>14.6f}")
largest = max(abs(a[name] - other[name]) for runs in (accumulated, ddp) for a, other in zip(one, runs, strict=True) for name in NAMES)
print(f"largest difference {largest:.1e}")

# %% [markdown]
# They agree to rounding. (After many iterations they need not: a rounding difference can tip the choice of one token,
# and from there on the texts differ. They are then two equally good runs.)
#
# ## FSDP: when the model does not fit
#
# `configs/strategy/fsdp.yaml` splits the parameters of every network over the GPUs of the machine (FSDP2, Lightning's
# `ModelParallelStrategy`).
#
# ```bash
# lit-rlhf fit --config run.yaml --config configs/strategy/fsdp.yaml --trainer.devices 4 --trainer.strategy.data_parallel_size 4
# ```
#
# Give both numbers. With `data_parallel_size: auto` Lightning would make one replica and split every tensor over the
# devices; lit_rlhf refuses that. `ExportHF` writes the same plain Hugging Face directory as before, so the next stage
# does not know how the last one was run.
#
# FSDP needs no GPU to be tried: this is the same run, sharded over two CPU processes.

# %%
fsdp = fit(
    "fsdp",
    *("--config", config_dir() / "strategy" / "fsdp.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", 2),
    *("--trainer.strategy.data_parallel_size", 2),
)
print(f"largest difference {max(abs(a[name] - b[name]) for a, b in zip(one, fsdp, strict=True) for name in NAMES):.1e}")

# %% [markdown]
# ## Several machines
#
# `configs/strategy/multinode.yaml` is DDP over `num_nodes` machines. Start the same line on each of them, with
# torchrun:
#
# ```bash
# torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
#     -m lit_rlhf fit --config run.yaml --config configs/strategy/multinode.yaml --ckpt_path last
# ```
#
# or on SLURM with `srun` and one task per GPU; Lightning reads the rest from the environment. `--ckpt_path last`
# resumes where there is a checkpoint and begins afresh where there is none, so one line serves the first start and
# every requeue.
#
# ## What to change when devices are added
#
# * Not `batch_size`: it counts rows over all devices. Not the learning rate either.
# * `accumulate_grad_batches`: lower it, since each device has fewer rows.
# * PPO needs at least one prompt for each device and micro-batch: `batch_size / responses_per_prompt` must be at least
#   `minibatches × accumulate_grad_batches × devices`. It says so at once where this does not hold.
#
# In a notebook the strategy is an argument as well: `L.Trainer(devices=4, strategy="ddp_notebook")`, under the rules
# that Lightning has for it (nothing may have touched a GPU before). For long runs the command line is the calmer place.
