"""Trajectory consistency distillation (Zheng et al. 2024, arXiv 2402.19159): one trajectory, every end allowed.

Its loss is TSCD's with one segment and ends drawn uniformly from [0, t']; the defaults of TCDStage are its authors'.
"""

from __future__ import annotations

from hypersd.distill.parts import sampling_metadata
from hypersd.distill.segments import sampling_grids
from hypersd.distill.stages import TCDStage
from hypersd.distill.tscd import TSCD
from hypersd.models.noise_process import NoiseProcess


class TCD(TSCD):
    """The loss of one TCD stage."""

    @staticmethod
    def metadata(stage: TCDStage, process: NoiseProcess) -> dict[str, str]:  # type: ignore[override]
        """1 to 8 steps of gamma-sampling (the tcd solver) on the training grid, those that fit."""
        grids = sampling_grids((1, 2, 4, 8), stage.grid, process.num_train_timesteps)
        return sampling_metadata("tcd", process, "tcd", grids, eta=stage.eta)
