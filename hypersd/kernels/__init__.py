"""Operators on latents, and what runs them. Tensors and coefficients only: no models here."""

from __future__ import annotations

from hypersd.kernels._op import explain, use
from hypersd.kernels.affine_step import affine_step

__all__ = ["affine_step", "explain", "use"]
