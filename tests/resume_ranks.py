"""One rank of a stage's resumes; test_resume.py starts two. Usage: resume_ranks.py RANKS STRATEGY STAGE SFT_DIR REWARD_DIR OUT"""

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
STOPS = range(1, STEPS) if ALL else (1, 4, 6, 8, 11)
CHAINS = [(3, 4), (4, 8), (9, 10)] + [(1, 2), (4, 5), (7, 8), (1, 4), (5, 8), (6, 9), (8, 9), (8, 11), (10, 11)] * ALL

if __name__ == "__main__":
    name, stage, sft_dir, reward_dir, out = sys.argv[2:]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    numbers, wrong = itertools.count(), {}

    def again(ckpt=None):
        folder = Path(f"{out}-run{next(numbers)}")  # the same on both ranks
        return run(stage, (sft_dir, reward_dir), ckpt=ckpt, folder=folder, devices=2, strategy=strategy(name))

    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = cache
        whole = again()
        for step in STOPS:
            found = again(whole.folder / f"step={step}.ckpt").same(whole, step)
            wrong |= {str(step): found} if found else {}
        for first, second in CHAINS:
            once = again(whole.folder / f"step={first}.ckpt")
            found = again(once.folder / f"step={second}.ckpt").same(whole, second)
            wrong |= {f"{first}, {second}": found} if found else {}
    Path(f"{out}.{os.environ['RANK']}").write_text(json.dumps({"of": len(STOPS) + len(CHAINS), "wrong": wrong}))
