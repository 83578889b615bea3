"""`python -m bench [OP ...]`: the same as `hypersd bench`, with every option."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .harness import main

parser = argparse.ArgumentParser(prog="bench", description="Time the operators against their peers.")
parser.add_argument(
    "ops", nargs="*", help="operators, or sampler_step, tscd_step [default: all operators and sampler_step]"
)
parser.add_argument("--device", default="cpu")
parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="append one JSON line a row")
parser.add_argument("--shapes", default="", help="only cases whose name starts with this: emoji, sd15, sdxl")
parser.add_argument("--dtype", nargs="+", default=None)
parser.add_argument("--peers", nargs="+", default=None, help="only these providers [default: all but max-autotune]")
parser.add_argument("--seconds", type=float, default=None, help="time for each case and mode")
arguments = parser.parse_args()
sys.exit(
    main(
        arguments.ops, device=arguments.device, json_path=arguments.json, shapes=arguments.shapes,
        dtypes=arguments.dtype, peers=arguments.peers, seconds=arguments.seconds,
    )
)  # fmt: skip
