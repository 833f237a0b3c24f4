"""`lit-rlhf` and `python -m lit_rlhf`: quickstart and plan, which use the command line, or the command line itself."""

import sys
from collections.abc import Sequence

from lit_rlhf import cli


def main(args: Sequence[str] | None = None) -> int:
    """Runs `args` (sys.argv[1:] if None) and returns the exit code."""
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] == ["plan"]:
        from lit_rlhf.planning.run import main as plan

        return plan(args[1:])
    if args[:1] != ["quickstart"]:
        return cli.main(args)
    from lit_rlhf.quickstart.run import main as quickstart

    return quickstart(args[1:])


if __name__ == "__main__":
    sys.exit(main())
