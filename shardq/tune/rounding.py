"""Integers whose rounding is learned: codes of w / scale + V under scales of extremes times factors, and how a loss
changes with V and the factors.

Source: W. Cheng et al., arXiv:2309.05516, in the form of auto-round 0.16.1 (`data_type/int.py`: quant_tensor_sym,
quant_tensor_asym): a symmetric scale is the larger extreme over 2^(bits-1), with the sign that puts it on the larger
side of the range; rounding passes gradients through, saturation does not. Scales have the value that the layout stores
before codes are taken, so what a loss sees is what a reader gets. Affine codes of MLX are ours: the lower extreme as
it is stored takes the place of a zero point.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from shardq.errors import BadOption
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.scales import STORED
from shardq.schemes import WEIGHT_TYPE, Scheme

Rule = Literal["symmetric", "zero", "bias"]
LEAST: Final = 1e-5  # magnitude of a scale, rounded as it is (auto-round's q_scale_thresh)
TYPES: Final = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Grid:
    """Groups of weights, and the numbers that they may become."""

    weight: Tensor  # [groups, columns of a group], fp32; a short last group of a row is filled with zeros
    low: Tensor  # [groups], at most 0
    high: Tensor  # [groups], at least 0
    columns: int  # of a row
    rule: Rule
    bits: int
    stored: torch.dtype  # of scales

    @property
    def groups(self) -> int:
        """In a row."""
        return -(-self.columns // self.weight.shape[1])


@dataclass(frozen=True, slots=True)
class Rounded:
    """What groups become."""

    levels: Tensor  # [groups, columns of a group]: signed, or from 0 up, as fp32
    saturated: Tensor  # bool: V has no say
    scales: Tensor  # [groups, 1]
    shift: Tensor  # [groups, 1]: weight = scale * level - scale * zero, or + bias; 0 where symmetric


def check_scheme(scheme: Scheme) -> None:
    """Raises BadOption for a scheme whose codes are no integers, or whose scales depend on more than a group."""
    if not scheme.format.is_integer or scheme.group_rows > 1 or scheme.reach != "group" or scheme.block:
        raise BadOption(
            f"SignRound learns the rounding of integers, and {scheme.name} has other codes: take --algorithm gptq"
        )


def make_grid(weight: Tensor, scheme: Scheme, dtype: str) -> Grid:
    """The grid of a weight [rows, columns], fp32, that the checkpoint has in `dtype`. Raises as `check_scheme`."""
    check_scheme(scheme)
    columns = weight.shape[1]
    group = scheme.group_columns(columns)
    padded = torch.nn.functional.pad(weight, (0, -columns % group)) if columns % group else weight
    grouped = padded.reshape(-1, group).contiguous()
    rule: Rule = "bias" if scheme.numbers == "mlx" else "symmetric" if scheme.symmetric else "zero"
    stored = TYPES[STORED[dtype] if scheme.scale == WEIGHT_TYPE else scheme.scale]
    low, high = grouped.amin(1).clamp(max=0), grouped.amax(1).clamp(min=0)
    return Grid(grouped, low, high, columns, rule, scheme.bits, stored)


def round_groups(grid: Grid, v: Tensor, low_factor: Tensor, high_factor: Tensor) -> Rounded:
    """Levels and scales for V [groups, columns of a group] and factors [groups] from 0 to 1."""
    low, high = grid.low * low_factor, grid.high * high_factor
    if grid.rule == "symmetric":
        most = 1 << (grid.bits - 1)
        larger = torch.where(high < -low, -low, -high)
        scales = _stored(larger / most, grid.stored)[:, None]
        raw = (grid.weight / scales + v).round()
        return Rounded(raw.clamp(-most, most - 1), (raw < -most) | (raw > most - 1), scales, torch.zeros_like(scales))
    most = (1 << grid.bits) - 1
    scales = _stored((high - low) / most, grid.stored)[:, None]
    if grid.rule == "zero":
        shift = (-low[:, None] / scales).round().clamp(0, most)
        raw = (grid.weight / scales + v).round() + shift
    else:
        shift = low.to(grid.stored).float()[:, None]
        raw = ((grid.weight - shift) / scales + v).round()
    return Rounded(raw.clamp(0, most), (raw < 0) | (raw > most), scales, shift)


def _stored(scales: Tensor, kind: torch.dtype) -> Tensor:
    """As they are stored, none nearer to 0 than LEAST; a scale of 0 is positive."""
    kept = scales.to(kind)
    return torch.where(kept < 0, kept.clamp(max=-LEAST), kept.clamp(min=LEAST)).float()


def values_of(grid: Grid, r: Rounded) -> Tensor:
    """What levels stand for, [groups, columns of a group], fp32."""
    if grid.rule == "bias":
        return r.scales * r.levels + r.shift
    return r.scales * (r.levels - r.shift)


class RoundingGradient(torch.autograd.Function):
    """`values_of` what `round_groups` makes, with the gradients of V and of the factors; the weight has none."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, low_factor: Tensor, high_factor: Tensor, grid: Grid) -> Tensor:
        """Values [groups, columns of a group]."""
        r = round_groups(grid, v, low_factor, high_factor)
        ctx.save_for_backward(low_factor, high_factor, r.levels.to(torch.int16), r.saturated, r.scales, r.shift)
        ctx.grid = grid
        return values_of(grid, r)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """By the chain rule with rounding as the identity; at a tie of the extremes both have a part."""
        low_factor, high_factor, levels, saturated, scales, shift = ctx.saved_tensors
        grid: Grid = ctx.grid
        (grad,) = grads
        by_level = (grad * scales).masked_fill_(saturated, 0)  # d loss / d V
        weight = grid.weight - shift if grid.rule == "bias" else grid.weight
        offset = shift if grid.rule == "zero" else 0.0
        by_scale = (grad * (levels - offset)).sum(1) - (by_level * weight).sum(1) / scales[:, 0] ** 2
        low, high = grid.low * low_factor, grid.high * high_factor
        s = scales[:, 0]
        free = s.abs() > LEAST
        if grid.rule == "symmetric":
            share = torch.where(free, by_scale, 0) / (1 << (grid.bits - 1))
            by_low = torch.where(-low > high, -grid.low * share, 0) + torch.where(-low == high, grid.low * share / 2, 0)
            by_high = torch.where(high > -low, -grid.high * share, 0)
            by_high = by_high + torch.where(-low == high, -grid.high * share / 2, 0)
            return by_level, by_low, by_high, None
        most = (1 << grid.bits) - 1
        if grid.rule == "zero":
            by_shift = by_level.sum(1) - (grad * scales).sum(1)
            by_scale = by_scale + by_shift * low / s**2
            to_low = -by_shift / s
        else:
            to_low = grad.sum(1) - by_level.sum(1) / s
        share = torch.where(free, by_scale, 0) / most
        return by_level, grid.low * (to_low - share), grid.high * share, None


def take_codes(grid: Grid, r: Rounded, scheme: Scheme) -> Quantized:
    """Canonical codes of whole rows."""
    width = grid.groups * grid.weight.shape[1]
    levels = r.levels + (1 << (grid.bits - 1)) if grid.rule == "symmetric" else r.levels
    codes = levels.reshape(-1, width)[:, : grid.columns].to(torch.uint8).contiguous().cpu().numpy()
    scales = r.scales.reshape(-1, grid.groups).contiguous().cpu().numpy()
    shift = r.shift.reshape(-1, grid.groups).contiguous().cpu().numpy()
    if grid.rule == "bias":
        return Quantized(codes, scales, None, biases=shift)
    if grid.rule == "zero":
        return Quantized(codes, scales, shift.astype(np.uint8))
    middle = np.full(scales.shape, 1 << (grid.bits - 1), np.uint8) if scheme.numbers == "auto_round" else None
    return Quantized(codes, scales, middle)
