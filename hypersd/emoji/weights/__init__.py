"""The embedded model: a diffusers folder and the evaluators, float16 safetensors. Made by `hypersd.emoji.train`."""

from pathlib import Path

FOLDER = Path(__file__).parent
