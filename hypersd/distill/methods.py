"""Which method trains which kind of stage, and whether a model can serve a recipe's stages."""

from __future__ import annotations

from hypersd.distill import parallel
from hypersd.distill.dmd import DMD
from hypersd.distill.dmd2 import DMD2
from hypersd.distill.feedback import Feedback
from hypersd.distill.lcm import LCM
from hypersd.distill.lightning import Lightning
from hypersd.distill.method import Method
from hypersd.distill.pcm import PCM
from hypersd.distill.perflow import PeRFlow
from hypersd.distill.recipe import Recipe
from hypersd.distill.rg_lcd import RGLCD
from hypersd.distill.stages import (
    BaseStage,
    DMD2Stage,
    DMDStage,
    FeedbackStage,
    LCMStage,
    LightningStage,
    PCMStage,
    PeRFlowStage,
    RGLCDStage,
    TCDStage,
    TDDStage,
    TSCDStage,
)
from hypersd.distill.tcd import TCD
from hypersd.distill.tdd import TDD
from hypersd.distill.tscd import TSCD
from hypersd.errors import HypersdError
from hypersd.models.noise_process import NoiseProcess

METHODS: dict[type[BaseStage], type[Method]] = {
    TSCDStage: TSCD,
    TCDStage: TCD,
    LCMStage: LCM,
    PCMStage: PCM,
    TDDStage: TDD,
    PeRFlowStage: PeRFlow,
    LightningStage: Lightning,
    DMD2Stage: DMD2,
    RGLCDStage: RGLCD,
    DMDStage: DMD,
    FeedbackStage: Feedback,
}


def check_run(recipe: Recipe, process: NoiseProcess) -> None:
    """Raises HypersdError (exit code 2) for what would go wrong only later: a stage that a model with this noise
    process cannot serve, and processes that cannot share the passes of a step evenly."""
    count, passes = parallel.started(), recipe.train.accumulation
    if passes % count:
        raise HypersdError(
            f"train.accumulation = {passes} passes a step cannot be shared by {count} processes; set it to a multiple "
            f"of {count} (and train.batch_size, the samples of a pass, so that their product is what you want)",
            exit_code=2,
        )
    for i, stage in enumerate(recipe.stages):
        try:
            stage.fit(process.num_train_timesteps)
            METHODS[type(stage)].metadata(stage, process)
        except (HypersdError, ValueError) as error:
            raise HypersdError(f"stages.{i}: {error}", exit_code=2) from None
