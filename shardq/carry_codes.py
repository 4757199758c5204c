"""Codes of a quantized source as canonical rows for another layout, with the same numbers to the bit, or an error.

The worker's side of `carry`. A row's result depends on that row alone (and on `largest`), so that tiles may be cut at
any multiple of the target's `group_rows`. Of a group whose codes all stand for zero the scale does not matter: it
becomes 1 where it does not fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.carry import Goal, needs_largest
from shardq.carry_scales import (
    Floats,
    above,
    any_in_groups,
    decoded,
    divisor_of,
    regroup,
    regrouped,
    rounded,
    zero_groups,
)
from shardq.dequantize.base import Coded, Encoded
from shardq.dequantize.decoding import code_rows
from shardq.dequantize.values import scale_values
from shardq.errors import NonFiniteWeight, NotExact
from shardq.formats import ELEMENTS
from shardq.kernels import KernelSet
from shardq.quantizers.quantized import Quantized

TOP_EXPONENT: Final = 8  # the largest power of two of e4m3 is 2^8, the smallest 2^-9
LARGEST_EXPONENT: Final = 127  # of fp32
ADVICE: Final = "take another layout or scheme, or --requantize, which makes new codes"


@dataclass(frozen=True, slots=True)
class Rows:
    """What is carried, for messages and for what all steps need."""

    e: Encoded
    row: int  # the first
    to: Goal
    kernels: KernelSet

    def refuse(self, at: tuple[int, int], unit: str, found: str, expected: str) -> NotExact:
        """The error of a row, counted from the first, and a group or column."""
        return NotExact(
            f"{_label(self.e)} ({self.e.kind}) cannot be carried to {self.to.layout} as it is: row {self.row + at[0]}, "
            f"{unit} {at[1]} has {found}, expected {expected}; {ADVICE}"
        )


def carry_rows(
    e: Encoded,
    parts: Mapping[str, NDArray[Any]],
    row: int,
    end_row: int,
    to: Goal,
    kernels: KernelSet,
    largest: float | None = None,
) -> Quantized:
    """Rows `row` to `end_row`, from the windows of `read_parts`, as the quantizer of `to.scheme` would return them:
    codes as they are, scales [rows, G] of the target's groups, zeros, biases and global scale as its layout wants them.

    `row` is a multiple of the target's `group_rows`, and `carry.fits` has let the pair pass. `largest`, where
    `carry.needs_largest`: the greatest `largest_scale` of all rows of the matrix and of what is served as one with it.
    Decoded weights are those of the source to the bit, -0 counting as 0. Raises NotExact where a scale or bias is not a
    number of the type that the layout stores, a zero point is not where it should be, or columns are in another order;
    NonFiniteWeight where a code or scale is NaN or infinite, or their product is beyond fp32.
    """
    rows = Rows(e, row, to, kernels)
    coded = _read_codes(rows, parts, end_row)
    _refuse_non_finite(rows, coded)
    if ELEMENTS[e.element].is_integer:
        return _carry_integers(rows, coded)
    return _carry_floats(rows, coded, _factor(e, parts), largest)


def largest_scale(
    e: Encoded, parts: Mapping[str, NDArray[Any]], row: int, end_row: int, to: Goal, kernels: KernelSet
) -> float:
    """The largest scale of rows that have a code other than zero; 0 if there is none. Raises as `carry_rows`."""
    rows = Rows(e, row, to, kernels)
    coded = _read_codes(rows, parts, end_row)
    _refuse_non_finite(rows, coded)
    counted = np.where(zero_groups(coded), np.float32(0), np.abs(coded.values.scales))
    return float(counted.max())


# --- reading -------------------------------------------------------------------------------------------------------


def _read_codes(rows: Rows, parts: Mapping[str, NDArray[Any]], end_row: int) -> Coded:
    """Canonical codes of the source; of picked rows too."""
    e, row = rows.e, rows.row
    step = 1 if e.pick is None else e.pick[2]
    first, behind = e.stored_range(row, end_row)
    beside = replace(e, rows=behind - first, pick=(first, behind, 1))
    with np.errstate(all="ignore"):
        coded = code_rows(beside, parts, 0, behind - first, rows.kernels)
    if coded is None:
        raise NotExact(
            f"{_label(e)} ({e.kind}) cannot be carried to {rows.to.layout} as it is: its columns are in another order "
            f"than its groups (act-order), or its codes have no scheme; {ADVICE}"
        )
    v = coded.values.rows(slice(None, None, step))
    zeros = None if v.zeros is None else np.ascontiguousarray(v.zeros)
    biases = None if v.biases is None else np.ascontiguousarray(v.biases)
    kept = replace(v, codes=np.ascontiguousarray(v.codes), scales=np.ascontiguousarray(v.scales))
    return replace(coded, values=replace(kept, zeros=zeros, biases=biases))


def _factor(e: Encoded, parts: Mapping[str, NDArray[Any]]) -> tuple[Floats, np.float32] | None:
    """Scales [rows, G] as they are stored, and what multiplies them, where the source has such a number."""
    factor, scale = e.part("factor"), e.part("scale")
    if factor is None or scale is None:
        return None
    step = 1 if e.pick is None else e.pick[2]
    stored = np.ascontiguousarray(scale_values(parts["scale"], scale.dtype)[::step])
    return stored, scale_values(parts["factor"], factor.dtype)[0, 0]


def _refuse_non_finite(rows: Rows, coded: Coded) -> None:
    v = coded.values
    scales = above(v)
    bad = ~np.isfinite(scales)
    if v.biases is not None:
        bad |= ~np.isfinite(v.biases)
    if not bad.any() and coded.element == "e4m3fn":
        nan = (v.codes & 0x7F) == 0x7F
        bad = any_in_groups(nan, coded.group) if nan.any() else bad
    with np.errstate(over="ignore"):
        reach = np.abs(scales).max() * np.float32(2 * ELEMENTS[coded.element].max_value)
    if not bad.any() and not np.isfinite(reach):
        bad = any_in_groups(~np.isfinite(decoded(coded, rows.kernels)), coded.group)
    if bad.any():
        r, g = _first(bad)
        raise NonFiniteWeight(
            f"{_label(rows.e)} ({rows.e.kind}) has NaN or infinity at row {rows.row + r}, group {g}: expected finite "
            "weights; the checkpoint may be damaged"
        )


# --- integers ------------------------------------------------------------------------------------------------------


def _carry_integers(rows: Rows, coded: Coded) -> Quantized:
    if coded.values.biases is not None and rows.to.biased:
        return _keep_biases(rows, coded)
    v, half = coded.values, np.uint8(1 << (rows.to.scheme.bits - 1))
    if v.biases is not None:
        v = replace(v, zeros=_zeros_of(rows, v.scales, v.biases), biases=None)
        _check_sums(rows, v, coded.values, coded.group)
    zeros = v.zeros
    if rows.to.scheme.symmetric and zeros is not None and (bad := zeros != half).any():
        raise rows.refuse(_first(bad), "group", f"zero point {zeros[_first(bad)]}", f"{half} in all, as symmetric")
    group = rows.to.scheme.group_columns(rows.e.columns)
    scales, free = _fit_scales(rows, replace(coded, values=v), v.scales)
    if zeros is None:
        zeros = np.full(v.scales.shape, half, np.uint8)
    zeros = regroup(zeros, coded.group, group, rows.e.columns)
    made = Quantized(v.codes, scales, zeros)
    if rows.to.biased:
        return _with_biases(rows, made, free, group)
    wanted = rows.to.scheme.numbers == "auto_round" or not rows.to.scheme.symmetric
    return made if wanted else replace(made, zeros=None)


def _keep_biases(rows: Rows, coded: Coded) -> Quantized:
    v, group = coded.values, rows.to.scheme.group_columns(rows.e.columns)
    assert v.biases is not None
    scales, _ = _fit_scales(rows, coded, v.scales)
    biases = regroup(v.biases, coded.group, group, rows.e.columns)
    if (bad := rounded(biases, rows.to.scale, rows.kernels) != biases).any():
        raise rows.refuse(_first(bad), "group", f"bias {biases[_first(bad)]}", f"a number of {rows.to.scale}")
    return Quantized(v.codes, scales, None, biases)


def _zeros_of(rows: Rows, scales: Floats, biases: Floats) -> NDArray[np.uint8]:
    """Zero points [rows, G] with bias = -scale * zero, exactly; half the range where both are 0."""
    top = (1 << rows.to.scheme.bits) - 1
    wide, offset = scales.astype(np.float64), biases.astype(np.float64)
    ratio = np.divide(-offset, wide, out=np.full(wide.shape, (top + 1) // 2, np.float64), where=wide != 0)
    zeros = np.clip(np.rint(ratio), 0, top)
    if (bad := wide * zeros != -offset).any():  # 32 bits of the product fit a double
        at = _first(bad)
        found = f"bias {biases[at]} at scale {scales[at]}, a zero point of {ratio[at]}"
        raise rows.refuse(at, "group", found, f"a whole number from 0 to {top}")
    return zeros.astype(np.uint8)


def _with_biases(rows: Rows, made: Quantized, free: NDArray[np.bool_] | None, group: int) -> Quantized:
    """With bias = -scale * zero, exactly, in the type of scales; `free`: groups of zeros."""
    scales, zeros = made.scales, made.zeros
    assert zeros is not None
    biases, bad = _products(rows, scales, zeros)
    if bad.any():
        free = zero_groups(Coded(rows.e.element, group, made)) if free is None else free
        scales = np.where(bad & free, np.float32(1), scales)
        biases, bad = _products(rows, scales, zeros)
    if bad.any():
        at = _first(bad)
        found = f"scale {scales[at]} and zero point {zeros[at]}, a bias of {-float(scales[at]) * int(zeros[at])}"
        raise rows.refuse(at, "group", found, f"a number of {rows.to.scale}")
    made = replace(made, scales=scales)
    affine = Quantized(made.codes, scales, None, biases)
    _check_sums(rows, made, affine, group)
    return affine


def _products(rows: Rows, scales: Floats, zeros: NDArray[np.uint8]) -> tuple[Floats, NDArray[np.bool_]]:
    """Biases as they are stored, and where they are not -scale * zero; +0 for a zero point of 0."""
    exact = 0.0 - scales.astype(np.float64) * zeros
    with np.errstate(over="ignore"):
        biases = rounded(exact.astype(np.float32), rows.to.scale, rows.kernels)
    return biases, biases != exact


def _check_sums(rows: Rows, zeroed: Quantized, affine: Quantized, group: int) -> None:
    """(scale * code) + bias is rounded twice, scale * (code - zero) once: the same unless the first product has more
    than the 24 bits of fp32, or overflows. Raises NotExact where that changes a weight."""
    bits, scales = rows.to.scheme.bits, zeroed.scales
    with np.errstate(over="ignore"):
        within = np.isfinite(np.abs(scales).max() * np.float32(1 << bits))
    if within and not (scales.view(np.uint32) & np.uint32((1 << bits) - 1)).any():
        return
    assert zeroed.zeros is not None
    assert affine.biases is not None
    once, twice = (np.empty(zeroed.codes.shape, np.float32) for _ in range(2))
    rows.kernels.dequantize_int(zeroed.codes, scales, zeroed.zeros, group, once)
    rows.kernels.decode_affine(affine.codes, affine.scales, affine.biases, group, "bias", twice)
    if (bad := once != twice).any():
        at = _first(bad)
        raise rows.refuse(at, "column", "a scale with so many bits that a bias rounds its weight", "fewer bits")


# --- floats --------------------------------------------------------------------------------------------------------


def _carry_floats(
    rows: Rows, coded: Coded, factor: tuple[Floats, np.float32] | None, largest: float | None
) -> Quantized:
    v = coded.values
    steps = above(v)
    scales, divisor = steps, None
    if rows.to.lifted:
        if factor is not None:
            scales, divisor = factor[0], divisor_of(factor[1])
        elif v.global_scale is not None:
            scales, divisor = v.scales, np.float32(v.global_scale)
        else:
            divisor = _lift(rows, largest)
            with np.errstate(over="ignore"):
                scales = steps * divisor
    fitted, _ = _fit_scales(rows, coded, scales, divisor, steps)
    return Quantized(v.codes, fitted, None, global_scale=None if divisor is None else float(divisor))


def _lift(rows: Rows, largest: float | None) -> np.float32:
    """A global scale where there is none: 1 above scales of e4m3; for powers of two what puts the largest on top."""
    if not needs_largest(rows.e, rows.to):
        return np.float32(1)
    if largest is None:
        raise ValueError(f"{rows.e.name}: its scales need the largest of all")
    exponent = TOP_EXPONENT - (int(np.frexp(largest)[1]) - 1) if largest else 0
    return np.float32(np.ldexp(np.float32(1), min(exponent, LARGEST_EXPONENT)))


# --- scales --------------------------------------------------------------------------------------------------------


def _fit_scales(
    rows: Rows, coded: Coded, scales: Floats, divisor: np.float32 | None = None, steps: Floats | None = None
) -> tuple[Floats, NDArray[np.bool_] | None]:
    """Scales for the target's groups as they are stored there; `steps`, if they differ, are what codes are multiplied
    by, which stored ones over `divisor` must give. Also which groups are of zeros, where that had to be found."""
    own, group, columns = coded.group, rows.to.scheme.group_columns(rows.e.columns), rows.e.columns
    scales = regroup(scales, own, group, columns)
    wanted = scales if steps is None else regroup(steps, own, group, columns)
    stored = rounded(scales, rows.to.scale, rows.kernels)
    with np.errstate(all="ignore"):
        bad = (stored if divisor is None else stored / divisor) != wanted
    if not bad.any():
        return stored, None
    free = zero_groups(regrouped(coded, group, columns))
    if (worse := bad & ~free).any():
        at = _first(worse)
        below = "" if divisor is None else f" below a global scale of {divisor}"
        raise rows.refuse(at, "group", f"scale {wanted[at]}", f"a number of {rows.to.scale}{below}")
    return np.where(bad, np.float32(1), stored), free


def _first(bad: NDArray[np.bool_]) -> tuple[int, int]:
    r, c = np.argwhere(bad)[0]
    return int(r), int(c)


def _label(e: Encoded) -> str:
    return f"{e.name}{'' if e.index is None else f'[{e.index}]'} in {e.parts[0].shard}"
