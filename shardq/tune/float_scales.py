"""Scales of small floats from the largest magnitudes of groups, in torch, on any device; and how they change with a
factor of these.

The scales are those of `quantizers.scales` and `quantizers.float_scales`, bit for bit; tests hold one against the
other. Slopes are auto-round 0.16.1's (`data_type/mxfp.py`, `nvfp.py`, `fp8.py`): rounding passes gradients through,
also that of exponents; the ends of a format do not.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from shardq.formats import ELEMENTS
from shardq.quantizers.float_scales import E4M3, E5M3, LOWEST, SHIFT, SMALLEST, STEP
from shardq.quantizers.scales import CARRY, EPSILON, STORED
from shardq.schemes import WEIGHT_TYPE, Exponent, Scheme
from shardq.tune.rounding_parts import TYPES

FRACTION: Final = 0x7FFFFF
PLACES: Final = 23
LAST: Final = 254  # the largest biased exponent; 255 is NaN
TINIEST: Final = 2.0**-127


@dataclass(frozen=True, slots=True)
class Scales:
    """Of groups, in the shape of their magnitudes, fp32."""

    kept: Tensor  # as they are stored
    steps: Tensor  # as a reader multiplies by them; 0 for groups that hold nothing but zeros
    slopes: Tensor  # of steps by the factor


class ScaleRule(Protocol):
    """How a scheme scales."""

    def make(self, absmax: Tensor, factor: Tensor) -> Scales:
        """From magnitudes [cells, groups], fp32, none NaN, and factors of them in the same shape, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Powers:
    """Powers of two, as E8M0 holds them."""

    element: str
    exponent: Exponent
    least: float = TINIEST
    of_zeros: float | None = None  # the scale of a group of zeros, where the rule makes another one

    def make(self, absmax: Tensor, factor: Tensor) -> Scales:
        """See ScaleRule. The exponent of magnitude * factor by the rule, less that of the largest element; the slope is
        that of 2^(log2 magnitude * factor)."""
        largest = ELEMENTS[self.element].max_value
        reached = absmax * factor
        if self.exponent in ("ceil", "rceil"):
            ratio = (reached / largest).view(torch.int32)
            biased = (ratio >> PLACES) + ((ratio & FRACTION) != 0)
        else:
            of_group = _floored(reached) if self.exponent == "floor" else _carried(reached, int(CARRY[self.element]))
            biased = of_group - (math.frexp(largest)[1] - 1)
        inside = (biased >= 0) & (biased <= LAST) & (reached > 0)
        exponents = biased.clamp(0, LAST).to(torch.int32)
        steps = torch.where(exponents == 0, TINIEST, (exponents << PLACES).view(torch.float32)).clamp_(min=self.least)
        if self.of_zeros is not None:
            steps = torch.where(reached == 0, self.of_zeros, steps)
        return Scales(steps, steps, torch.where(inside, steps / factor, 0))


@dataclass(frozen=True, slots=True)
class Plain:
    """Numbers of 16 or 32 bits; a scale of 0 becomes the format's epsilon."""

    top: float  # what the largest magnitude stands for
    stored: str

    def make(self, absmax: Tensor, factor: Tensor) -> Scales:
        """See ScaleRule."""
        found = (absmax * factor / self.top).to(TYPES[self.stored]).float()
        steps = torch.where(found == 0, EPSILON[self.stored], found)
        return Scales(steps, steps, torch.where(found == 0, 0, absmax / self.top))


@dataclass(frozen=True, slots=True)
class SmallE4m3:
    """e4m3 numbers, times a global scale of each cell, where there is one; a 0 becomes SMALLEST then."""

    largest: float  # element
    wholes: Tensor | None  # [cells, 1]

    def make(self, absmax: Tensor, factor: Tensor) -> Scales:
        """See ScaleRule."""
        most = ELEMENTS[E4M3].max_value
        ratios = absmax * factor / self.largest
        lifted = ratios if self.wholes is None else ratios * self.wholes
        kept = lifted.clamp(max=most).to(torch.float8_e4m3fn).float()
        slopes = torch.where((lifted <= most) & (kept > 0), absmax / self.largest, 0)
        if self.wholes is None:
            return Scales(kept, kept, slopes)
        kept = torch.where(kept == 0, float(SMALLEST), kept)
        return Scales(kept, kept / self.wholes, slopes)


@dataclass(frozen=True, slots=True)
class SmallE5m3:
    """e5m3 numbers."""

    largest: float

    def make(self, absmax: Tensor, factor: Tensor) -> Scales:
        """See ScaleRule."""
        most = ELEMENTS[E5M3].max_value
        share = float(torch.tensor(1 / self.largest, dtype=torch.float32))
        wanted = absmax * factor * share
        limited = wanted.clamp(max=most)
        bits = limited.view(torch.int32)
        normal = (bits + (1 << SHIFT - 1) - 1 + (bits >> SHIFT & 1) >> SHIFT << SHIFT).view(torch.float32)
        steps = torch.where(limited < float(LOWEST), (limited / float(STEP)).round() * float(STEP), normal)
        return Scales(steps, steps, torch.where(wanted <= most, absmax * share, 0))


def rule_of(scheme: Scheme, dtype: str, wholes: Tensor | None) -> ScaleRule:
    """How the scales of weights are made that the checkpoint has in `dtype`."""
    return _RULES.get(scheme.scale, _plain)(scheme, dtype, wholes)


def _powers(scheme: Scheme, dtype: str, wholes: Tensor | None) -> ScaleRule:
    del dtype, wholes
    if scheme.numbers == "fp8":
        return Powers(scheme.element, scheme.exponent, least=2.0**-126, of_zeros=1.0)
    return Powers(scheme.element, scheme.exponent, of_zeros=1.0 if scheme.numbers == "mlx" else None)


def _plain(scheme: Scheme, dtype: str, wholes: Tensor | None) -> ScaleRule:
    del wholes
    return Plain(scheme.format.max_value, STORED[dtype] if scheme.scale == WEIGHT_TYPE else scheme.scale)


_RULES: Final[Mapping[str, Callable[[Scheme, str, Tensor | None], ScaleRule]]] = {
    "e8m0": _powers,
    E4M3: lambda scheme, _, wholes: SmallE4m3(scheme.format.max_value, wholes),
    E5M3: lambda scheme, _, __: SmallE5m3(scheme.format.max_value),
}


def _carried(magnitudes: Tensor, carry: int) -> Tensor:
    """Biased exponents, rounded up from some fraction on."""
    return magnitudes.view(torch.int32) + carry >> PLACES


def _floored(magnitudes: Tensor) -> Tensor:
    """Biased exponents, 128 for 0; log2 rounds to fp32, which lifts what lies a few units below a power of two."""
    bits = magnitudes.view(torch.int32) >> PLACES
    logs = torch.where(magnitudes > 0, magnitudes, 1).double().log2().float()
    normal = (bits > 0) & magnitudes.isfinite()
    found = torch.where(normal, logs.floor().nan_to_num(posinf=128).to(torch.int32) + 127, bits)
    return torch.where(magnitudes == 0, 128, found)
