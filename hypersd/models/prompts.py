"""Captions to conditions, pictures to latents and back: the frozen parts around the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hypersd.errors import HypersdError
from hypersd.models import networks
from hypersd.models.load import Components

# What is encoded at once, whatever is asked for at once: pixels of four pictures of 512 x 512, and tokens of 8 captions
# of T5's 512. A VAE in float32 holds some 700 numbers for each pixel, so that 16 pictures of 1024 x 1024 take 43 GB.
PIXELS = 4 * 512 * 512
TOKENS = 4096


@torch.no_grad()
def encode_prompts(components: Components, captions: Sequence[str]) -> dict[str, Tensor]:
    """The condition dict of Backbone for a batch of captions, each padded or cut to the tokenizer's length.

    SD1.5: `encoder_hidden_states` (B, tokens, dim), the last hidden state. SDXL: the penultimate hidden states of both
    encoders side by side, `text_embeds` (B, dim) from the second one, and `time_ids` (B, 6) = (original height, width,
    crop top, left, target height, width) for an uncropped picture of the model's own size (Podell et al. 2023, 2.2).
    SD3: the penultimate hidden states of both CLIP encoders side by side, zeros up to T5's width, then T5's tokens
    (zeros where it is left out), and `pooled_projections` (B, dim) of both side by side (Esser et al. 2024, figure 2).
    FLUX: T5's tokens, and the `pooled_projections` of CLIP.
    """
    if not len(captions):
        raise HypersdError("no captions to encode")
    if not components.text_encoders:
        raise HypersdError("the text encoders of this model were let go; load it again to encode captions")
    texts, length = list(captions), components.max_sequence_length or components.tokenizers[0].model_max_length
    size = max(1, TOKENS // length)
    parts = [_encode_part(components, texts[start : start + size]) for start in range(0, len(texts), size)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _encode_part(components: Components, captions: list[str]) -> dict[str, Tensor]:
    match networks.kind(components.network):
        case "sd3":
            return _encode_sd3(components, captions)
        case "flux":
            pooled = _encode_clip(components, 0, captions).pooler_output
            return {"encoder_hidden_states": _encode_t5(components, captions), "pooled_projections": pooled}
        case _:
            return _encode_sd(components, captions)


def encode_null(components: Components, batch: int = 1, negative_prompt: str = "") -> dict[str, Tensor]:
    """The unconditional condition: the empty string, or zeros where the model asks for them (SDXL); or what the picture
    shall not be, a negative prompt."""
    cond = encode_prompts(components, [negative_prompt])
    if components.force_zeros_for_empty_prompt and not negative_prompt:
        cond = {name: value if name == "time_ids" else torch.zeros_like(value) for name, value in cond.items()}
    return {name: value.expand(batch, *value.shape[1:]).clone() for name, value in cond.items()}


def _encode_sd(components: Components, captions: list[str]) -> dict[str, Tensor]:
    is_pair = len(components.text_encoders) > 1
    states, pooled = [], None
    for number in range(len(components.text_encoders)):
        output = _encode_clip(components, number, captions, hidden=is_pair)
        states.append(output.hidden_states[-2] if is_pair else output.last_hidden_state)
        pooled = getattr(output, "text_embeds", None)
    cond = {"encoder_hidden_states": torch.cat(states, dim=-1)}
    if is_pair:
        cond["text_embeds"] = _projected(components, 1, pooled)
        cond["time_ids"] = _time_ids(components).expand(len(captions), 6).clone()
    return cond


def _encode_sd3(components: Components, captions: list[str]) -> dict[str, Tensor]:
    outputs = [_encode_clip(components, number, captions, hidden=True) for number in range(2)]
    pooled = [_projected(components, i, getattr(output, "text_embeds", None)) for i, output in enumerate(outputs)]
    clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    width = int(components.network.config.joint_attention_dim)
    if components.text_encoders[2] is not None:
        t5 = _encode_t5(components, captions)
    else:
        t5 = clip.new_zeros(len(captions), components.max_sequence_length, width)
    if not clip.shape[-1] <= t5.shape[-1] == width:
        raise HypersdError(
            f"the text encoders in {components.folder} give tokens of width {clip.shape[-1]} (CLIP) and {t5.shape[-1]} "
            f"(T5), the transformer wants {width}"
        )
    clip = torch.nn.functional.pad(clip, (0, width - clip.shape[-1]))
    return {
        "encoder_hidden_states": torch.cat([clip, t5.to(clip.dtype)], dim=1),
        "pooled_projections": torch.cat(pooled, dim=-1),
    }


def _encode_clip(components: Components, number: int, captions: list[str], hidden: bool = False) -> Any:
    tokenizer, encoder = components.tokenizers[number], components.text_encoders[number]
    return encoder(_token_ids(tokenizer, encoder, captions, tokenizer.model_max_length), output_hidden_states=hidden)


def _encode_t5(components: Components, captions: list[str]) -> Tensor:
    """(B, max_sequence_length, dim); padding is encoded and seen like everything else."""
    tokenizer, encoder = components.tokenizers[-1], components.text_encoders[-1]
    return encoder(_token_ids(tokenizer, encoder, captions, components.max_sequence_length))[0]


def _token_ids(tokenizer: Any, encoder: Any, captions: list[str], length: int) -> Tensor:
    ids = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return ids.to(next(encoder.parameters()).device)  # the network may be elsewhere while captions are encoded


def _projected(components: Components, number: int, pooled: Tensor | None) -> Tensor:
    if pooled is None:
        which = ("first", "second")[number]
        raise HypersdError(f"the {which} text encoder in {components.folder} has no projected (pooled) output")
    return pooled


@torch.no_grad()
def encode_images(components: Components, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] to latents (B, C, H/f, W/f), z = (vae_z - shift) * scale, in the images' dtype.

    With a generator the VAE posterior is sampled, without one its mode is taken.
    """
    factor = components.pixel_multiple
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
        raise HypersdError(
            f"pictures must be (batch, 3, H, W) with H and W multiples of {factor}, got {tuple(images.shape)}"
        )
    vae = components.vae
    weight = next(vae.parameters())
    size = max(1, PIXELS // (images.shape[2] * images.shape[3]))
    parts = [vae.encode(part.to(weight)).latent_dist for part in images.split(size)]
    # one posterior of all, so that what is drawn does not depend on the parts
    posterior = type(parts[0])(torch.cat([part.parameters for part in parts]))
    latents = posterior.mode() if generator is None else posterior.sample(generator)
    shift, scale = _vae_affine(components, latents)
    return ((latents - shift) * scale).to(images.dtype)


def decode_latents(components: Components, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) to pictures (B, 3, h f, w f), about [-1, 1] and not clamped, in the latents' dtype.

    Differentiable in the latents: rewards are measured on pictures.
    """
    vae = components.vae
    weight = next(vae.parameters())
    shift, scale = _vae_affine(components, latents)
    z = latents / scale + shift
    return vae.decode(z.to(weight), return_dict=False)[0].to(latents.dtype)


def _vae_affine(components: Components, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """(shift, scale); (1, C, 1, 1) each where the VAE has a mean and a standard deviation for every channel."""
    config = components.vae.config
    shift, mean, std = (getattr(config, name, None) for name in ("shift_factor", "latents_mean", "latents_std"))
    scale = float(config.scaling_factor)
    if mean is None or std is None:  # diffusers' pipelines use both or neither
        return 0.0 if shift is None else float(shift), scale
    if shift is not None:
        raise HypersdError("the VAE's config has both shift_factor and latents_mean; which of them counts is unknown")
    mean, std = (torch.tensor(values, device=like.device).view(1, -1, 1, 1) for values in (mean, std))
    return mean, scale / std


def _time_ids(components: Components) -> Tensor:
    _, height, width = components.latent_shape
    pixels = [height * components.vae_scale_factor, width * components.vae_scale_factor]
    weight = next(components.text_encoders[-1].parameters())
    return torch.tensor([[*pixels, 0, 0, *pixels]], dtype=weight.dtype, device=weight.device)
