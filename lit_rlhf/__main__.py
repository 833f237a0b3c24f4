"""`lit-rlhf` and `python -m lit_rlhf`: the commands that stand apart (`APART`), or the command line itself."""

import importlib
import sys
from collections.abc import Sequence

from lit_rlhf import cli

APART = {
    "quickstart": "lit_rlhf.quickstart.run",
    "plan": "lit_rlhf.planning.run",
    "consolidate": "lit_rlhf.consolidate",
    "doctor": "lit_rlhf.doctor.run",
    "frontier": "lit_rlhf.frontier.run",
    "winrate": "lit_rlhf.winrate.run",
    "inspect": "lit_rlhf.inspector.run",
    "learning-curve": "lit_rlhf.learning_curve",
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs `args` (sys.argv[1:] if None) and returns the exit code."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] not in APART:
        return cli.main(args)
    return int(importlib.import_module(APART[args[0]]).main(args[1:]))


if __name__ == "__main__":
    sys.exit(main())
