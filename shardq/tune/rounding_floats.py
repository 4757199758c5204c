"""Small floats whose rounding is learned: MX, NVFP4 and FP8, whatever shares a scale.

Source: auto-round 0.16.1 (`data_type/mxfp.py`: quant_mx; `nvfp.py`: nv_fp4, nvfp4_v2; `fp8.py`: quant_fp8_sym,
quant_block_fp_sym): the element nearest to w / scale + V, under the scale of the largest magnitude times a factor. The
arithmetic of scales and elements is the scheme's own, so that V of 0 and factors of 1 are its round-to-nearest. Global
scales stay. Rounding passes gradients through, saturation does not; but for MX, where auto-round divides an element by
its own power of two, they come out times element / number, and for all but FP8 there is none at 0, where it takes the
sign off.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardq.quantizers.float_scales import E4M3, E5M3, global_scale
from shardq.quantizers.mlx import NEGATIVE_ZERO, NEGATIVE_ZERO_E4M3
from shardq.quantizers.native_fp8 import sign_zeros
from shardq.quantizers.quantized import Quantized
from shardq.schemes import Scheme
from shardq.tune.float_elements import below_halves, lowest_exponent, nearest
from shardq.tune.float_scales import ScaleRule, rule_of
from shardq.tune.rounding_parts import Kept, Part, Rounded, in_groups, row_tiles

if TYPE_CHECKING:
    from shardq.kernels import KernelSet

SIGNED_ZEROS: Final = 6  # bits of elements that keep the sign of a -0
NEARLY_ZERO: Final = -(2.0**-100)  # a number that elements have as 0, with its sign
Slope = Callable[[Tensor, Tensor, float], Tensor]  # of elements by the numbers that they are nearest to


@dataclass(frozen=True, slots=True)
class Cells:
    """Which rows share scales."""

    rows: tuple[slice, ...] | None  # of each cell; None: each row is one

    def spread(self, cells: Tensor) -> Tensor:
        """[cells, groups] -> [rows, groups]."""
        if self.rows is None:
            return cells
        spread = cells.new_empty((max(r.stop for r in self.rows), cells.shape[1]))
        for cell, rows in zip(cells, self.rows, strict=True):
            spread[rows] = cell
        return spread

    def sum(self, rows: Tensor) -> Tensor:
        """[rows, groups] -> [cells, groups], always in the same order."""
        return rows if self.rows is None else torch.stack([rows[r].sum(0) for r in self.rows])

    def largest(self, rows: Tensor) -> Tensor:
        """[rows, groups] -> [cells, groups]."""
        return rows if self.rows is None else torch.stack([rows[r].amax(0) for r in self.rows])


@dataclass(frozen=True, slots=True)
class FloatGrid:
    """Members as in Grid. Rounded: levels are values of elements."""

    source: Tensor  # [rows, columns], floats
    group: int  # columns of a group
    cells: Cells
    absmax: Tensor  # [cells, groups]
    scheme: Scheme
    dtype: str  # of the weight in the checkpoint
    global_scales: tuple[float, ...]  # of each row; empty where there are none
    wholes: Tensor | None  # the same, [rows, 1]
    is_finite: bool

    @property
    def weight(self) -> Tensor:
        """See Grid: [rows, groups, columns of a group]."""
        return in_groups(self.source.float(), self.group)

    @property
    def columns(self) -> int:
        """See Grid."""
        return self.source.shape[1]

    @property
    def rows(self) -> int:
        """See Grid."""
        return len(self.source)

    @property
    def form(self) -> tuple[int, ...]:
        """See Grid."""
        return (self.rows, -(-self.columns // self.group), self.group)

    @property
    def rule(self) -> ScaleRule:
        """How it scales."""
        return rule_of(self.scheme, self.dtype, self.wholes)

    @property
    def slope(self) -> Slope:
        """How elements change."""
        return _SLOPES.get(self.scheme.scale, _through)

    @property
    def extremes(self) -> tuple[Tensor]:
        """See Grid."""
        return (self.absmax,)

    @property
    def stored(self) -> str:
        """See Grid."""
        return self.scheme.scale

    def lines(self, rows: slice) -> slice:
        """See Grid."""
        return rows

    def by_rows(self, factors: Sequence[Tensor]) -> tuple["FloatGrid", tuple[Tensor, ...]]:
        """See Grid."""
        spread = self.cells.spread
        return replace(self, cells=Cells(None), absmax=spread(self.absmax)), tuple(spread(f) for f in factors)

    def part(self, rows: slice) -> "FloatGrid":
        """See Grid."""
        assert self.cells.rows is None
        wholes = None if self.wholes is None else self.wholes[rows]
        return replace(self, source=self.source[rows].float(), absmax=self.absmax[rows], wholes=wholes)

    def round(self, v: Tensor, *factors: Tensor) -> Rounded:
        """See Grid."""
        made = self.rule.make(self.absmax, factors[0])
        steps = self.cells.spread(made.steps)[..., None]
        levels = nearest(self._numbers(v, steps), self.scheme.element).to(torch.float8_e4m3fn)
        return Rounded(levels, steps, kept=made.kept)

    def values(self, r: Rounded) -> Tensor:
        """See Grid."""
        return r.levels.float() * r.scales

    def pull(self, grad: Tensor, v: Tensor, factors: Sequence[Tensor], r: Rounded) -> tuple[Tensor, ...]:
        """See Grid."""
        del factors
        numbers, elements = self._numbers(v, r.scales), r.levels.float()
        of = self.scheme.format
        by_number = grad * self.slope(numbers, elements, 2.0 ** lowest_exponent(of))  # over the step
        by_number.masked_fill_(numbers.abs() > of.max_value, 0)
        by_step = (grad * elements - by_number * (self.weight / divisors(r.scales))).sum(-1)
        return by_number * r.scales, by_step

    def gather(self, sums: Sequence[Tensor], factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """See Grid."""
        return (self.cells.sum(sums[0]) * self.rule.make(self.absmax, factors[0]).slopes,)

    def room_for_codes(self) -> Tensor:
        """See Grid."""
        return torch.empty((self.rows, self.columns), dtype=torch.float8_e4m3fn, device=self.source.device)

    def keep(self, v: Tensor, r: Rounded) -> Tensor:
        """See Grid: values of elements, with the signs of zeros that `kernels.encode_scaled` gives: it takes the one of
        a -0 away, but in formats of six bits, and keeps that of what rounds to 0."""
        quotients = self.weight / divisors(r.scales)
        numbers = torch.where(v == 0, quotients, quotients + v)  # a -0 stays
        numbers = torch.where(r.scales == 0, 0, numbers)
        if self.scheme.format.bits != SIGNED_ZEROS:
            numbers = numbers + 0.0
        wanted = below_halves(numbers) if _ties_down(self.scheme) else numbers
        return nearest(wanted, self.scheme.element).to(torch.float8_e4m3fn).flatten(1)[:, : self.columns]

    def take_codes(self, kept: Kept, rows: slice, kernels: "KernelSet") -> Quantized:
        """See Grid. Signs of zeros are as in round-to-nearest."""
        levels, weight = kept.levels[rows], self.source[rows]
        codes = np.empty(levels.shape, np.uint8)
        for tile in row_tiles(levels):
            own = codes[tile]
            ones = np.ones((len(own), 1), np.float32)
            values = levels[tile].float()
            values = torch.where((values == 0) & values.signbit(), NEARLY_ZERO, values)
            kernels.encode_scaled(_array(values), "F32", self.scheme.element, self.columns, ones, own)
            _sign(_array(weight[tile]), own, self.scheme)
        scales = kept.scales[rows].contiguous().cpu().numpy()
        return Quantized(codes, scales, None, global_scale=self.global_scales[rows][0] if self.global_scales else None)

    def _numbers(self, v: Tensor, steps: Tensor) -> Tensor:
        """What elements are found for."""
        numbers = self.weight / divisors(steps) + v
        return below_halves(numbers) if _ties_down(self.scheme) else numbers


def make_floats(
    weight: Tensor, scheme: Scheme, dtype: str, parts: Sequence[Part], ends: tuple[Tensor, Tensor] | None = None
) -> FloatGrid:
    """As `rounding.make_grid`. Raises ValueError for a scheme that needs the largest magnitude of more than a group,
    without one."""
    if scheme.reach != "group" and any(p.amax is None for p in parts):
        raise ValueError(f"{scheme.name}: its scales need the largest magnitude of the {scheme.reach}")
    group = scheme.group_columns(weight.shape[1])
    cells = _find_cells(scheme, parts)
    own = torch.cat([in_groups(weight[rows].float(), group).abs().amax(-1) for rows in row_tiles(weight)])
    absmax = cells.largest(own if ends is None else torch.minimum(own, torch.maximum(-ends[0], ends[1])))
    if scheme.reach == "tensor":
        absmax = torch.tensor([[p.amax] for p in parts], dtype=torch.float32, device=weight.device)
    global_scales = _global_scales(scheme, parts, len(weight))
    wholes = torch.tensor(global_scales, device=weight.device)[:, None] if global_scales else None
    return FloatGrid(weight, group, cells, absmax, scheme, dtype, global_scales, wholes, bool(own.isfinite().all()))


def _find_cells(scheme: Scheme, parts: Sequence[Part]) -> Cells:
    if scheme.reach == "tensor":
        return Cells(tuple(p.rows for p in parts))
    if scheme.group_rows == 1:
        return Cells(None)
    cells = []
    for p in parts:
        step = p.rows.step or 1
        high = scheme.group_rows * step
        cells += [slice(row, min(row + high, p.rows.stop), step) for row in range(p.rows.start, p.rows.stop, high)]
    return Cells(tuple(cells))


def _global_scales(scheme: Scheme, parts: Sequence[Part], rows: int) -> tuple[float, ...]:
    """Of each row; empty where there are none."""
    if scheme.reach != "fused":
        return ()
    found = np.ones(rows, np.float32)
    for p in parts:
        assert p.amax is not None
        found[p.rows] = global_scale(p.amax, scheme.format.max_value)
    return tuple(found.tolist())


def _array(values: Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = values.float().contiguous().cpu().numpy()
    return found


def divisors(steps: Tensor) -> Tensor:
    """What numbers are divided by: a scale of 0 makes 0 of everything."""
    return torch.where(steps == 0, torch.inf, steps)


def _ties_down(scheme: Scheme) -> bool:
    return scheme.numbers == "mlx" and scheme.element == "e2m1"


def _sign(weight: NDArray[np.float32], codes: NDArray[np.uint8], scheme: Scheme) -> None:
    """Signs of zeros as the library of the scheme's numbers has them."""
    if scheme.numbers == "fp8":
        sign_zeros(weight, codes)
    elif _ties_down(scheme):
        codes[codes == NEGATIVE_ZERO] = 0
    elif scheme.numbers == "mlx":
        codes[(codes == 0) & (weight == 0) & np.signbit(weight)] = NEGATIVE_ZERO_E4M3


def _through(numbers: Tensor, elements: Tensor, lowest: float) -> Tensor:
    del elements, lowest
    return torch.ones_like(numbers)


def _by_sign(numbers: Tensor, elements: Tensor, lowest: float) -> Tensor:
    del elements, lowest
    return (numbers != 0).float()


def _by_binade(numbers: Tensor, elements: Tensor, lowest: float) -> Tensor:
    return torch.where(numbers.abs() < lowest, (numbers != 0).float(), elements / numbers)


_SLOPES: Final[Mapping[str, Slope]] = {"e8m0": _by_binade, E4M3: _by_sign, E5M3: _by_sign}
