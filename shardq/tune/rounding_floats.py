"""Small floats whose rounding is learned: MX, NVFP4 and FP8, whatever shares a scale.

Source: auto-round 0.16.1 (`data_type/mxfp.py`: quant_mx; `nvfp.py`: nv_fp4, nvfp4_v2; `fp8.py`: quant_fp8_sym,
quant_block_fp_sym): the element nearest to w / scale + V, under the scale of the largest magnitude times a factor. The
arithmetic of scales and elements is the scheme's own, so that V of 0 and factors of 1 are its round-to-nearest. Global
scales stay. Rounding passes gradients through, saturation does not; but for MX, where auto-round divides an element by
its own power of two, they come out times element / number, and for all but FP8 there is none at 0, where it takes the
sign off.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from shardq.quantizers.float_scales import E4M3, E5M3, global_scale
from shardq.quantizers.mlx import NEGATIVE_ZERO, NEGATIVE_ZERO_E4M3
from shardq.quantizers.native_fp8 import sign_zeros
from shardq.quantizers.quantized import Quantized
from shardq.schemes import Scheme
from shardq.tune.float_elements import below_halves, lowest_exponent, nearest
from shardq.tune.float_scales import ScaleRule, rule_of
from shardq.tune.rounding_parts import Part, Rounded

if TYPE_CHECKING:
    from shardq.kernels import KernelSet

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

    weight: Tensor  # [rows, groups, columns of a group]
    columns: int
    cells: Cells
    absmax: Tensor  # [cells, groups]
    rule: ScaleRule
    slope: Slope
    scheme: Scheme
    global_scales: tuple[float, ...]  # of each row; empty where there are none

    @property
    def rows(self) -> int:
        """See Grid."""
        return len(self.weight)

    @property
    def extremes(self) -> tuple[Tensor]:
        """See Grid."""
        return (self.absmax,)

    @property
    def stored(self) -> str:
        """See Grid."""
        return self.scheme.scale

    def round(self, v: Tensor, *factors: Tensor) -> Rounded:
        """See Grid."""
        made = self.rule.make(self.absmax, factors[0])
        steps = self.cells.spread(made.steps)[..., None]
        levels = nearest(self._numbers(v, steps), self.scheme.element).to(torch.float8_e4m3fn)
        return Rounded(levels, steps, kept=made.kept, slopes=made.slopes)

    def values(self, r: Rounded) -> Tensor:
        """See Grid."""
        return r.levels.float() * r.scales

    def pull(self, grad: Tensor, v: Tensor, factors: Sequence[Tensor], r: Rounded) -> tuple[Tensor, ...]:
        """See Grid."""
        del factors
        assert r.slopes is not None
        numbers, elements = self._numbers(v, r.scales), r.levels.float()
        of = self.scheme.format
        by_number = grad * self.slope(numbers, elements, 2.0 ** lowest_exponent(of))  # over the step
        by_number.masked_fill_(numbers.abs() > of.max_value, 0)
        by_step = (grad * elements - by_number * (self.weight / divisors(r.scales))).sum(-1)
        return by_number * r.scales, self.cells.sum(by_step) * r.slopes

    def take_codes(self, v: Tensor, r: Rounded, rows: slice, kernels: "KernelSet") -> Quantized:
        """See Grid. Signs of zeros, and ties of MLX, are as in round-to-nearest."""
        assert r.kept is not None
        steps, scheme = r.scales[rows], self.scheme
        quotients = self.weight[rows] / divisors(steps)
        numbers = torch.where(v[rows] == 0, quotients, quotients + v[rows])  # a -0 stays
        numbers = torch.where(steps == 0, 0, numbers)
        weight, wanted = (self._flat(x) for x in (self.weight[rows], numbers))
        if _ties_down(scheme):
            wanted = below_halves(wanted)
        codes = np.empty(wanted.shape, np.uint8)
        ones = np.ones((len(wanted), 1), np.float32)
        kernels.encode_scaled(wanted.cpu().numpy(), "F32", scheme.element, self.columns, ones, codes)
        _sign(weight.cpu().numpy(), codes, scheme)
        kept = self.cells.spread(r.kept)[rows].contiguous().cpu().numpy()
        return Quantized(codes, kept, None, global_scale=self.global_scales[rows][0] if self.global_scales else None)

    def _numbers(self, v: Tensor, steps: Tensor) -> Tensor:
        """What elements are found for."""
        numbers = self.weight / divisors(steps) + v
        return below_halves(numbers) if _ties_down(self.scheme) else numbers

    def _flat(self, values: Tensor) -> Tensor:
        return values.flatten(1)[:, : self.columns].contiguous()


def make_floats(
    weight: Tensor, scheme: Scheme, dtype: str, parts: Sequence[Part], ends: tuple[Tensor, Tensor] | None = None
) -> FloatGrid:
    """As `rounding.make_grid`. Raises ValueError for a scheme that needs the largest magnitude of more than a group,
    without one."""
    if scheme.reach != "group" and any(p.amax is None for p in parts):
        raise ValueError(f"{scheme.name}: its scales need the largest magnitude of the {scheme.reach}")
    columns = weight.shape[1]
    group = scheme.group_columns(columns)
    grouped = (pad(weight, (0, -columns % group)) if columns % group else weight).reshape(len(weight), -1, group)
    cells = _find_cells(scheme, parts)
    own = grouped.abs().amax(-1)
    absmax = cells.largest(own if ends is None else torch.minimum(own, torch.maximum(-ends[0], ends[1])))
    if scheme.reach == "tensor":
        absmax = torch.tensor([[p.amax] for p in parts], dtype=torch.float32, device=weight.device)
    global_scales = _global_scales(scheme, parts, len(weight))
    wholes = torch.tensor(global_scales, device=weight.device)[:, None] if global_scales else None
    slope = _SLOPES.get(scheme.scale, _through)
    rule = rule_of(scheme, dtype, wholes)
    return FloatGrid(grouped.contiguous(), columns, cells, absmax, rule, slope, scheme, global_scales)


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
