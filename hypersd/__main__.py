"""`python -m hypersd` is the `hypersd` command."""

from __future__ import annotations

from hypersd.cli import main

if __name__ == "__main__":
    main()
