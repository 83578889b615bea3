"""Phased consistency model (Wang et al. 2024, arXiv 2405.18407): the trajectory in phases, one end for each.

Like TSCD with its ends at the boundary, but the boundaries are points of the solver's grid, floor(m N / k) for phase m,
so that no step of the teacher is cut short. The critic of its adversarial consistency loss sees both ends diffused to
a level anywhere in the phase.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hypersd.distill.adversarial import AdversarialConsistency, Ends
from hypersd.distill.competitor_stages import PCMStage
from hypersd.distill.method import Context
from hypersd.distill.parts import Jumps, sampling_metadata
from hypersd.distill.segments import SegmentGrid
from hypersd.models.noise_process import NoiseProcess


class PCM(AdversarialConsistency):
    """The loss of one PCM stage."""

    def __init__(self, stage: PCMStage, context: Context) -> None:
        super().__init__(stage, context)
        self.grid = SegmentGrid.phased(stage.phases, stage.grid, self.process.num_train_timesteps)
        last = np.searchsorted(self.grid.t_b, self.grid.t_b, side="right") - 1
        self.tops = self.grid.t[last]  # of the phase of each point

    def ends(self, jumps: Jumps, with_real: bool = False) -> Ends:
        return replace(super().ends(jumps, with_real), top=self.tops[np.searchsorted(self.grid.t, jumps.t)])

    def points(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.grid.sample(rng, size, "boundary")

    @staticmethod
    def metadata(stage: PCMStage, process: NoiseProcess) -> dict[str, str]:
        """One DDIM step for each phase, from its top."""
        grid = SegmentGrid.phased(stage.phases, stage.grid, process.num_train_timesteps)
        tops = np.append(np.unique(grid.t_b)[1:], grid.t[-1])
        return sampling_metadata("pcm", process, "ddim", {stage.phases: tops[::-1]}, eta=0.0)
