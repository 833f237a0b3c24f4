"""`lit-rlhf consolidate DIRECTORY FILE`: a sharded checkpoint (one file a rank) becomes one whole file, which every strategy resumes from.

The reverse needs no command: a run whose strategy saves shards resumes from a whole file. Lightning's own consolidate_checkpoint knows
FSDP1's directories only, and leaves optimizer states that a single process cannot load.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lit_rlhf.checkpoint_io import AtomicCheckpointIO
from lit_rlhf.strategies import METADATA, is_complete


def consolidate(directory: str | Path, file: str | Path) -> Path:
    """Writes the checkpoint in `directory` as one file, without networks that did not train; it must fit in this machine's memory.

    Raises FileNotFoundError for what is no complete sharded checkpoint, FileExistsError where `file` is there already.
    """
    directory, file = Path(directory), Path(file)
    if not is_complete(directory):
        what = "was cut off while it was written" if list(directory.glob("*.distcp")) else "is no sharded checkpoint"
        raise FileNotFoundError(
            f"{directory} {what}: it has no {METADATA}" + ("" if directory.is_dir() else " (there is no such directory)")
        )
    if file.exists():
        raise FileExistsError(f"{file} exists; name another file")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as place:  # beside the target, which has to hold as much anyway
        dcp_to_torch_save(directory, f"{place}/tensors")
        tensors = torch.load(f"{place}/tensors", mmap=True, weights_only=True)
        rest = torch.load(directory / METADATA, weights_only=True)
        AtomicCheckpointIO().save_checkpoint(merged(tensors, rest), file)
    return file


def merged(tensors: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """A whole checkpoint as Lightning writes it, from FSDP1's or FSDP2's entries ("model" and "state_dict" in their words)."""
    weights = tensors.get("model", tensors.get("state_dict"))
    numbered = sorted((int(found[1]), key) for key in tensors if (found := re.fullmatch(r"optimizer_(\d+)", key)))
    states = [tensors[key] for _, key in numbered]
    trained = {name.split(".")[0] for state in states for group in state["param_groups"] for name in group["params"]}
    if trained:
        weights = {name: value for name, value in weights.items() if name.split(".")[0] in trained}
    return rest | {"state_dict": weights, "optimizer_states": states}


def main(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(prog="lit-rlhf consolidate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("directory", help="a checkpoint that a sharded strategy wrote")
    parser.add_argument("file", help="the whole checkpoint to make")
    found = parser.parse_args(list(args))
    try:
        file = consolidate(found.directory, found.file)
    except (FileNotFoundError, FileExistsError) as error:
        sys.stderr.write(f"lit-rlhf: error: {error}\n")
        return 2
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB; resume with --ckpt_path {file}")
    return 0
