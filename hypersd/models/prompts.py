"""Captions to conditions, pictures to latents and back: the frozen parts around the UNet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hypersd.errors import HypersdError
from hypersd.models.load import Components


@torch.no_grad()
def encode_prompts(components: Components, captions: Sequence[str]) -> dict[str, Tensor]:
    """The condition dict of Backbone for a batch of captions, each padded or cut to the tokenizer's length.

    SD1.5: `encoder_hidden_states` (B, tokens, dim), the last hidden state. SDXL: the penultimate hidden states of both
    encoders side by side, `text_embeds` (B, dim) from the second one, and `time_ids` (B, 6) = (original height, width,
    crop top, left, target height, width) for an uncropped picture of the model's own size (Podell et al. 2023, 2.2).
    """
    if not len(captions):
        raise HypersdError("no captions to encode")
    is_pair = len(components.text_encoders) > 1
    states, pooled = [], None
    for tokenizer, encoder in zip(components.tokenizers, components.text_encoders, strict=True):
        ids = tokenizer(
            list(captions),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(components.device)
        output = encoder(ids, output_hidden_states=is_pair)
        states.append(output.hidden_states[-2] if is_pair else output.last_hidden_state)
        pooled = getattr(output, "text_embeds", None)
    cond = {"encoder_hidden_states": torch.cat(states, dim=-1)}
    if is_pair:
        if pooled is None:
            raise HypersdError(f"the second text encoder in {components.folder} has no projected (pooled) output")
        cond["text_embeds"] = pooled
        cond["time_ids"] = _time_ids(components).expand(len(captions), 6).clone()
    return cond


def encode_null(components: Components, batch: int = 1) -> dict[str, Tensor]:
    """The unconditional condition: the empty string, or zeros where the model asks for them (SDXL)."""
    cond = encode_prompts(components, [""])
    if components.force_zeros_for_empty_prompt:
        cond = {name: value if name == "time_ids" else torch.zeros_like(value) for name, value in cond.items()}
    return {name: value.expand(batch, *value.shape[1:]).clone() for name, value in cond.items()}


@torch.no_grad()
def encode_images(components: Components, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] to latents (B, C, H/f, W/f), z = (vae_z - shift) * scale, in the images' dtype.

    With a generator the VAE posterior is sampled, without one its mode is taken.
    """
    factor = components.vae_scale_factor
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
        raise HypersdError(
            f"pictures must be (batch, 3, H, W) with H and W multiples of {factor}, got {tuple(images.shape)}"
        )
    vae = components.vae
    weight = next(vae.parameters())
    posterior = vae.encode(images.to(weight)).latent_dist
    latents = posterior.mode() if generator is None else posterior.sample(generator)
    shift, scale = _vae_affine(components)
    return ((latents - shift) * scale).to(images.dtype)


def decode_latents(components: Components, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) to pictures (B, 3, h f, w f), about [-1, 1] and not clamped, in the latents' dtype.

    Differentiable in the latents: rewards are measured on pictures.
    """
    vae = components.vae
    weight = next(vae.parameters())
    shift, scale = _vae_affine(components)
    z = latents / scale + shift
    return vae.decode(z.to(weight), return_dict=False)[0].to(latents.dtype)


def _vae_affine(components: Components) -> tuple[float, float]:
    config = components.vae.config
    shift = getattr(config, "shift_factor", None)
    return 0.0 if shift is None else float(shift), float(config.scaling_factor)


def _time_ids(components: Components) -> Tensor:
    _, height, width = components.latent_shape
    pixels = [height * components.vae_scale_factor, width * components.vae_scale_factor]
    dtype, device = next(components.text_encoders[-1].parameters()).dtype, components.device
    return torch.tensor([[*pixels, 0, 0, *pixels]], dtype=dtype, device=device)
