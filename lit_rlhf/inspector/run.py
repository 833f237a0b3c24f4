"""`lit-rlhf inspect`: one response of a policy, token by token, as a page."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from lit_rlhf import cli
from lit_rlhf.batch import Batch
from lit_rlhf.cli_errors import one_line
from lit_rlhf.data import PromptDataModule
from lit_rlhf.data.collate import collate
from lit_rlhf.generation import Sampling
from lit_rlhf.inspector.colours import summary
from lit_rlhf.inspector.inspection import inspect_response
from lit_rlhf.networks import CausalPolicy, ScalarModel
from lit_rlhf.rollout import Actors, Shaping
from lit_rlhf.scorers import load_scorer
from lit_rlhf.scoring import FunctionScorer


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `lit-rlhf inspect` with these arguments and returns its exit code."""
    options = _parser().parse_args(argv)
    cli.quiet()
    transformers.utils.logging.set_verbosity_error()
    try:
        path = run(options)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        if not cli.raised_here(error):
            raise
        return cli.report(one_line(error), error, debug=False, code=2)
    print(path)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-rlhf inspect",
        description="One response of a policy, token by token: log-probs, KL, reward, value and advantage, in colours.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--policy", required=True, metavar="DIR", help="the policy, e.g. runs/quickstart/ppo/hf/policy")
    add("--reference", required=True, metavar="DIR", help="what KL is measured from: the SFT model")
    add("--value", metavar="DIR", help="the value network; without it there are no values, and advantages are discounted sums of rewards")
    add("--reward", metavar="DIR", help="the reward model, or a reward function's import path; without it the score is 0")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="its text, as the policy reads it")
    what.add_argument("--data", metavar="FILE", help="takes the prompt of one of its rows, as PPO reads them")
    add("--row", type=int, default=0, help="which one, from 0 (default: %(default)s)")
    add("--response", help="a text to look at; without it one is sampled")
    add("--temperature", type=float, default=Sampling.temperature, help="of sampling and of all log-probs (default: %(default)s)")
    add("--max_new_tokens", type=int, default=Sampling.max_new_tokens, help="of a sampled response (default: %(default)s)")
    add("--kl_coef", type=float, default=0.05, help="weight of KL in the reward (default: %(default)s)")
    add("--gamma", type=float, default=Shaping.gamma, help="discount (default: %(default)s)")
    add("--lam", type=float, default=Shaping.lam, help="decay of GAE (default: %(default)s)")
    add(
        "--no_eos_score", type=float, help="replaces the score of a response that did not end (default: -1 with a reward model's directory)"
    )
    add("--seed", type=int, default=0, help="of the sampling noise (default: %(default)s)")
    add("--out", type=Path, default=Path("inspect"), help="folder for report.html and report.json (default: %(default)s)")
    return parser


def run(options: Any) -> Path:
    """Loads the networks, looks at the response, writes the page and returns its path; prints the headline."""
    policy = CausalPolicy.load(options.policy).eval()
    scorer = FunctionScorer(nothing) if options.reward is None else load_scorer(options.reward)
    actors = Actors(
        policy,
        CausalPolicy.load(options.reference).eval(),
        None if options.value is None else ScalarModel.load(options.value).eval(),
        scorer,
    )
    floor = options.no_eos_score
    if floor is None and options.reward is not None and not isinstance(scorer, FunctionScorer):
        floor = -1.0
    found = inspect_response(
        actors,
        options.prompt if options.data is None else read_prompt(options.data, options.row, policy.tokenizer),
        options.response,
        sampling=Sampling(options.max_new_tokens, options.temperature),
        kl_coef=options.kl_coef,
        shaping=Shaping(no_eos_score=floor, whiten_advantages=False, gamma=options.gamma, lam=options.lam),
        seed=options.seed,
    )
    print(summary(found))
    return found.report().write(options.out)


def nothing(prompts: list[str], responses: list[str]) -> list[float]:
    """The score where there is no reward model."""
    return [0.0] * len(responses)


def read_prompt(data: str, row: int, tokenizer: Any) -> Batch:
    """The prompt of one row (from 0) of a file, folder or hub data set, with its columns; ValueError where it has fewer rows."""
    if row < 0:
        raise ValueError(f"--row {row}: rows are counted from 0")
    module = PromptDataModule(data, tokenizer=tokenizer, limit_train_rows=row + 1)
    module.setup("fit")
    table = module.tables["train"]
    if row >= len(table):
        raise ValueError(f"--row {row}: {data} has {len(table)} usable rows, counted from 0")
    return collate(table.fetch([row]))
