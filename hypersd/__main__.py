"""`python -m hypersd` is the `hypersd` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point; ends the process with the exit code."""
    try:
        from hypersd import cli  # within, for it takes long enough to be interrupted
    except KeyboardInterrupt:
        sys.exit("error: interrupted before anything was begun")
    cli.main()


if __name__ == "__main__":
    main()
