"""Kills a PPO run of the quickstart's size again and again, and compares what it ends with to a run that was left alone.

    python tests/chaos.py OUT KILLS [ITERATIONS]      OUT: a folder in which `lit-rlhf quickstart --out OUT` has run

Every kill is a SIGKILL, at a random moment of the run or, every other time, while a checkpoint is being written (its temporary file is
there). Each new life is the same command with `--ckpt_path last`. Prints one line a kill and, at the end, a JSON object.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

BATCH, STEPS_PER_ITERATION = 32, 2


def overlay(folder: Path, iterations: int) -> Path:
    """The quickstart's PPO with small iterations and a checkpoint after every optimiser step."""
    keep = {"dirpath": str(folder / "checkpoints"), "every_n_train_steps": 1, "save_top_k": 2, "monitor": "step", "mode": "max"}
    trainer = {
        "default_root_dir": str(folder),
        "enable_checkpointing": True,
        "max_epochs": iterations,
        "check_val_every_n_epoch": 1000,
        "callbacks": [
            {"class_path": "ExportHF", "init_args": {"dirpath": str(folder / "hf")}},
            {"class_path": "ModelCheckpoint", "init_args": keep | {"filename": "{step}"}},
        ],
    }
    file = folder / "overlay.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({"trainer": trainer, "model": {"init_args": {"batch_size": BATCH}}}))
    return file


def launch(out: Path, folder: Path, iterations: int, log: Path) -> subprocess.Popen:
    """One life of the run."""
    from lit_rlhf.quickstart.run import stage_command

    command = [*stage_command("ppo", out, 0), "--config", str(overlay(folder, iterations)), "--ckpt_path", "last"]
    moved = [part for part in command if not part.startswith(("--trainer.default_root_dir", "--trainer.callbacks"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "lit_rlhf", *moved, "--trainer.enable_progress_bar=false"], stdout=stream, stderr=stream, env=environment
        )


def partials(folder: Path) -> list[str]:
    return [f.name for f in os.scandir(folder / "checkpoints") if f.name.endswith(".partial") and ".probe" not in f.name]


def begun(folder: Path) -> int:
    """The highest step of a whole checkpoint; 0 where there is none."""
    steps = [int(m[1]) for f in (folder / "checkpoints").glob("*.ckpt") if (m := re.search(r"step=(\d+)", f.name))]
    return max(steps, default=0)


def wait_for(condition, process: subprocess.Popen, seconds: float = 300) -> bool:
    """Whether the condition came true before the process ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    raise TimeoutError("the run neither went on nor ended")


def life(out: Path, folder: Path, iterations: int, rng: random.Random, in_save: bool) -> dict:
    """Starts the run, kills it, and says at which step it had begun and what it had written."""
    log, before = folder / "log.txt", begun(folder)
    process = launch(out, folder, iterations, log)
    (folder / "checkpoints").mkdir(exist_ok=True)
    wait_for(lambda: begun(folder) > before, process)
    if in_save:
        target = before + rng.randint(1, 4)
        wait_for(lambda: begun(folder) >= target and partials(folder), process)
    else:
        end = time.monotonic() + rng.uniform(0, 3)
        wait_for(lambda: time.monotonic() > end, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return {
        "from": before,
        "reached": begun(folder),
        "in_save": bool(partials(folder)),
        "resumed": resumed_at(log),
        "ended": process.returncode,
    }


def resumed_at(log: Path) -> int | None:
    """The step at which a life says that it goes on."""
    found = re.search(r"goes on at step (\d+)", log.read_text(errors="replace"))
    return int(found[1]) if found else None


def finish(out: Path, folder: Path, iterations: int) -> float:
    """Lets the run end; its seconds."""
    start = time.monotonic()
    code = launch(out, folder, iterations, folder / "log.txt").wait()
    assert code == 0, (folder / "log.txt").read_text()[-3000:]
    return time.monotonic() - start


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{name}.{k}": v for name in ("policy", "value") for k, v in load_file(folder / "hf" / name / "model.safetensors").items()}


def chaos(out: Path, kills: int, iterations: int, seed: int = 0) -> dict:
    """The whole experiment."""
    rng, root = random.Random(seed), Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR")))
    whole, chopped = root / "whole", root / "chopped"
    whole.mkdir(), chopped.mkdir()
    seconds, lives = finish(out, whole, iterations), []
    for number in range(kills):
        found = life(out, chopped, iterations, rng, in_save=number % 2 == 0)
        expected = found["from"]
        found["right"] = found["resumed"] == expected if expected else found["resumed"] is None
        lives.append(found)
        print(f"kill {number + 1}: {found}", flush=True)
        if found["ended"] != -signal.SIGKILL:
            raise RuntimeError(
                f"the run ended by itself before the kill; give it more iterations: {(chopped / 'log.txt').read_text()[-1500:]}"
            )
    before = begun(chopped)
    finish(out, chopped, iterations)
    last = resumed_at(chopped / "log.txt")
    a, b = weights(whole), weights(chopped)
    return {
        "kills": kills,
        "in_save": sum(found["in_save"] for found in lives),
        "resumed_where_the_last_file_stood": sum(found["right"] for found in lives[1:]) + (last == before),
        "steps": iterations * STEPS_PER_ITERATION,
        "weights_equal": a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a),
        "seconds_undisturbed": round(seconds, 1),
    }


if __name__ == "__main__":
    print(json.dumps(chaos(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 4 * int(sys.argv[2]))))
