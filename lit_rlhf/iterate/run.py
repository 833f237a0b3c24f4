"""`lit-rlhf iterate --sft DIR --reward reward.yaml --ppo ppo.yaml --gold|--judge|--people`: iterated RLHF, resumable, in one command."""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lit_rlhf.data
import lit_rlhf.modules
from lit_rlhf import cli
from lit_rlhf.cli_errors import one_line, parameter_names
from lit_rlhf.data.read import BadRow
from lit_rlhf.iterate import fits, labels
from lit_rlhf.iterate.evaluation import evaluate
from lit_rlhf.iterate.report import as_text, outcome, report
from lit_rlhf.iterate.rounds import Round, earlier_comparisons, read_rows, write_comparisons, write_json, write_rows
from lit_rlhf.iterate.sampling import choose, prepared, respond, round_rows
from lit_rlhf.modules import PPO, PairwiseReward
from lit_rlhf.pretrained import check_source
from lit_rlhf.report.tensorboard import publish

WAITING = 3  # exit code of a run that waits for people
MAY_CHANGE = ("rounds", "out", "stage")  # what another call may give otherwise and still go on
DESCRIPTION = (
    "Rounds of: sample responses from several policies, label pairs of them, refit the reward model from SFT on all labels so far, PPO "
    "from SFT. What a round has made is not made again: the same command goes on after an interruption, with the same numbers, and "
    "--rounds may grow. Exit codes: 0 done, 1 a run failed, 2 refused, 3 waits for people's labels, 143 stopped."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `lit-rlhf iterate` with these arguments and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(argv)
    cli.quiet()
    try:
        if options.stage:
            return one_fit(options)
        check(options)
        for number in range(1, options.rounds + 1):
            if code := one_round(Round(options.out, number), options, argv):
                return code
        print(finish(options))
    except labels.Waiting as waiting:
        if Round(options.out, 1).evaluation.is_file():
            print(finish(options))
        print(f"lit-rlhf iterate: {waiting}", flush=True)
        return WAITING
    except (ValueError, FileNotFoundError, RuntimeError, cli.Refused) as error:
        if not (isinstance(error, cli.Refused | BadRow) or cli.raised_here(error)):
            raise
        line = one_line(error, argv, parameter_names(lit_rlhf.modules, lit_rlhf.data))
        return cli.report(line, error, debug=False, code=1 if isinstance(error, RuntimeError) else 2)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lit-rlhf iterate", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--sft", required=True, metavar="DIR", help="the SFT model: both stages start from it in every round")
    parser.add_argument("--reward", nargs="+", required=True, metavar="YAML", help="of the reward stage; then key=value for its options")
    parser.add_argument("--ppo", nargs="+", required=True, metavar="YAML", help="of PPO, whose prompts are sampled from; then key=value")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--gold", help="labels by a reward function's import path or a reward model's directory")
    who.add_argument("--judge", help="labels by a judge as in `lit-rlhf winrate`, a language model's directory say: soft labels")
    who.add_argument("--people", action="store_true", help="stops in every round until people have filled in a file")
    parser.add_argument("--care", type=float, help="with --gold: draw labels with probability sigmoid(care x difference), as people err")
    parser.add_argument("--zero_shot", metavar="DIR", help="the model before SFT, as one more policy to sample from")
    parser.add_argument("--comparisons", metavar="FILE", help="labels from before, which every refit also learns from")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--prompts", type=int, default=256, help="prompts sampled from in a round (%(default)s)")
    parser.add_argument("--responses", type=int, default=2, help="of each policy to each prompt (%(default)s)")
    parser.add_argument("--pairs", type=int, help="pairs labelled for training in a round (default: one a prompt that is not held out)")
    parser.add_argument(
        "--held_out", type=float, default=0.2, help="share of the prompts whose pair no reward model learns from (%(default)s)"
    )
    parser.add_argument("--members", type=int, default=1, help="reward models fitted in a round (%(default)s)")
    parser.add_argument(
        "--spread_coef", type=float, default=1.0, help="of several: PPO's score is their mean less this many spreads (%(default)s)"
    )
    parser.add_argument("--choose", choices=["random", "disputed"], default="random",
                        help="pairs at random, or from round 2 those that the round before's members disagree about most")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of everything (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/iterate"), help="folder for everything (%(default)s)")
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # the fit to run in this process: round/reward-member or round/ppo
    return parser


def check(options: Any) -> None:
    """Raises ValueError or FileNotFoundError for options that cannot work, or that are not those the folder was made with."""
    check_source(options.sft)
    for name in ("rounds", "prompts", "responses", "members"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if not 0 <= options.held_out < 1 or options.prompts - held_out(options) < 1:
        raise ValueError(f"--held_out is {options.held_out} of {options.prompts} prompts: give a share that leaves prompts to train on")
    if options.care is not None and not (options.gold and options.care > 0):
        raise ValueError("--care goes with --gold, and must be above 0")
    if options.pairs is not None and options.pairs < 1:
        raise ValueError(f"--pairs must be at least 1, got {options.pairs}")
    if options.spread_coef < 0:
        raise ValueError(f"--spread_coef must be 0 or more, got {options.spread_coef}")
    if options.choose == "disputed" and options.members < 2:
        raise ValueError("--choose disputed asks where reward models disagree: give --members 2 or more")
    asked = {name: str(value) for name, value in sorted(vars(options).items()) if name not in MAY_CHANGE}
    path = options.out / "iterate.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else asked
    other = [f"--{name} {known.get(name)}" for name in asked if known.get(name) != asked[name]]
    if other:
        raise ValueError(f"{options.out} was made with {', '.join(other)}; give the same, or another --out")
    write_json(path, asked)


def held_out(options: Any) -> int:
    """How many of a round's prompts are held out."""
    return round(options.held_out * options.prompts)


def one_round(now: Round, options: Any, argv: Sequence[str]) -> int:
    """Makes what the round has not made yet; the exit code of the run that failed, else 0. Raises labels.Waiting."""
    run = cache(lambda: prepared(fits.sampling_command(options), options.members))
    key = (options.seed, now.number)
    if not now.responses.is_file():
        _say(now, "sampling")
        rows = round_rows(len(run().datamodule.tables["train"]), now.number, options.prompts, held_out(options), options.seed)
        write_rows(now.responses, respond(run(), policies(now, options), rows, options.responses, key))
    if not now.pairs.is_file():
        apart = held_out(options)
        disputed = options.choose == "disputed" and now.before is not None
        rewards = [str(now.before.reward(m) / "hf") for m in range(options.members)] if disputed and now.before else []
        device = run().trainer.strategy.root_device
        count = options.pairs or options.prompts - apart
        write_rows(now.pairs, choose(read_rows(now.responses), now.number, apart, count, rewards, key, device))
    if not now.labels.is_file():
        _say(now, "labelling")
        labels.label(now, options, key, str(run().trainer.strategy.root_device))
    stages = [(f"reward-{m}", now.reward(m)) for m in range(options.members)] + [("ppo", now.ppo)]
    for name, folder in stages:
        if not fits.is_done(folder):
            if not now.held_out.is_file():
                write_comparisons(now, earlier_comparisons(options.comparisons))
            _say(now, name)
            if code := in_a_process([*argv, f"--stage={now.number}/{name}"]):
                sys.stderr.write(f"lit-rlhf iterate: {folder} ended with code {code}; the same command goes on from there\n")
                return code
    if not now.evaluation.is_file():
        _say(now, "evaluation")
        write_json(now.evaluation, evaluate(run(), now, options))
    return 0


def policies(now: Round, options: Any) -> dict[str, str]:
    """The directories that the round samples from, by name."""
    found = {} if options.zero_shot is None else {"zero-shot": check_source(options.zero_shot)}
    found["sft"] = options.sft
    return found if now.before is None else found | {"current": str(now.before.ppo / "hf" / "policy")}


def in_a_process(argv: Sequence[str]) -> int:
    """Runs one fit in a process of its own, so that its memory is free after it and its ranks are its own; returns the exit code."""
    child = subprocess.Popen([sys.executable, "-m", "lit_rlhf", "iterate", *argv])
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        return child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def one_fit(options: Any) -> int:
    """Runs the fit that --stage names."""
    number, name = options.stage.split("/")
    now = Round(options.out, int(number))
    try:
        if name == "ppo":
            fits.fit(fits.ppo_command(options, now), now.ppo, PPO)
        else:
            member = int(name.removeprefix("reward-"))
            fits.fit(fits.reward_command(options, now, member), now.reward(member), PairwiseReward)
    except fits.Interrupted as error:
        return cli.report(str(error), error, debug=False, code=cli.SIGTERM_EXIT)
    return 0


def _say(now: Round, what: str) -> None:
    print(f"\n== round {now.number}: {what}", flush=True)


def finish(options: Any) -> str:
    """Writes the report of the rounds that have ended; returns what to print."""
    rounds = [now for now in Round(options.out, options.rounds).so_far if now.evaluation.is_file()]
    found = [outcome(now, json.loads(now.evaluation.read_text(encoding="utf-8"))) for now in rounds]
    who = options.gold or options.judge or "people"
    total = sum(one.labels["answered"] for one in found)
    page = report("lit-rlhf iterate", found, f"{len(found)} rounds, {total:,} labels by {who}, seed {options.seed}.")
    return f"\n{as_text(found)}\n{publish(page, options.out)}"


if __name__ == "__main__":
    sys.exit(main())
