"""Operators on latents, and what runs them. Tensors and coefficients only: no models here.

Floating-point means float16, bfloat16, float32 or float64 throughout; a float8 tensor raises TypeError.
"""

from __future__ import annotations

from hypersd.kernels._op import explain, use
from hypersd.kernels.adamw_ema import adamw_ema_
from hypersd.kernels.affine_step import affine_step
from hypersd.kernels.attention import attention
from hypersd.kernels.clip_coefficient import clip_coefficient
from hypersd.kernels.consistency_loss import consistency_loss
from hypersd.kernels.geglu import geglu
from hypersd.kernels.group_norm_silu import group_norm_silu
from hypersd.kernels.lora_conv2d import lora_conv2d
from hypersd.kernels.lora_linear import lora_linear
from hypersd.kernels.lora_linear_routed import lora_linear_routed
from hypersd.kernels.norm_shrink import norm_shrink
from hypersd.kernels.score_gradient import score_gradient

__all__ = [
    "adamw_ema_",
    "affine_step",
    "attention",
    "clip_coefficient",
    "consistency_loss",
    "explain",
    "geglu",
    "group_norm_silu",
    "lora_conv2d",
    "lora_linear",
    "lora_linear_routed",
    "norm_shrink",
    "score_gradient",
    "use",
]
