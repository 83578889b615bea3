"""Load a diffusers-layout folder (SD1.5 or SDXL shaped), safetensors only, never touching the network."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open

from hypersd.errors import HypersdError

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# from 0.40 on diffusers says dtype, as transformers does, and warns of the old name
_OLD_DIFFUSERS = tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 40)


@dataclass
class Components:
    """The parts of one text-to-image model, frozen and in eval mode."""

    unet: Any  # UNet2DConditionModel
    vae: Any  # AutoencoderKL
    text_encoders: list[Any]  # CLIPTextModel, and for SDXL CLIPTextModelWithProjection
    tokenizers: list[Any]
    scheduler_config: dict[str, Any]
    folder: Path
    force_zeros_for_empty_prompt: bool = False

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent at the model's own picture size."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(self.unet.config.in_channels), int(height), int(width)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def to(self, device: str | torch.device) -> Components:
        for module in (self.unet, self.vae, *self.text_encoders):
            module.to(device)
        return self


def load_components(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Components:
    """Load UNet, VAE, text encoders, tokenizers and scheduler config from `folder`.

    One text encoder (SD1.5) or two (SDXL). `dtype` applies to all but a VAE that asks for fp32 (`force_upcast`).
    Raises HypersdError, one line, for: no such folder, no or a wrong model_index.json, a missing part or file, weights
    that exist only as pickles, truncated safetensors, weights that do not fit the config.
    """
    folder = Path(folder)
    index = _read_index(folder)
    unet = _load_part(folder, index, "unet", dtype)
    upcast = _read_json(folder / "vae" / "config.json").get("force_upcast", False)
    vae = _load_part(folder, index, "vae", torch.float32 if upcast else dtype)
    names = [name for name in ("text_encoder", "text_encoder_2") if _is_listed(index, name)]
    if not names:
        raise HypersdError(f"{folder}/model_index.json lists no text_encoder; only text-to-image models can be loaded")
    text_encoders = [_load_part(folder, index, name, dtype) for name in names]
    tokenizers = [_load_tokenizer(folder, index, name.replace("text_encoder", "tokenizer")) for name in names]
    scheduler_config = _read_json(folder / "scheduler" / "scheduler_config.json")
    components = Components(
        unet=unet,
        vae=vae,
        text_encoders=text_encoders,
        tokenizers=tokenizers,
        scheduler_config=scheduler_config,
        folder=folder,
        force_zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", False)),
    )
    for module in (unet, vae, *text_encoders):
        module.requires_grad_(False).eval()
    return components.to(device)


def _read_index(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise HypersdError(f"no model folder at {folder}; give a folder in the diffusers layout")
    if not (folder / "model_index.json").is_file():
        raise HypersdError(f"{folder} has no model_index.json; give a folder in the diffusers layout")
    index = _read_json(folder / "model_index.json")
    for name in ("unet", "vae", "tokenizer", "text_encoder"):
        if not _is_listed(index, name):
            raise HypersdError(
                f"{folder}/model_index.json ({index.get('_class_name', 'no _class_name')}) lists no {name}; "
                "only UNet text-to-image models (SD1.5, SDXL) can be loaded"
            )
    return index


def _is_listed(index: dict[str, Any], name: str) -> bool:
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HypersdError(f"{path} is missing; the model folder is incomplete") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise HypersdError(f"{path} cannot be read as JSON ({_one_line(error)}); copy the model again") from None
    if not isinstance(data, dict):
        raise HypersdError(f"{path} does not hold a JSON object; copy the model again")
    return data


def _class_of(folder: Path, index: dict[str, Any], name: str) -> type:
    library, class_name = index[name]
    cls = None
    if library in ("diffusers", "transformers"):
        cls = getattr(importlib.import_module(library), class_name, None)
    if not isinstance(cls, type) or not hasattr(cls, "from_pretrained"):
        raise HypersdError(
            f"{folder}/model_index.json wants {library}.{class_name} for {name}, which is not a class of the "
            "installed diffusers or transformers"
        )
    return cls


def _load_part(folder: Path, index: dict[str, Any], name: str, dtype: torch.dtype) -> Any:
    cls: Any = _class_of(folder, index, name)
    part = folder / name
    _read_json(part / "config.json")
    variant = _check_weights(part)
    kind = {"torch_dtype" if index[name][0] == "diffusers" and _OLD_DIFFUSERS else "dtype": dtype}
    with _loading(part):
        model, info = cls.from_pretrained(
            part, variant=variant, local_files_only=True, use_safetensors=True, output_loading_info=True, **kind
        )
    for key in ("missing_keys", "mismatched_keys"):
        if info.get(key):
            first = sorted(str(item) for item in info[key])[0]
            raise HypersdError(
                f"the weights in {part} do not fit its config.json: {key[:-5]} {first}; copy the model again"
            )
    return model


def _load_tokenizer(folder: Path, index: dict[str, Any], name: str) -> Any:
    if not _is_listed(index, name):
        raise HypersdError(f"{folder}/model_index.json lists no {name}")
    cls: Any = _class_of(folder, index, name)
    part = folder / name
    if not any((part / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise HypersdError(f"{part} has neither tokenizer.json nor vocab.json; the model folder is incomplete")
    with _loading(part):
        return cls.from_pretrained(part, local_files_only=True)


def _check_weights(part: Path) -> str | None:
    """Raise unless safetensors weights are there and whole; return the variant to load ("fp16" or None)."""
    files = sorted(part.glob("*.safetensors"))
    if not files:
        pickles = [file.name for pattern in _PICKLES for file in part.glob(pattern)]
        if pickles:
            raise HypersdError(f"{part} holds its weights only as a pickle ({pickles[0]}); convert them to safetensors")
        raise HypersdError(f"{part} holds no .safetensors weights; the model folder is incomplete")
    plain = [file for file in files if ".fp16" not in file.name]
    for file in plain or files:
        check_safetensors(file)
    return None if plain else "fp16"


def check_safetensors(path: Path) -> dict[str, str]:
    """The file's metadata; HypersdError when it is missing, truncated or no safetensors file at all."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except FileNotFoundError:
        raise HypersdError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        with open(path, "rb") as raw:
            start = raw.read(3)
        # a zip archive or a bare pickle of any protocol
        if start.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04\x95", b"\x80\x05\x95")):
            raise HypersdError(f"{path} is a pickle, not safetensors, and is not opened; convert it first") from None
        raise HypersdError(f"{path} is truncated or damaged ({_one_line(error)}); copy it again") from None


@contextmanager
def _loading(part: Path) -> Iterator[None]:
    """Without progress bars (four files of one model need none), and with one line for whatever the loaders raise."""
    from transformers.utils import logging

    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:
        raise HypersdError(f"cannot load {part}: {_one_line(error)}") from error
    finally:
        if had_bars:
            logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).split(". ")[0][:200] or type(error).__name__
