"""Elements of symmetric schemes, and affine codes: encoding and decoding as formulas. Always true division."""

from dataclasses import dataclass
from typing import Final

import torch

from shardq.kernels.contract import ELEMENTS
from shardq.kernels.reference.arrays import grouped, per_column
from shardq.kernels.reference.integers import number_ends

ROUND = 1.5 * 2.0**23  # added and taken off, it rounds numbers below 2^22 half to even


@dataclass(frozen=True, slots=True)
class FloatElement:
    """A float: its fields, largest finite value, and the code of that; larger codes (without sign) are no numbers."""

    exponent_bits: int
    mantissa_bits: int
    bias: int
    largest: float
    largest_code: int

    @property
    def smallest_exponent(self) -> int:
        """Of normal numbers."""
        return 1 - self.bias

    @property
    def sign_bit(self) -> int:
        """Position of the sign in a code."""
        return self.exponent_bits + self.mantissa_bits


FLOATS: Final = {
    "e0m3": FloatElement(0, 3, 0, 1.75, 0x07),
    "e2m1": FloatElement(2, 1, 1, 6.0, 0x07),
    "e2m3": FloatElement(2, 3, 1, 7.5, 0x1F),
    "e3m2": FloatElement(3, 2, 3, 28.0, 0x1F),
    "e4m3fn": FloatElement(4, 3, 7, 448.0, 0x7E),
    "e5m2": FloatElement(5, 2, 15, 57344.0, 0x7B),
}
INTEGER_BITS: Final = {f"int{bits}": bits for bits in range(2, 9)}


def checked_element(element: str) -> str:
    """element, if there is one of this name; else ValueError."""
    if element not in ELEMENTS:
        raise ValueError(f"element: expected one of {', '.join(ELEMENTS)}, found {element}")
    return element


def range_of_groups(w: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Smallest, largest and whether a group is bad, each [rows, G]; bad groups have -Inf and +Inf, zeros are +0."""
    bad = ~grouped(w, group, 0.0).isfinite().all(2)
    low, high = grouped(w, group, torch.inf).amin(2), grouped(w, group, -torch.inf).amax(2)
    return torch.where(bad, -torch.inf, low + 0.0), torch.where(bad, torch.inf, high + 0.0), bad


def quotients(w: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    """w / s for [rows, cols] and [rows, G]; +0 where that is NaN or s is 0."""
    steps = per_column(scales, group, w.shape[1])
    v = w / steps
    return torch.where(v.isnan() | (steps == 0), 0.0, v)


def float_codes(v: torch.Tensor, element: FloatElement) -> torch.Tensor:
    """int32 codes of fp32 numbers, none NaN."""
    magnitude = v.abs().clamp(max=element.largest)
    exponent = (torch.frexp(magnitude).exponent - 1).clamp(min=element.smallest_exponent)
    exponent = torch.where(magnitude == 0, element.smallest_exponent, exponent)
    steps = torch.ldexp(magnitude, element.mantissa_bits - exponent).round().int()  # of the place of the last bit
    codes = (exponent - element.smallest_exponent << element.mantissa_bits) + steps
    return codes | v.signbit().int() << element.sign_bit


def float_values(codes: torch.Tensor, element: FloatElement) -> torch.Tensor:
    """fp32 values of int32 codes."""
    magnitude = codes & (1 << element.sign_bit) - 1
    exponent, fraction = magnitude >> element.mantissa_bits, magnitude & (1 << element.mantissa_bits) - 1
    steps = torch.where(exponent == 0, fraction, fraction | 1 << element.mantissa_bits).float()
    values = torch.ldexp(steps, exponent.clamp(min=1) - element.bias - element.mantissa_bits)
    infinite = (magnitude == element.largest_code + 1) & (fraction == 0)
    special = torch.where(infinite, torch.inf, torch.nan)
    values = torch.where(magnitude > element.largest_code, special, values)
    return torch.where((codes >> element.sign_bit & 1) == 1, -values, values)


def encoded(w: torch.Tensor, element: str, scales: torch.Tensor, group: int) -> torch.Tensor:
    """int32 codes [rows, cols]."""
    v = quotients(w, scales, group)
    if element in FLOATS:
        six_bits = FLOATS[element].sign_bit == 5
        return float_codes(v if six_bits else v + 0.0, FLOATS[element])  # + 0.0 takes the sign of -0 away
    half = 1 << INTEGER_BITS[element] - 1
    return v.clamp(-half, half - 1).round().int() + half


def decoded(codes: torch.Tensor, element: str, scales: torch.Tensor, group: int) -> torch.Tensor:
    """fp32 values [rows, cols] of int32 codes."""
    if element in FLOATS:
        values = float_values(codes, FLOATS[element])
    else:
        values = (codes - (1 << INTEGER_BITS[element] - 1)).float()
    return values * per_column(scales, group, codes.shape[1])


def element_ends(codes: torch.Tensor, element: str) -> torch.Tensor:
    """Which int32 codes are at an end of the element's range; infinity and NaN lie behind that of a float."""
    if element in FLOATS:
        f = FLOATS[element]
        return (codes & (1 << f.sign_bit) - 1) >= f.largest_code
    return number_ends(codes, INTEGER_BITS[element])


def encoded_affine(
    w: torch.Tensor, bits: int, scales: torch.Tensor, offsets: torch.Tensor, group: int, rule: str
) -> torch.Tensor:
    """int32 codes [rows, cols]. ValueError for an unknown rule."""
    places = per_column(offsets, group, w.shape[1])
    if rule == "round_add":
        sums = ((quotients(w, scales, group) + ROUND) - ROUND) + places
    elif rule == "add_round":
        sums = quotients(w, scales, group) + places
    elif rule == "subtract":
        sums = quotients(w - places, scales, group)
    else:
        raise ValueError(f"rule: expected round_add, add_round or subtract, found {rule}")
    return sums.nan_to_num(0.0, torch.inf, -torch.inf).clamp(0, (1 << bits) - 1).round().int()


def decoded_affine(
    codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, group: int, rule: str
) -> torch.Tensor:
    """fp32 values [rows, cols] of int32 codes. ValueError for an unknown rule."""
    steps, places = (per_column(x, group, codes.shape[1]) for x in (scales, offsets))
    if rule == "zero":
        return steps * (codes.float() - places)
    if rule == "bias":
        return steps * codes.float() + places
    raise ValueError(f"rule: expected zero or bias, found {rule}")
