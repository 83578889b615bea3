"""group_norm_silu on GPUs: Triton kernels and their launches, for both memory orders.

A tile is BP pixels by BC channels of one sample; strides say which of the two is contiguous. Reductions have two
stages: sums by tile and channel go to a small float32 buffer, a second kernel adds them up in order, so bits repeat.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypersd.kernels import _rows
from hypersd.kernels._tune import Config, Program, jit, lookup, tl

TILE = 4096  # elements: 16 a thread, twice 128 bits of a 16-bit type
FINISH = 512  # elements that a second stage adds at a time

# ------------------------------------------------------------------------------------------------------------ kernels


@jit
def _tile(chunks, channels, pixels, stride_pixel, stride_channel, BP: tl.constexpr, BC: tl.constexpr):
    """(sample, channel, valid channels, offset, valid elements) of this program's tile."""
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    pixel = (program % chunks).to(tl.int64) * BP + tl.arange(0, BP)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = channel < channels
    offset = sample * channels * pixels + pixel[:, None] * stride_pixel + channel[None, :].to(tl.int64) * stride_channel
    return sample, channel, inside, offset, (pixel < pixels)[:, None] & inside[None, :]


@jit
def _affine(sample, channel, inside, mean, rstd, weight, bias, channels, groups):
    """mean, rstd, weight and bias of each channel of a tile, as rows."""
    item = sample * groups + channel // (channels // groups)
    mu = tl.load(mean + item, mask=inside, other=0.0)
    inverse = tl.load(rstd + item, mask=inside, other=0.0)
    scale = inverse * 0 + 1.0
    base = inverse * 0
    if weight is not None:
        scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        base = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    return mu[None, :], inverse[None, :], scale[None, :], base[None, :]


@jit
def _shift_of(shift, sample, channel, inside, channels):
    """What is added to each channel of a tile."""
    return tl.load(shift + sample * channels + channel, mask=inside, other=0.0).to(tl.float32)


@jit
def _centered(x, at, valid, mu, shift, sample, channel, inside, channels):
    """x + shift - mean; without a shift nothing is added."""
    value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    if shift is not None:
        value += _shift_of(shift, sample, channel, inside, channels)[None, :]
    return value - mu


@jit
def _derive(dy, z, SILU: tl.constexpr):
    """dy silu'(z)"""
    if SILU:
        gate = tl.sigmoid(z)
        dy = dy * (gate * (1 + z * (1 - gate)))
    return dy


@jit(do_not_specialize=("chunks",))
def _moments_kernel(
    x, residual, h, shift, partial, chunks, channels, pixels, stride_pixel, stride_channel,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations of every channel of a tile, the mean that of x + shift; with a residual those of
    h = x + residual as it is rounded, which is written."""
    sample, channel, inside, offset, valid = _tile(chunks, channels, pixels, stride_pixel, stride_channel, BP, BC)
    value = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + offset, mask=valid, other=0.0).to(tl.float32)
        rounded = value.to(h.dtype.element_ty)
        tl.store(h + offset, rounded, mask=valid)
        value = rounded.to(tl.float32)
    count = tl.minimum(pixels - (tl.program_id(0) % chunks) * BP, BP)
    mean = tl.sum(value, axis=0) / count
    deviation = tl.where(valid, value - mean[None, :], 0.0)
    if shift is not None:
        mean += _shift_of(shift, sample, channel, inside, channels)
    out = partial + tl.program_id(0).to(tl.int64) * 2 * channels + channel
    tl.store(out, mean, mask=inside)
    tl.store(out + channels, tl.sum(deviation * deviation, axis=0), mask=inside)


@jit(do_not_specialize=("chunks", "channels", "groups", "pixels"))
def _finish_moments_kernel(
    partial, mean, rstd, chunks, channels, groups, pixels, eps, BP: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per sample and group: the moments of its tiles together (Chan, Golub and LeVeque)."""
    item = tl.program_id(0)
    group = channels // groups
    base = partial + (item // groups).to(tl.int64) * chunks * 2 * channels + (item % groups) * group
    elements = (pixels * 1.0) * group
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, chunks * group, BLOCK):
        index = start + tl.arange(0, BLOCK)
        chunk = index // group
        count = tl.minimum(pixels - chunk * BP, BP).to(tl.float32)
        at = base + chunk.to(tl.int64) * 2 * channels + index % group
        total += count * tl.load(at, mask=index < chunks * group, other=0.0)
    center = tl.sum(total, axis=0) / elements
    spread = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, chunks * group, BLOCK):
        index = start + tl.arange(0, BLOCK)
        known = index < chunks * group
        chunk = index // group
        count = tl.minimum(pixels - chunk * BP, BP).to(tl.float32)
        at = base + chunk.to(tl.int64) * 2 * channels + index % group
        apart = tl.load(at, mask=known, other=0.0) - center
        spread += tl.where(known, tl.load(at + channels, mask=known, other=0.0) + count * apart * apart, 0.0)
    tl.store(mean + item, center)
    tl.store(rstd + item, tl.div_rn(1.0, tl.sqrt_rn(tl.sum(spread, axis=0) / elements + eps)))


