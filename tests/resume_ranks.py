"""One rank of the resumes under DDP or FSDP2; test_resume.py starts two. Usage: resume_ranks.py RANKS STRATEGY SFT_DIR REWARD_DIR OUT"""

import itertools
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import datasets
import torch
from resume_run import STEPS, run
from strategy_zoo import strategy

ALL = os.environ.get("LIT_RLHF_RESUME_ALL") == "1"
CHAINS = [(1, 2), (3, 4), (4, 5), (4, 8), (7, 8), (9, 10)] + [(1, 4), (5, 8), (6, 9), (8, 9), (8, 11), (10, 11)] * ALL

if __name__ == "__main__":
    name, sft_dir, reward_dir, out = sys.argv[2:]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    table, numbers = {}, itertools.count()
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = cache
        for stage in ("sft", "reward", "ppo", "dpo", "rloo"):

            def again(ckpt=None, stage=stage):
                folder = Path(f"{out}-run{next(numbers)}")  # the same on both ranks
                return run(stage, (sft_dir, reward_dir), ckpt=ckpt, folder=folder, devices=2, strategy=strategy(name))

            whole, wrong = again(), {}
            for step in range(1, STEPS):
                found = again(whole.folder / f"step={step}.ckpt").same(whole, step)
                wrong |= {str(step): found} if found else {}
            for first, second in CHAINS:
                once = again(whole.folder / f"step={first}.ckpt")
                found = again(once.folder / f"step={second}.ckpt").same(whole, second)
                wrong |= {f"{first}, {second}": found} if found else {}
            table[stage] = {"of": STEPS - 1 + len(CHAINS), "wrong": wrong}
    Path(f"{out}.{os.environ['RANK']}").write_text(json.dumps(table))
