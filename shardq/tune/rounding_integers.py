"""Integers whose rounding is learned.

Source: auto-round 0.16.1 (`data_type/int.py`: quant_tensor_sym, quant_tensor_asym): a symmetric scale is the larger
extreme over 2^(bits-1), with the sign that puts it on the larger side of the range; rounding passes gradients through,
saturation does not. Scales have the value that the layout stores before codes are taken, so what a loss sees is what a
reader gets. Affine codes of MLX are ours: the lower extreme as it is stored takes the place of a zero point.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import torch
from torch import Tensor

from shardq.quantizers.quantized import Quantized
from shardq.quantizers.scales import STORED
from shardq.schemes import WEIGHT_TYPE, Scheme
from shardq.tune.rounding_parts import HALF, TYPES, Kept, Rounded, in_groups, pack_pairs, row_tiles, unpack_pairs

if TYPE_CHECKING:
    from shardq.kernels import KernelSet

Rule = Literal["symmetric", "zero", "bias"]
LEAST: Final = 1e-5  # magnitude of a scale, rounded as it is (auto-round's q_scale_thresh)


@dataclass(frozen=True, slots=True)
class IntegerGrid:
    """Members as in Grid. Rounded: levels signed, or from 0 up; `shift` a zero point or a bias."""

    source: Tensor  # [rows, columns], floats
    group: int  # columns of a group
    low: Tensor  # [groups], at most 0
    high: Tensor  # [groups], at least 0
    rule: Rule
    bits: int
    stored: str
    with_zeros: bool  # codes of symmetric integers come with zero points in the middle
    is_finite: bool

    @property
    def weight(self) -> Tensor:
        """See Grid: [groups, columns of a group]."""
        return in_groups(self.source.float(), self.group).flatten(0, 1)

    @property
    def columns(self) -> int:
        """See Grid."""
        return self.source.shape[1]

    @property
    def groups(self) -> int:
        """In a row."""
        return -(-self.columns // self.group)

    @property
    def rows(self) -> int:
        """See Grid."""
        return len(self.source)

    @property
    def form(self) -> tuple[int, ...]:
        """See Grid."""
        return (self.rows * self.groups, self.group)

    @property
    def extremes(self) -> tuple[Tensor, Tensor]:
        """See Grid."""
        return self.low, self.high

    def lines(self, rows: slice) -> slice:
        """See Grid."""
        return slice(rows.start * self.groups, rows.stop * self.groups)

    def by_rows(self, factors: Sequence[Tensor]) -> tuple["IntegerGrid", tuple[Tensor, ...]]:
        """See Grid."""
        return self, tuple(factors)

    def part(self, rows: slice) -> "IntegerGrid":
        """See Grid."""
        own = self.lines(rows)
        return replace(self, source=self.source[rows].float(), low=self.low[own], high=self.high[own])

    def round(self, v: Tensor, *factors: Tensor) -> Rounded:
        """See Grid. Factors [groups] are of the lower and the higher extreme."""
        low, high = self.low * factors[0], self.high * factors[1]
        kind = TYPES[self.stored]
        if self.rule == "symmetric":
            most = 1 << (self.bits - 1)
            larger = torch.where(high < -low, -low, -high)
            scales = _stored(larger / most, kind)[:, None]
            raw = (self.weight / scales + v).round()
            return _rounded(raw, -most, most - 1, scales, None)
        most = (1 << self.bits) - 1
        scales = _stored((high - low) / most, kind)[:, None]
        if self.rule == "zero":
            shift = (-low[:, None] / scales).round().clamp(0, most)
            return _rounded((self.weight / scales + v).round() + shift, 0, most, scales, shift)
        shift = low.to(kind).float()[:, None]
        return _rounded(((self.weight - shift) / scales + v).round(), 0, most, scales, shift)

    def values(self, r: Rounded) -> Tensor:
        """See Grid."""
        if r.shift is None:
            return r.scales * r.levels
        return r.scales * r.levels + r.shift if self.rule == "bias" else r.scales * (r.levels - r.shift)

    def pull(self, grad: Tensor, v: Tensor, factors: Sequence[Tensor], r: Rounded) -> tuple[Tensor, ...]:
        """See Grid. Rounding counts as the identity; at a tie of the extremes both have a part."""
        del v
        assert r.saturated is not None
        by_level = (grad * r.scales).masked_fill_(r.saturated, 0)  # d loss / d V
        weight = self.weight - r.shift if self.rule == "bias" and r.shift is not None else self.weight
        levels = r.levels - r.shift if self.rule == "zero" and r.shift is not None else r.levels
        s = r.scales[:, 0]
        by_scale = (grad * levels).sum(1) - (by_level * weight).sum(1) / s**2
        low, high = self.low * factors[0], self.high * factors[1]
        free = s.abs() > LEAST
        if self.rule == "symmetric":
            share = torch.where(free, by_scale, 0) / (1 << (self.bits - 1))
            by_low = torch.where(-low > high, -self.low * share, 0) + torch.where(-low == high, self.low * share / 2, 0)
            by_high = torch.where(high > -low, -self.high * share, 0)
            return by_level, by_low, by_high + torch.where(-low == high, -self.high * share / 2, 0)
        if self.rule == "zero":
            by_shift = by_level.sum(1) - (grad * r.scales).sum(1)
            by_scale = by_scale + by_shift * low / s**2
            to_low = -by_shift / s
        else:
            to_low = grad.sum(1) - by_level.sum(1) / s
        share = torch.where(free, by_scale, 0) / ((1 << self.bits) - 1)
        return by_level, self.low * (to_low - share), self.high * share

    def gather(self, sums: Sequence[Tensor], factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """See Grid."""
        del factors
        return tuple(sums)

    def room_for_codes(self) -> Tensor:
        """See Grid."""
        paired = self.bits <= HALF and self.columns % 2 == 0
        width = self.columns // 2 if paired else self.columns
        return torch.empty((self.rows, width), dtype=torch.uint8, device=self.source.device)

    def keep(self, v: Tensor, r: Rounded) -> Tensor:
        """See Grid: canonical codes, those of four bits and less in pairs."""
        del v
        levels = r.levels + (1 << (self.bits - 1)) if self.rule == "symmetric" else r.levels
        codes = levels.reshape(self.rows, -1)[:, : self.columns].to(torch.uint8)
        return pack_pairs(codes) if self.bits <= HALF else codes

    def take_codes(self, kept: Kept, rows: slice, kernels: "KernelSet") -> Quantized:
        """See Grid."""
        del kernels
        codes = unpack_pairs(kept.levels[rows], self.columns).contiguous().cpu().numpy()
        scales = kept.scales.reshape(-1, self.groups)[rows].contiguous().cpu().numpy()
        if kept.shift is None:
            middle = 1 << (self.bits - 1)
            return Quantized(codes, scales, np.full(scales.shape, middle, np.uint8) if self.with_zeros else None)
        shift = kept.shift.reshape(-1, self.groups)[rows].contiguous().cpu().numpy()
        if self.rule == "bias":
            return Quantized(codes, scales, None, biases=shift)
        return Quantized(codes, scales, shift.astype(np.uint8))


def make_integers(weight: Tensor, scheme: Scheme, dtype: str, ends: tuple[Tensor, Tensor] | None = None) -> IntegerGrid:
    """As `rounding.make_grid`."""
    group = scheme.group_columns(weight.shape[1])
    rule: Rule = "bias" if scheme.numbers == "mlx" else "symmetric" if scheme.symmetric else "zero"
    stored = STORED[dtype] if scheme.scale == WEIGHT_TYPE else scheme.scale
    low, high = _extremes(weight, group)
    finite = bool(low.isfinite().all() and high.isfinite().all())
    low, high = low.clamp(max=0), high.clamp(min=0)
    if ends is not None:
        low, high = torch.maximum(low, ends[0].flatten()), torch.minimum(high, ends[1].flatten())
    with_zeros = scheme.numbers == "auto_round"
    return IntegerGrid(weight, group, low, high, rule, scheme.bits, stored, with_zeros, finite)


def _extremes(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Of each group, fp32; NaN where it holds one."""
    lows, highs = [], []
    for rows in row_tiles(weight):
        grouped = in_groups(weight[rows].float(), group).flatten(0, 1)
        lows.append(grouped.amin(1))
        highs.append(grouped.amax(1))
    return torch.cat(lows), torch.cat(highs)


def _rounded(raw: Tensor, least: int, most: int, scales: Tensor, shift: Tensor | None) -> Rounded:
    saturated = (raw < least) | (raw > most)
    return Rounded(raw.clamp(least, most).to(torch.int32), scales, shift, saturated)


def _stored(scales: Tensor, kind: torch.dtype) -> Tensor:
    """As they are stored, none nearer to 0 than LEAST; a scale of 0 is positive."""
    kept = scales.to(kind)
    return torch.where(kept < 0, kept.clamp(max=-LEAST), kept.clamp(min=LEAST)).float()
