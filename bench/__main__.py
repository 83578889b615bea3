"""`python -m bench ...` from a checkout: the same as `hypersd bench ...`, with the bench of this checkout."""

from __future__ import annotations

import sys

import bench

sys.modules["hypersd.bench"] = bench  # not that of an installed copy

from hypersd.cli import main  # noqa: E402

main(["bench", *sys.argv[1:]])
