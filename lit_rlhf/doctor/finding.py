"""A check's result: what was measured, what was expected, and where the two differ, what it means and what to do."""

from dataclasses import dataclass, field
from typing import Literal

Status = Literal["pass", "warn", "fail", "skip"]


class NotMeasurable(Exception):
    """What a check needs is not there (no policy, no pairs, a directory that does not load); the message says what."""


@dataclass
class Finding:
    """What one check found."""

    name: str
    status: Status
    measured: str
    """What was measured, with its unit and interval; of a skipped check why it was not."""
    expected: str = ""
    """The threshold."""
    reason: str = ""
    """What it means that the threshold was missed; empty where the check passed."""
    remedy: str = ""
    """What to do about it; empty where the check passed."""
    numbers: dict[str, float] = field(default_factory=dict)
    """The measured numbers by name, for JSON."""


def judge(
    name: str,
    measured: str,
    expected: str,
    *,
    fail: bool = False,
    warn: bool = False,
    reason: str = "",
    remedy: str = "",
    numbers: dict[str, float] | None = None,
) -> Finding:
    """A Finding that fails, warns or passes; reason and remedy are kept where it does not pass."""
    status: Status = "fail" if fail else "warn" if warn else "pass"
    why = (reason, remedy) if status != "pass" else ("", "")
    return Finding(name, status, measured, expected, *why, numbers or {})
