"""`lit-rlhf frontier --config ppo.yaml --sweep kl_coef=0.01,0.05 [--gold …]`: PPO at every setting, best-of-n beside it, one report."""

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lit_rlhf.data
import lit_rlhf.modules
from lit_rlhf import cli
from lit_rlhf.cli_errors import one_line, parameter_names
from lit_rlhf.frontier import runs
from lit_rlhf.frontier.analysis import best_of_n_marks, laws, own_scales, parting, run_marks, scales
from lit_rlhf.frontier.points import read_points
from lit_rlhf.frontier.report import as_text, report
from lit_rlhf.frontier.sweep import Setting, settings

DESCRIPTION = (
    "Runs PPO at every setting of a sweep, measures each run's checkpoints and best-of-n on the held-out prompts by the reward that PPO "
    "sees (the proxy) and by a gold reward, and plots gain against sqrt(KL). --config files and options as in `fit`. A setting that has "
    "ended is not run again; one that was interrupted goes on from its last checkpoint. Exit codes: 0 done, 1 a run failed, 2 refused."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `lit-rlhf frontier` with these arguments and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options, rest = _parser().parse_known_args(argv)
    cli.quiet()
    try:
        found = settings(options.sweep)
        if options.setting is not None:
            return one(found, options, rest)
        for setting in found:
            code = in_a_process(argv, setting)
            if code:
                sys.stderr.write(f"lit-rlhf frontier: {setting.name} ended with code {code}; the same command goes on from there\n")
                return code
        print(finish(found, options, rest))
    except (ValueError, FileNotFoundError, cli.Refused) as error:
        if not (isinstance(error, cli.Refused) or cli.raised_here(error)):
            raise
        return cli.report(one_line(error, rest, parameter_names(lit_rlhf.modules, lit_rlhf.data)), error, debug=False, code=2)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lit-rlhf frontier", description=DESCRIPTION, allow_abbrev=False)
    keys = "one of PPO's settings, `lr`, or a whole key such as trainer.max_epochs; repeated: all combinations; none: the run as it is"
    parser.add_argument("--sweep", action="append", default=[], metavar="KEY=V1,V2", help=keys)
    parser.add_argument("--gold", help="a reward model's directory, or a reward function's import path")
    parser.add_argument("--every", type=int, help="iterations between two points of a run (default: an eighth of them)")
    parser.add_argument("--best_of", type=int, default=64, help="samples a prompt for best-of-n (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/frontier"), help="folder for everything (%(default)s)")
    parser.add_argument("--setting", help=argparse.SUPPRESS)  # the one to run in this process
    return parser


def in_a_process(argv: Sequence[str], setting: Setting) -> int:
    """Runs one setting in a process of its own, so that its memory is free after it and its ranks are its own; returns the exit code."""
    child = subprocess.Popen([sys.executable, "-m", "lit_rlhf", "frontier", *argv, f"--setting={setting.name}"])
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        return child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def one(found: Sequence[Setting], options: Any, rest: Sequence[str]) -> int:
    """Runs the setting that --setting names."""
    setting = next(s for s in found if s.name == options.setting)
    try:
        runs.run_setting(rest, setting, options.out / setting.folder, options.gold, options.every)
    except runs.Interrupted as error:
        return cli.report(str(error), error, debug=False, code=cli.SIGTERM_EXIT)
    except RuntimeError as error:
        if not cli.raised_here(error):
            raise
        return cli.report(one_line(error), error, debug=False, code=1)
    return 0


def finish(found: Sequence[Setting], options: Any, rest: Sequence[str]) -> str:
    """Best-of-n, the analysis and the report; returns what to print."""
    samples = runs.best_of_n(rest, options.out / "best_of_n", options.gold, options.best_of)
    scale = scales(samples)
    points = {s.name: read_points(options.out / s.folder / "points.jsonl") for s in found}
    zero = {s.name: own_scales(points[s.name]) if s.own_start else scale for s in found}
    marks = {name: run_marks(name, known, zero[name]) for name, known in points.items()}
    chosen = best_of_n_marks(samples, scale)
    fits = {"rl": laws([m for run in marks.values() for m in run], "rl"), "best_of_n": laws(chosen, "best_of_n")}
    partings = [p for name, known in points.items() if (p := parting(name, known, zero[name])) is not None]
    page = report(f"lit-rlhf frontier: {', '.join(options.sweep) or 'one run'}", marks, chosen, fits, partings).write(options.out)
    picks = [f"{options.out / s.folder / 'best'}: {s.name}, what {'gold' if options.gold else 'the proxy'} likes best" for s in found]
    return "\n".join([as_text(partings, fits, marks), *picks, str(page)])


if __name__ == "__main__":
    sys.exit(main())
