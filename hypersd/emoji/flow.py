"""The folder of the flow teacher, in the layout of Stable Diffusion 3.

It shares autoencoder, tokenizer and text encoder with the embedded model, and the package holds each file once. So the
folder is put together in the user's cache: the shared parts are copied, and the text encoder, which stands in both
places that SD3 has for CLIP, gets the projection of its pooled output that SD3 asks for, the identity.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypersd.emoji.weights import FOLDER
from hypersd.errors import HypersdError

FLOW = FOLDER / "flow"  # what belongs to the flow teacher alone: transformer, scheduler, quality
INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "max_sequence_length": 0,  # tokens of T5, which there is none of
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": [None, None],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
    "tokenizer_3": [None, None],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def assemble(own: Path = FLOW, cache: Path | None = None) -> Path:
    """The complete folder for the transformer and scheduler in `own`; made once for each content, in `cache` (unless
    given, $XDG_CACHE_HOME/hypersd or ~/.cache/hypersd). Raises HypersdError where parts are missing or the cache cannot
    be written."""
    if not (own / "transformer" / "config.json").exists():
        raise HypersdError(f"the flow teacher is missing in {own}; train it with python -m hypersd.emoji.train_flow")
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hypersd"
    parts = {name: own / name for name in ("transformer", "scheduler")}
    parts |= {name: FOLDER / name for name in ("vae", "tokenizer", "text_encoder")}
    digest = hashlib.sha256(json.dumps(INDEX).encode())
    try:
        for part in parts.values():
            for file in sorted(part.iterdir()):
                digest.update(f"{part.name}/{file.name}".encode() + file.read_bytes())
        folder = cache / f"emoji-flow-{digest.hexdigest()[:16]}"
        if folder.exists():
            return folder
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".emoji-flow-", dir=cache) as temporary:
            made = Path(temporary) / "model"
            for name in ("transformer", "scheduler", "vae", "tokenizer"):
                shutil.copytree(parts[name], made / name)
            shutil.copytree(parts["tokenizer"], made / "tokenizer_2")
            _write(text_encoder().half(), made / "text_encoder")
            shutil.copytree(made / "text_encoder", made / "text_encoder_2")
            (made / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n", "utf-8")
            try:
                made.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was first
                    raise
    except OSError as error:
        raise HypersdError(
            f"cannot put the flow teacher together in {cache} ({error.strerror or error}); set XDG_CACHE_HOME"
        ) from error
    return folder


def text_encoder() -> Any:
    """The embedded text encoder as SD3's pipeline has it: a CLIPTextModelWithProjection, float32."""
    import torch
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(FOLDER / "text_encoder")).float()
    state = load_file(FOLDER / "text_encoder" / "model.safetensors")
    # transformers 4 wraps the encoder once more than 5
    model.text_model.load_state_dict({key.removeprefix("text_model."): value for key, value in state.items()})
    torch.nn.init.eye_(model.text_projection.weight)
    return model.eval().requires_grad_(False)


def _write(model: Any, folder: Path) -> None:
    """model.save_pretrained without its progress bars."""
    from safetensors.torch import save_file

    folder.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.to_json_file(folder / "config.json")
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