@jit(do_not_specialize=("chunks", "groups"))
def _apply_kernel(
    x, y, mean, rstd, weight, bias, shift, chunks, channels, groups, pixels, stride_pixel, stride_channel,
    SILU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    sample, channel, inside, offset, valid = _tile(chunks, channels, pixels, stride_pixel, stride_channel, BP, BC)
    mu, inverse, scale, base = _affine(sample, channel, inside, mean, rstd, weight, bias, channels, groups)
    centered = _centered(x, offset, valid, mu, shift, sample, channel, inside, channels)
    z = centered * (inverse * scale) + base
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + offset, z.to(y.dtype.element_ty), mask=valid)


@jit(do_not_specialize=("chunks", "groups"))
def _sums_kernel(
    x, dy, partial, mean, rstd, weight, bias, shift, chunks, channels, groups, pixels, stride_pixel, stride_channel,
    SILU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums of dz and dz x^ over the pixels of a tile, by channel."""
    sample, channel, inside, offset, valid = _tile(chunks, channels, pixels, stride_pixel, stride_channel, BP, BC)
    mu, inverse, scale, base = _affine(sample, channel, inside, mean, rstd, weight, bias, channels, groups)
    hat = _centered(x, offset, valid, mu, shift, sample, channel, inside, channels) * inverse
    dz = _derive(tl.load(dy + offset, mask=valid, other=0.0).to(tl.float32), hat * scale + base, SILU)
    out = partial + tl.program_id(0).to(tl.int64) * 2 * channels + channel
    tl.store(out, tl.sum(dz, axis=0), mask=inside)
    tl.store(out + channels, tl.sum(dz * hat, axis=0), mask=inside)


@jit(do_not_specialize=("chunks", "channels", "groups", "pixels"))
def _finish_sums_kernel(partial, rstd, weight, offset, slope, chunks, channels, groups, pixels, BLOCK: tl.constexpr):
    """One program per sample and group: dx = rstd weight dz - ((x + shift - mean) slope + offset)."""
    item = tl.program_id(0)
    group = channels // groups
    first = (item % groups) * group
    base = partial + (item // groups).to(tl.int64) * chunks * 2 * channels + first
    level = tl.zeros((BLOCK,), tl.float32)
    tilt = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, chunks * group, BLOCK):
        index = start + tl.arange(0, BLOCK)
        known = index < chunks * group
        at = base + (index // group).to(tl.int64) * 2 * channels + index % group
        dz = tl.load(at, mask=known, other=0.0)
        dzx = tl.load(at + channels, mask=known, other=0.0)
        if weight is not None:
            scale = tl.load(weight + first + index % group, mask=known, other=0.0).to(tl.float32)
            dz *= scale
            dzx *= scale
        level += dz
        tilt += dzx
    inverse = tl.load(rstd + item)
    factor = inverse / ((pixels * 1.0) * group)
    tl.store(offset + item, tl.sum(level, axis=0) * factor)
    tl.store(slope + item, tl.sum(tilt, axis=0) * factor * inverse)


@jit(do_not_specialize=("rows", "channels"))
def _channel_sums_kernel(partial, dweight, dbias, rows, channels, BR: tl.constexpr, BC: tl.constexpr):
    """The gradients of weight and bias: sums over all tiles of all samples, in order."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = channel < channels
    bias = tl.zeros((BR, BC), tl.float32)
    weight = tl.zeros((BR, BC), tl.float32)
    for start in range(0, rows, BR):
        row = start + tl.arange(0, BR)
        valid = (row < rows)[:, None] & inside[None, :]
        at = partial + row[:, None].to(tl.int64) * 2 * channels + channel[None, :]
        bias += tl.load(at, mask=valid, other=0.0)
        weight += tl.load(at + channels, mask=valid, other=0.0)
    if dweight is not None:
        tl.store(dweight + channel, tl.sum(weight, axis=0).to(dweight.dtype.element_ty), mask=inside)
    if dbias is not None:
        tl.store(dbias + channel, tl.sum(bias, axis=0).to(dbias.dtype.element_ty), mask=inside)


@jit(do_not_specialize=("chunks", "groups"))
def _dx_kernel(
    x, dy, dh, dx, mean, rstd, weight, bias, shift, offset, slope, chunks, channels, groups, pixels, stride_pixel,
    stride_channel, SILU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx of a tile, and dh added to it where there is one."""
    sample, channel, inside, at, valid = _tile(chunks, channels, pixels, stride_pixel, stride_channel, BP, BC)
    mu, inverse, scale, base = _affine(sample, channel, inside, mean, rstd, weight, bias, channels, groups)
    item = sample * groups + channel // (channels // groups)
    level = tl.load(offset + item, mask=inside, other=0.0)[None, :]
    tilt = tl.load(slope + item, mask=inside, other=0.0)[None, :]
    centered = _centered(x, at, valid, mu, shift, sample, channel, inside, channels)
    z = centered * (inverse * scale) + base
    dz = _derive(tl.load(dy + at, mask=valid, other=0.0).to(tl.float32), z, SILU)
    value = dz * (inverse * scale) - (centered * tilt + level)
    if dh is not None:
        value += tl.load(dh + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask=valid)


# ------------------------------------------------------------------------------------------------------------ launches


@dataclass(frozen=True)
class Grid:
    """How one tensor is cut into tiles; `sizes` are the last arguments that every tile kernel takes."""

    batch: int
    channels: int
    groups: int
    pixels: int
    inside: bool  # channels are contiguous
    config: Config

    @property
    def chunks(self) -> int:
        return -(-self.pixels // self.config.blocks["BP"])

    @property
    def tiles(self) -> tuple[int, int]:
        return self.batch * self.chunks, -(-self.channels // self.config.blocks["BC"])

    @property
    def strides(self) -> tuple[int, int]:
        return (self.channels, 1) if self.inside else (1, self.pixels)

    @property
    def options(self) -> dict[str, Any]:
        return {**self.config.blocks, "num_warps": self.config.num_warps}


def config(arch: str, dtype: torch.dtype, channels: int, pixels: int, inside: bool) -> Config:
    """The tuned tile, else 4096 elements: 64 channels by 64 pixels, or 512 pixels by 8 channels."""

    def analytic() -> Config:
        def power(size: int) -> int:
            return 1 << max(size - 1, 0).bit_length()

        if inside:
            block_channels = min(64, power(channels))
            block_pixels = min(TILE // block_channels, power(pixels))
        else:
            block_pixels = min(512, power(pixels))
            block_channels = min(TILE // block_pixels, power(channels))
        warps = max(1, block_pixels * block_channels // 512)
        return Config({"BP": block_pixels, "BC": block_channels}, max(1, warps // 2) if arch == "gfx" else warps)

    name = "group_norm_silu" if inside else "group_norm_silu_outside"
    return lookup(name, arch, dtype, {"channels": channels, "pixels": pixels}, analytic)


def grid(x: Tensor, num_groups: int, inside: bool) -> Grid:
    channels, pixels = x.shape[1], math.prod(x.shape[2:])
    tile = config(_rows.arch(x), x.dtype, channels, pixels, inside)
    return Grid(x.shape[0], channels, num_groups, pixels, inside, tile)


def forward(
    x: Tensor, y: Tensor, num_groups: int, inside: bool, weight: Tensor | None, bias: Tensor | None, eps: float,
    silu: bool, shift: Tensor | None, residual: Tensor | None, h: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fills y, and h where there is a residual; all lie as x does. Returns (mean, rstd)."""
    g = grid(x, num_groups, inside)
    mean, rstd = (torch.empty((g.batch, g.groups), dtype=torch.float32, device=x.device) for _ in range(2))
    partial = torch.empty((g.batch * g.chunks, 2, g.channels), dtype=torch.float32, device=x.device)
    sizes = (g.pixels, *g.strides)
    _moments_kernel[g.tiles](x, residual, h, shift, partial, g.chunks, g.channels, *sizes, **g.options)
    _finish_moments_kernel[(g.batch * g.groups,)](
        partial, mean, rstd, g.chunks, g.channels, g.groups, g.pixels, eps,
        BP=g.config.blocks["BP"], BLOCK=FINISH, num_warps=4,
    )  # fmt: skip
    normalized = x if h is None else h
    _apply_kernel[g.tiles](
        normalized, y, mean, rstd, weight, bias, shift, g.chunks, g.channels, g.groups, *sizes, SILU=silu, **g.options
    )
    return mean, rstd


def backward(
    x: Tensor, dy: Tensor, dx: Tensor | None, num_groups: int, inside: bool, mean: Tensor, rstd: Tensor,
    weight: Tensor | None, bias: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, silu: bool,
    shift: Tensor | None, dh: Tensor | None,
) -> None:  # fmt: skip
    """Fills dx, dweight and dbias where given; dy, dh and dx lie as x does."""
    g = grid(x, num_groups, inside)
    partial = torch.empty((g.batch * g.chunks, 2, g.channels), dtype=torch.float32, device=x.device)
    offset, slope = torch.empty_like(mean), torch.empty_like(mean)
    sizes = (g.chunks, g.channels, g.groups, g.pixels)
    _sums_kernel[g.tiles](x, dy, partial, mean, rstd, weight, bias, shift, *sizes, *g.strides, SILU=silu, **g.options)
    if dx is not None:
        _finish_sums_kernel[(g.batch * g.groups,)](
            partial, rstd, weight, offset, slope, *sizes, BLOCK=FINISH, num_warps=4
        )
        _dx_kernel[g.tiles](
            x, dy, dh, dx, mean, rstd, weight, bias, shift, offset, slope, *sizes, *g.strides, SILU=silu, **g.options
        )
    if dweight is not None or dbias is not None:
        _channel_sums_kernel[(-(-g.channels // 32),)](
            partial, dweight, dbias, g.batch * g.chunks, g.channels, BR=32, BC=32, num_warps=4
        )


# ------------------------------------------------------------------------------------------------------------ programs

_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def programs() -> list[Program]:
    """What ships: channels inside in 16 and 32 bit, channels outside in bfloat16, the second stages."""
    found = []
    for dtype, inside in (
        (torch.bfloat16, True),
        (torch.float16, True),
        (torch.float32, True),
        (torch.bfloat16, False),
    ):
        pointer, tile = _POINTERS[dtype], config("sm90", dtype, 640, 4096, inside)
        one, other = ("stride_channel", "stride_pixel") if inside else ("stride_pixel", "stride_channel")
        numbers = dict.fromkeys(("chunks", "channels", "groups", "pixels", other), "i32")
        statistics = dict.fromkeys(("partial", "mean", "rstd", "offset", "slope"), "*fp32")
        tensors = dict.fromkeys(("x", "y", "h", "residual", "dy", "dx", "dh", "weight", "bias", "shift"), pointer)
        known = {one: 1, **tile.blocks}
        aligned = ("channels", "pixels", other)
        for name, kernel, fixed, streams in (
            ("moments", _moments_kernel, {"residual": None, "h": None}, False),
            ("moments and sum", _moments_kernel, {}, True),
            ("apply", _apply_kernel, {"SILU": True}, True),
            ("sums", _sums_kernel, {"SILU": True}, False),
            ("dx", _dx_kernel, {"SILU": True, "dh": None}, True),
            ("dx and dh", _dx_kernel, {"SILU": True}, True),
        ):
            names = [parameter.name for parameter in kernel.params if parameter.name not in fixed]
            signature = {n: t for n, t in (numbers | statistics | tensors).items() if n in names}
            divisible = tuple(n for n in names if n in tensors or n in statistics or n in aligned)
            found.append(
                Program(
                    f"{name} {pointer[1:]} {'inside' if inside else 'outside'}",
                    kernel,
                    signature,
                    known | fixed,
                    tile,
                    divisible=divisible,
                    streaming=streams,
                    max_registers=96,
                )
            )
    return found + _second_stages()


def _second_stages() -> list[Program]:
    sizes = dict.fromkeys(("chunks", "channels", "groups", "pixels"), "i32")
    moments = {"partial": "*fp32", "mean": "*fp32", "rstd": "*fp32", **sizes, "eps": "fp32"}
    sums = {"partial": "*fp32", "rstd": "*fp32", "weight": "*bf16", "offset": "*fp32", "slope": "*fp32", **sizes}
    channels = {"partial": "*fp32", "dweight": "*bf16", "dbias": "*bf16", "rows": "i32", "channels": "i32"}
    launch = Config({}, num_warps=4)
    return [
        Program("finish moments", _finish_moments_kernel, moments, {"BP": 64, "BLOCK": FINISH}, launch),
        Program("finish sums", _finish_sums_kernel, sums, {"BLOCK": FINISH}, launch),
        Program("channel sums", _channel_sums_kernel, channels, {"BR": 32, "BC": 32}, launch),
    ]
