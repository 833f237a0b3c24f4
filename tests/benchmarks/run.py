"""`make bench`: ours and TRL in turns on the same work, then the table, benchmarks.json and the chart in .bench/.

python tests/benchmarks/run.py --data ../shared/data [--turns 3] [--cases sft reward hh ppo growth] [--wrap quiet] [--keep] [--quick]

--wrap CMD puts CMD before every measuring process, e.g. a lock that keeps others off the machine. --keep takes the results that lie in
.bench/results already, so that an interrupted run goes on; --only measures a part, for a later --keep to take up. --quick measures ours
alone, on tiny models: does the harness work?
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import environments
from cases import CASES, DEFAULT, Run
from equal_work import check_first_step, check_losses, check_ppo
from report import machine, summary, terminal_table, write_chart

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
OTHERS = 0.2  # processor seconds a second


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="the folder of debian_tldr/ and hh_harmless/")
    parser.add_argument("--folder", type=Path, default=ROOT / ".bench", help="environments, models, results")
    parser.add_argument("--torch", default="torch==2.13.0", help="what pip installs first in TRL's environments")
    parser.add_argument("--tokenizer", help="a tokenizer's directory, e.g. SmolLM2's; by default one is trained on the data")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(DEFAULT))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--wrap", default="", help="a command to put before every measuring process")
    parser.add_argument("--only", nargs="+", default=[], help="measure these processes of the cases (cases.py names them) and stop")
    parser.add_argument("--keep", action="store_true", help="take the results that are there")
    parser.add_argument("--quick", action="store_true", help="ours alone, tiny, one turn")
    return parser.parse_args()


class Bench:
    """Starts the measuring processes and keeps what they say."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.results = args, args.folder / ("quick" if args.quick else "results")
        self.work = args.folder / ("quick-work" if args.quick else "work")
        self.results.mkdir(parents=True, exist_ok=True)
        if not args.keep:
            for old in self.results.glob("*"):
                old.unlink()
        self.env = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(args.threads),
            "HF_DATASETS_CACHE": str(args.folder / "cache"),
        }

    def prepare(self) -> None:
        """Models and rows, once."""
        if (self.work / "done").is_file():
            return
        extra = ["--quick"] if self.args.quick else []
        extra += ["--tokenizer", self.args.tokenizer] if self.args.tokenizer else []
        command = [sys.executable, str(HERE / "prepare.py"), "--work", str(self.work), "--data", str(self.args.data), *extra]
        if subprocess.run(command, env=self.env, stdout=sys.stderr).returncode:
            sys.exit("make bench: the models and rows could not be made; the reason stands above")

    def start(self, name: str, side: str, arguments: list[str], wrap: str) -> Path:
        """One process; its output file, which is kept. SystemExit with its last lines where it fails."""
        out = self.results / name
        if out.is_file():
            return out
        stage = arguments[0]
        python = sys.executable if side == "ours" else environments.python_of(self.args.folder, environments.version_for(stage))
        script = HERE / ("ours.py" if side == "ours" else "theirs.py")
        common = ["--work", str(self.work), "--threads", str(self.args.threads), "--out", str(out)]
        command = [*shlex.split(wrap), str(python), str(script), *arguments, *common]
        print(f"  {name} …", end="", flush=True)
        path = {"PYTHONPATH": str(ROOT)} if side == "ours" else {}  # the checkout's lit_rlhf
        done = subprocess.run(command, env=self.env | path, capture_output=True, text=True)
        if done.returncode or not out.is_file():
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            sys.exit(f"\nmake bench: {shlex.join(command)} ended with {done.returncode}:\n{tail}")
        print(" done", flush=True)
        return out

    def measure(self, run: Run, turn: int) -> dict[str, Any]:
        """One turn's figures; measured again, twice at most, where other processes took part of the machine."""
        name = f"{run.name}-{turn}.json"
        for again in (True, True, False):
            found: dict[str, Any] = json.loads(self.start(name, run.side, run.arguments(), self.args.wrap).read_text())
            print(f"    {found['units_per_second']:.3f} a second, peak {found['peak_mib']} MiB", flush=True)
            if (found["others_cpu"] or 0.0) <= OTHERS:
                break
            print(f"    other processes took {found['others_cpu']} processor seconds a second meanwhile", flush=True)
            if again:
                (self.results / name).unlink()
        return found

    def check(self, cases: list[str]) -> dict[str, Any]:
        """Equal work, before any timing."""
        print("equal work", flush=True)
        done: dict[str, Any] = {}
        for name in cases:
            runs = CASES[name].runs
            if name in ("ppo", "growth") and "ppo" not in done:
                ours, theirs = (self.start(f"check-{side}.pt", side, [stage], "") for side, stage in (("ours", "check"), ("trl", "check")))
                done["ppo"] = check_ppo(ours, theirs)
            if name in ("dpo", "rloo"):
                more = ["--responses", str(runs[0].responses), "--batch", str(runs[0].batch)]
                dumps = [self.start(f"check-{name}-{side}.pt", side, [f"check_{name}", *more], "") for side in ("ours", "trl")]
                done[f"{name}_losses"] = check_losses(*dumps, name)
            if name not in ("ppo", "growth", "rloo"):
                files = [self.start(f"check-{run.name}.json", run.side, run.arguments(0), "") for run in runs]
                done[name] = check_first_step(*(json.loads(file.read_text()) for file in files))
        return done


def main() -> None:
    args = options()
    if args.quick:
        args.turns, args.cases = 1, ["sft", "reward", "ppo", "dpo", "rloo"]
    bench = Bench(args)
    bench.prepare()
    if not args.quick:
        for version in (environments.CURRENT, environments.WITH_PPO):
            environments.ensure(args.folder, version, args.torch)
    checked = {} if args.quick or args.only else bench.check(args.cases)
    turns: dict[str, list[dict[str, Any]]] = {}
    for name in args.cases:
        count = min(args.turns, CASES[name].turns or args.turns)
        for turn in range(count):
            print(f"{name}, turn {turn + 1} of {count}", flush=True)
            for run in CASES[name].runs:
                if (run.side == "ours" or not args.quick) and (not args.only or run.name in args.only):
                    turns.setdefault(run.name, []).append(bench.measure(run, turn))
    if args.only:
        return
    record = {"machine": machine(args.threads, args.wrap), "model": json.loads((bench.work / "models.json").read_text())}
    record |= {"equal_work": checked, "summary": summary(args.cases, turns), "turns": turns}
    out = args.folder / ("quick.json" if args.quick else "benchmarks.json")
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(terminal_table(record), f"\nall figures: {out}")
    if "growth" in args.cases:
        write_chart(record, args.folder / "growth.svg")


if __name__ == "__main__":
    main()
