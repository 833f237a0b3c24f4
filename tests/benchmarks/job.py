"""What one measuring process is told: the same command line on both sides. Standard library only: TRL's environments have no lit_rlhf."""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

STAGES = ("sft", "reward", "ppo", "dpo", "rloo", "check", "check_dpo", "check_rloo")
LEARNING_RATE, EPS, WEIGHT_DECAY = 3e-6, 1e-5, 0.01
TEMPERATURE, NEW_TOKENS, PPO_EPOCHS = 0.7, 53, 4
SEED = 0
BETA = {"dpo": 0.1, "rloo": 0.05}  # TRL's defaults
CUT = {"max_prompt_tokens": 512, "overlong": "left"}  # of our DataModules
WARM_UP = {"sft": 2, "reward": 2, "dpo": 2, "ppo": 1, "rloo": 1}


@dataclass
class Job:
    """One process's work; `work` holds what prepare.py made."""

    stage: str
    work: Path
    precision: str = "float32"
    rows: str = ""
    """Name of the file of rows in `work`: sft, reward, hh, prompts, …; by default the stage's own."""
    batch: int = 16
    """Rows, pairs or responses of one optimiser step (PPO: of one iteration)."""
    responses: int = 1
    """Responses per prompt."""
    steps: int = 8
    """Timed steps (PPO: iterations), after the warm-up ones."""
    threads: int = 2
    out: Path | None = None
    profile: Path | None = None

    @property
    def data(self) -> str:
        own = {"ppo": "prompts", "check": "prompts", "rloo": "prompts8", "check_rloo": "prompts8", "dpo": "reward", "check_dpo": "reward"}
        return self.rows or own.get(self.stage, self.stage)

    @property
    def warm_up(self) -> int:
        return WARM_UP.get(self.stage, 0)


def parse() -> Job:
    """The Job that the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True, help="the folder that prepare.py filled: models, tokenizer and rows")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--rows", default="", help="which rows (a file in work, without its suffix)")
    parser.add_argument("--batch", type=int, help="rows, pairs or responses of an optimiser step or iteration")
    parser.add_argument("--responses", type=int, default=1, help="responses per prompt")
    parser.add_argument("--steps", type=int, help="timed steps or iterations")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the result here too")
    parser.add_argument("--profile", type=Path, help="write a table of torch's profiler here (the timings are then worthless)")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    sampled = given["stage"] in ("ppo", "rloo", "check", "check_rloo")
    return Job(**({"batch": 32 if sampled else 16, "steps": 1 if sampled else 8} | given))


def check_scores(responses: list[list[int]]) -> list[float]:
    """Scores of those responses: any numbers that differ."""
    return [len(row) % 5 + row[0] % 3 / 4 for row in responses]


def check_responses(count: int, vocabulary: int, eos: int) -> list[list[int]]:
    """Responses of 1 to NEW_TOKENS random ids for the check of equal work; all but the longest end with EOS."""
    draw, special = random.Random(SEED), 2
    lengths = [NEW_TOKENS, NEW_TOKENS] + [draw.randint(1, NEW_TOKENS - 1) for _ in range(count - 2)]
    rows = [[draw.randrange(special, vocabulary) for _ in range(length)] for length in lengths]
    return [row if len(row) == NEW_TOKENS else [*row[:-1], eos] for row in rows]
