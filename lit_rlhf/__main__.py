"""`lit-rlhf` and `python -m lit_rlhf`: the commands that stand apart (`cli.APART`), or the command line itself."""

import importlib
import sys
from collections.abc import Sequence

from lit_rlhf import cli


def main(args: Sequence[str] | None = None) -> int:
    """Runs `args` (sys.argv[1:] if None) and returns the exit code."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] not in cli.APART:
        return cli.main(args)
    return int(importlib.import_module(cli.APART[args[0]][0]).main(args[1:]))


if __name__ == "__main__":
    sys.exit(main())
