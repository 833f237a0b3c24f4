"""`lit-rlhf quickstart`: makes the forum, trains the three stages through the command line, evaluates them and writes the report."""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml

from lit_rlhf import cli
from lit_rlhf.data.text import format_tldr
from lit_rlhf.generation import Sampling
from lit_rlhf.quickstart.evaluate import evaluate
from lit_rlhf.quickstart.model import train_tokenizer, write_untrained
from lit_rlhf.quickstart.report import make_report, stage_table
from lit_rlhf.quickstart.world import write_data
from lit_rlhf.report.tensorboard import publish

DEFAULT_OUT = "runs/quickstart"  # the folder that the shipped YAML files name
SIZES = {
    "sft_train": 14400,
    "sft_valid": 128,
    "comparisons_train": 6400,
    "comparisons_valid": 256,
    "prompts_train": 2048,
    "prompts_valid": 128,
    "held_out": 512,
}
TOKENIZER_ROWS = 2000
STAGES = {
    "sft": "learning from people's summaries",
    "reward": "learning from people's choices",
    "ppo": "learning from the reward model",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `lit-rlhf quickstart` with these arguments and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="lit-rlhf quickstart",
        description="Learns to summarise a made-up forum from made-up people: SFT, reward model, PPO and a report.",
    )
    parser.add_argument("--out", type=Path, default=Path(DEFAULT_OUT), help="folder for everything the run writes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the forum, the weights and all three stages (default: %(default)s)")
    args = parser.parse_args(argv)
    return quickstart(args.out, args.seed)


def quickstart(out: Path, seed: int, sizes: Mapping[str, int] = SIZES, changes: Mapping[str, Sequence[str]] | None = None) -> int:
    """The whole run; returns the exit code of the first stage that fails, else 0.

    Args:
        sizes: rows of each data file, see `world.write_data`.
        changes: more command-line arguments of a stage ("sft", "reward", "ppo"), e.g. for a short run in a test.
    """
    torch.set_num_threads(1)  # so small a model gains nothing from more, and the sums, hence the figures, are then the same every time
    with quiet():
        return _run(out, seed, sizes, changes or {})


def _run(out: Path, seed: int, sizes: Mapping[str, int], changes: Mapping[str, Sequence[str]]) -> int:
    seconds: dict[str, float] = {}
    with timed(seconds, "world", "the forum, its tokenizer and an untrained model"):
        write_data(out / "data", seed, sizes)
        write_untrained(out / "init", train_tokenizer(sft_texts(out / "data" / "sft_train.jsonl")), seed)
    for stage, what in STAGES.items():
        with timed(seconds, stage, what):
            code = cli.main(stage_command(stage, out, seed, changes.get(stage, ())))
        if code:
            return code
    setting = settings("ppo")["model"]["init_args"]
    with timed(seconds, "evaluation", f"{sizes['held_out']} held-out posts"):
        report, samples = evaluate(out, Sampling(**setting["sampling"]), seed)
    report |= {"kl_target": setting["kl_target"], "seconds": {**seconds, "total": sum(seconds.values())}}
    page = publish(make_report(report, samples, out), out)
    print("\n" + stage_table(report))
    print(f"\n{sum(seconds.values()):.0f} s in all. Curves and summaries side by side: {page}")
    return 0


def stage_command(stage: str, out: Path, seed: int, more: Sequence[str] = ()) -> list[str]:
    """`lit-rlhf fit` with the shipped YAML file; where `out` is not its folder, every setting that names that folder is overridden."""
    command = ["fit", "--config", str(config_file(stage)), f"--seed_everything={seed}"]
    for key, value in leaves(settings(stage)):
        moved = replaced(value, DEFAULT_OUT, out.as_posix())
        if moved != value:
            command.append(f"--{key}={moved if isinstance(moved, str) else json.dumps(moved)}")
    return [*command, *more]


def config_file(stage: str) -> Path:
    """The shipped YAML file of a stage."""
    return cli.config_dir() / "quickstart" / f"{stage}.yaml"


def settings(stage: str) -> dict[str, Any]:
    """What the YAML file of a stage says."""
    return yaml.safe_load(config_file(stage).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a config that is no mapping; a list is one value."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def replaced(value: Any, old: str, new: str) -> Any:
    """The value with `old` replaced in every text it holds."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, list):
        return [replaced(item, old, new) for item in value]
    return {key: replaced(item, old, new) for key, item in value.items()} if isinstance(value, dict) else value


def sft_texts(path: Path) -> list[str]:
    """The prompts and summaries of the first rows of an SFT file, as they will be tokenised."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(TOKENIZER_ROWS), strict=False)]
    return [text for row in rows for text in (format_tldr(row["subreddit"], row["title"], row["post"]), " " + row["summary"])]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' progress bars, and without transformers' report that the reward model's head is new."""
    logs = transformers.utils.logging
    verbosity = logs.get_verbosity()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        logs.enable_progress_bar()
        datasets.enable_progress_bars()


@contextmanager
def timed(seconds: dict[str, float], name: str, what: str) -> Iterator[None]:
    """Says what begins and notes how many seconds it took."""
    print(f"\n== {name}: {what}", flush=True)
    begin = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - begin, 1)
