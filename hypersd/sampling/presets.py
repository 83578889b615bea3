"""How to sample from the published Hyper-SD weights, whose files do not say it themselves.

The rules are those of the model card of ByteDance/Hyper-SD; `rules_for` gives them as the metadata that files of this
package carry, so that `sampler_for` treats both alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from hypersd.models.formats import UNSAID_SCALE


@dataclass(frozen=True)
class Preset:
    """One published file. `steps`: the counts it serves, of which the largest is the default.

    `guidance_scale` 1 is none; files with more take a negative prompt. `embedded_guidance` is an input of the network,
    not a second pass. `lora_scale`: the weight of a file that stores
    no alpha. `timesteps`: where the grid is not the solver's own. `kind` is "lora" or "unet" (whole weights).
    """

    base: str
    steps: tuple[int, ...]
    solver: str = "ddim"
    eta: float = 0.0
    guidance_scale: float = 1.0
    lora_scale: float = 1.0
    timesteps: tuple[int, ...] | None = None
    embedded_guidance: float | None = None
    kind: str = "lora"

    @property
    def metadata(self) -> dict[str, str]:
        """What `sampler_for` reads."""
        found = {
            "solver": self.solver,
            "steps": ",".join(map(str, self.steps)),
            "eta": repr(self.eta),
            "guidance_scale": repr(self.guidance_scale),
            "lora_scale": repr(self.lora_scale),
        }
        if self.embedded_guidance is not None:
            found["embedded_guidance"] = repr(self.embedded_guidance)
        return found if self.timesteps is None else found | {"timesteps": json.dumps(self.timesteps)}


def _presets() -> dict[str, Preset]:
    found: dict[str, Preset] = {}
    for name, base in (("SD15", "Stable Diffusion 1.5"), ("SDXL", "Stable Diffusion XL")):
        for steps in (2, 4, 8):
            found[f"Hyper-{name}-{steps}steps-lora"] = Preset(base, (steps,))
        # one file for every count up to 8
        found[f"Hyper-{name}-1step-lora"] = Preset(base, tuple(range(1, 9)), "tcd", eta=1.0)
        for steps in (8, 12):
            found[f"Hyper-{name}-{steps}steps-CFG-lora"] = Preset(base, (steps,), guidance_scale=5.0)
    found["Hyper-SDXL-1step-Unet"] = Preset("Stable Diffusion XL", (1,), "lcm", timesteps=(800,), kind="unet")
    for counts, scale in (((4,), 3.0), ((8, 6), 5.0), ((16, 12), 7.0)):
        found[f"Hyper-SD3-{counts[0]}steps-CFG-lora"] = Preset(
            "Stable Diffusion 3 medium", counts, "euler", guidance_scale=scale, lora_scale=UNSAID_SCALE
        )
    for steps in (8, 16):
        found[f"Hyper-FLUX.1-dev-{steps}steps-lora"] = Preset(
            "FLUX.1 dev", (steps,), "euler", lora_scale=UNSAID_SCALE, embedded_guidance=3.5
        )
    return found


PRESETS: dict[str, Preset] = _presets()


def rules_for(name: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """`metadata` of the file `name` (a path will do), with the published rules where it names no solver."""
    preset = PRESETS.get(PurePath(name).name.removesuffix(".safetensors"))
    if preset is None or "solver" in metadata:
        return dict(metadata)
    return preset.metadata | dict(metadata)
