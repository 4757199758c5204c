"""The nearest numbers of an element format, in torch, on any device: the rounding of `kernels.encode_scaled`."""

from typing import Final

import torch
from torch import Tensor

from shardq.formats import ELEMENTS, ElementFormat

EXPONENT: Final = 0x7F800000  # of an fp32 number
PLACES: Final = 23  # of its fraction


def lowest_exponent(element: ElementFormat) -> int:
    """Of normal numbers; that under which all of e0m3 lies, which has no others."""
    return 2 - (1 << (element.exponent_bits - 1)) if element.exponent_bits else 1


def nearest(values: Tensor, element: str) -> Tensor:
    """The nearest numbers of an element to fp32 ones, half to even, saturated at the ends; infinity is the largest, NaN
    stays. Floats keep the sign of what becomes 0."""
    of = ELEMENTS[element]
    if of.is_integer:
        return values.round().clamp(-of.max_value, of.max_value - 1)
    magnitude = values.abs().clamp(max=of.max_value)
    lowest = lowest_exponent(of) + 127 << PLACES
    binade = (magnitude.view(torch.int32) & EXPONENT).clamp_(min=lowest)
    lift = (binade + (PLACES - of.mantissa_bits << PLACES)).view(torch.float32)  # fp32 has whole steps above it
    return ((magnitude + lift) - lift).copysign(values)


def below_halves(values: Tensor) -> Tensor:
    """fp32 numbers, of which those half-way between two of e2m1 are a little nearer to 0: MLX takes the smaller one."""
    quarters = values * 4
    moved = (values.view(torch.int32) - 1).view(torch.float32)
    return torch.where((quarters == quarters.round()) & (values != 0), moved, values)
