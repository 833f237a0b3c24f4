"""Checkpoint files that are whole or absent: AtomicCheckpointIO for the Trainer, and `newest`, which finds the one to go on from.

Lightning's own writer is not atomic across file systems, does not fsync and writes nothing, silently, to a directory without permission.
The command line adds this one; in Python: `Trainer(plugins=[AtomicCheckpointIO()])`.
"""

import io
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

PARTIAL = ".partial"


class AtomicCheckpointIO(CheckpointIO):
    """Writes a checkpoint beside its target, fsyncs, renames; reads tensors and plain data alone (`weights_only=True`).

    Paths with a scheme (s3://…) are left to Lightning's own writer.
    """

    def __init__(self) -> None:
        self.plain = TorchCheckpointIO()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises RuntimeError naming file, cause and free space; an older file of that name is then as it was."""
        if "://" in str(path):
            self.plain.save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{PARTIAL}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as stream:
                _save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
            sync_directory(path.parent)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"the checkpoint {path} was not written ({reason(error)}; {free_space(path.parent)}); {older(path)}"
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Raises ValueError naming file and cause for what is no checkpoint; nothing in a file is ever executed."""
        if "://" in str(path):
            return self.plain.load_checkpoint(path, map_location=map_location, weights_only=True)
        return read(path, map_location=map_location or "cpu")

    def remove_checkpoint(self, path: str | Path) -> None:
        self.plain.remove_checkpoint(path)


def _save(checkpoint: dict[str, Any], stream: BinaryIO) -> None:
    """torch.save, whose own RuntimeError does not say what the system said."""
    said: list[OSError] = []

    class Listening(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            try:
                return stream.write(data)
            except OSError as error:
                said.append(error)
                raise

    try:
        torch.save(checkpoint, Listening())
    except RuntimeError:
        if said:
            raise said[0] from None
        raise


def read(path: str | Path, *, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """The dictionary in a checkpoint file; with `mmap` the tensors stay on the disk until they are used.

    Raises ValueError for a path that is not there, a directory, a damaged file, one with code in it, or one that Lightning did not write.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no checkpoint at {path} (seen from {Path.cwd()}); `--ckpt_path last` takes the newest of the run")
    if path.is_dir():
        hint = "it is a model directory: name it as the stage's `model` instead" if (path / "config.json").exists() else "give a file"
        raise ValueError(f"the checkpoint {path} is a directory without a sharded checkpoint in it; {hint}")
    try:
        found = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:
        if "Weights only load failed" in str(error):
            raise ValueError(
                f"the checkpoint {path} holds more than tensors and plain data, which could be code: it is not loaded; {older(path)}"
            ) from error
        size = f"{path.stat().st_size:,} bytes"
        raise ValueError(
            f"the checkpoint {path} cannot be read: it is damaged or no checkpoint ({size}; {reason(error)}); {older(path)}"
        ) from error
    if not isinstance(found, dict) or not {"state_dict", "pytorch-lightning_version"} <= found.keys():
        raise ValueError(f"{path} is a torch file, but no checkpoint of a Lightning run; {older(path)}")
    return found


def newest(folders: Iterable[str | Path], *, whole: bool = False) -> Path | None:
    """The newest checkpoint below `folders` that can be read; for each newer one that cannot, a warning says why.

    whole: pass over those of weights alone (`save_weights_only`), which no run can go on from.
    """
    found = {p.resolve() for folder in folders for p in Path(folder).rglob("*.ckpt")}
    for path in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True):
        problem = unreadable(path, whole=whole)
        if problem is None:
            return path
        rank_zero_warn(f"{problem}; going on to the next older one")
    return None


def unreadable(path: Path, *, whole: bool = False) -> str | None:
    """What keeps a checkpoint (a file, or a directory of shards) from being read, or from going on (`whole`); None where nothing does."""
    if path.is_dir():
        missing = [name for name in (".metadata", "meta.pt") if not (path / name).is_file()]
        return f"the sharded checkpoint {path} has no {missing[0]}: it was not finished" if missing else None
    try:
        found = read(path, mmap=True)
    except ValueError as error:
        return str(error)
    return f"the checkpoint {path} holds weights alone (save_weights_only)" if whole and "lr_schedulers" not in found else None


def older(path: Path) -> str:
    """Which other checkpoints lie beside `path`."""
    others = (
        sorted((p for p in path.parent.glob("*.ckpt") if p != path), key=lambda p: p.stat().st_mtime, reverse=True)
        if path.parent.is_dir()
        else []
    )
    return f"the newest other one is {others[0]}" if others else "there is no other one beside it"


def sync_directory(directory: Path) -> None:
    """Makes a rename in `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_space(directory: Path) -> str:
    """How much room the file system of `directory` has, in words."""
    while not directory.exists():
        directory = directory.parent
    status = os.statvfs(directory)
    return f"{amount(status.f_bavail * status.f_frsize)} free"


def amount(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def probe(directory: Path, needed: int) -> None:
    """Raises RuntimeError where a checkpoint of `needed` bytes could not be written to `directory`; removes what killed runs left there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        trial = directory / f".probe.{socket.gethostname()}.{os.getpid()}{PARTIAL}"
        trial.write_bytes(b"x")
        trial.unlink()
    except OSError as error:
        raise RuntimeError(
            f"checkpoints cannot be written to {directory}: {reason(error)}; name another dirpath or mend its permissions"
        ) from error
    for left in directory.glob(f".*.{socket.gethostname()}.*{PARTIAL}"):
        if not Path(f"/proc/{left.name.split('.')[-2]}").exists():
            left.unlink(missing_ok=True)
    status = os.statvfs(directory)
    if status.f_bavail * status.f_frsize < needed:
        raise RuntimeError(
            f"{directory} has {free_space(directory)}, one checkpoint needs {amount(needed)} (and the old one stays until the new "
            "one is whole): free some, or name a dirpath on another disk"
        )


def reason(error: BaseException) -> str:
    """The error on one short line."""
    lines = (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().splitlines()
    return lines[0].split(". ")[0][:160] if lines else type(error).__name__
