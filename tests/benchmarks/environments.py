"""TRL's environments: one for each of its versions, made once in .bench/."""

import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
CURRENT, WITH_PPO = "1.16.0", "1.12.0"  # SFT, reward, DPO, RLOO; 1.12.0 is the last release with PPO


def version_for(stage: str) -> str:
    return WITH_PPO if stage in ("ppo", "check") else CURRENT


def python_of(folder: Path, version: str) -> Path:
    return folder / f"trl-{version}" / "bin" / "python"


def ensure(folder: Path, version: str, torch: str) -> Path:
    """That version's python, installed if need be: torch first and alone, as the Makefile does for ours."""
    python, stamp = python_of(folder, version), folder / f"trl-{version}" / ".installed"
    wanted = f"{torch} trl=={version}\n" + (HERE / "trl-constraints.txt").read_text()
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"make bench: installing TRL {version} into {python.parent.parent} (once)", flush=True)
    venv.create(python.parent.parent, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    for what in (torch.split(), [f"trl=={version}", "-c", str(HERE / "trl-constraints.txt")]):
        done = subprocess.run([*pip, *what], stdout=sys.stderr)
        if done.returncode:
            sys.exit(f"make bench: pip could not install {' '.join(what)} into {python.parent.parent}; its message stands above")
    stamp.write_text(wanted)
    return python
