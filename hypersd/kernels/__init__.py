"""Operators on latents, and what runs them. Tensors and coefficients only: no models here."""

from __future__ import annotations

from hypersd.kernels._op import explain, use
from hypersd.kernels.affine_step import affine_step
from hypersd.kernels.consistency_loss import consistency_loss

__all__ = ["affine_step", "consistency_loss", "explain", "use"]
