"""One process of a run that several share: python -m tests.distill.one_of_several OUT RECIPE.json TROUBLE

Its weights go to OUT/rank<r>. TROUBLE strikes the second process in its second step: "stop" (it is asked to), "nan"
(its loss), "die", or - for none.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hypersd.distill import parallel
from hypersd.distill.methods import METHODS
from hypersd.distill.recipe import parse_recipe
from hypersd.distill.stages import TSCDStage
from hypersd.distill.trainer import Trainer
from hypersd.distill.tscd import TSCD
from hypersd.errors import HypersdError
from tests.distill import toy


def trainer(settings: dict[str, Any], out: Path) -> Trainer:
    data = toy.dataset(300, torch.float64)
    return Trainer(parse_recipe(settings), toy.COMPONENTS, data, out, backbone=toy.Mixture(16, torch.float64))


class Unlucky(TSCD):
    trouble = "-"

    def loss(self, batch: Any, draw: Any) -> torch.Tensor:
        loss = super().loss(batch, draw)
        if parallel.rank() == 1 and draw.progress > 0:
            match self.trouble:
                case "stop":
                    os.kill(os.getpid(), signal.SIGTERM)
                case "nan":
                    return loss * math.nan
                case "die":
                    os._exit(3)
        return loss


def main(out: Path, settings: dict[str, Any], trouble: str) -> None:
    Unlucky.trouble, METHODS[TSCDStage] = trouble, Unlucky
    try:
        with parallel.joined("cpu"):
            backbone = trainer(settings, out).run()
            save_file(backbone.state_dict(), out / f"rank{parallel.rank()}.safetensors")
    except HypersdError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), sys.argv[3])
