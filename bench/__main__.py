"""`python -m bench ...` from a checkout: the same as `hypersd bench ...`."""

from __future__ import annotations

import sys

from hypersd.cli import main

main(["bench", *sys.argv[1:]])
