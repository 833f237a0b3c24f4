"""Tracker: counts the bytes of all tensors that are alive, op by op, whether they hold numbers or are fake.

What a kernel allocates and frees inside of itself is not seen, nor an allocator's rounding and fragmentation.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tracker(TorchDispatchMode):
    """Counts live storage bytes while active; `peaks()` gives the largest count of each phase.

    A storage is known by its C++ address as long as it lives, so views and tensors that share one count once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.segments: list[tuple[str, Any]] = [("", None)]
        """(phase, mark) of every stretch of the run, in order."""
        self.highs = [0]
        """The largest count of each segment."""
        self._sizes: dict[int, int] = {}
        self._watchers: dict[int, Any] = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> "Tracker":
        tracker, resize = self, self._resize

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            """FSDP2 frees and refills parameters this way, which no op shows."""
            out = resize(storage, size)
            tracker._note(storage)
            return out

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it then does the op on its local tensors, which come by here
        out = func(*args, **(kwargs or {}))
        self.watch(tree_leaves(out))
        return out

    def watch(self, tensors: Iterable[Any]) -> None:
        """Counts these tensors from now on: those that were made before the tracker was active."""
        for tensor in tensors:
            if isinstance(tensor, DTensor):
                tensor = tensor._local_tensor
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within it the peak is kept under `name`."""
        before = self.segments[-1][0]
        self.begin(name)
        try:
            yield
        finally:
            self.begin(before)

    def begin(self, name: str, mark: Any = None) -> None:
        """From now on the peak is kept under `name`."""
        self.segments.append((name, mark))
        self.highs.append(self.live)

    def mark(self, mark: Any) -> None:
        """A new segment of the same phase begins."""
        self.begin(self.segments[-1][0], mark)

    def peaks(self) -> dict[str, int]:
        """The largest count of each phase with a name."""
        return largest(self.segments, self.highs)

    def forget(self) -> None:
        """Drops all peaks so far."""
        self.segments, self.highs = self.segments[-1:], [self.live]

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        if known is None:
            if not size:
                return
            self._watchers[key] = weakref.ref(storage, lambda _: self._forget(key))
        self._sizes[key] = size
        self.live += size - (known or 0)
        if self.live > self.highs[-1]:
            self.highs[-1] = self.live

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
        self._watchers.pop(key, None)


def largest(segments: list[tuple[str, Any]], highs: list[int]) -> dict[str, int]:
    """The largest high of each phase with a name, in the order in which the phases first come."""
    peaks: dict[str, int] = {}
    for (phase, _), high in zip(segments, highs, strict=True):
        if phase:
            peaks[phase] = max(peaks.get(phase, 0), high)
    return peaks
