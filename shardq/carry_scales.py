"""Scales of carried codes: those of other groups, as a format stores them, and which of them do not matter. For
workers."""

from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.dequantize.base import Coded
from shardq.dequantize.values import byte_values
from shardq.formats import ELEMENTS
from shardq.kernels import KernelSet
from shardq.layouts.stored import load, store
from shardq.quantizers.decode import decode_rows
from shardq.quantizers.float_scales import e4m3_codes, e4m3_values, e5m3_codes, e5m3_values
from shardq.quantizers.quantized import Quantized
from shardq.schemes import Scheme

Floats = NDArray[np.float32]
ARRAYS: Final = {"fp16": np.float16, "bf16": np.uint16, "fp32": np.float32, "e8m0": np.uint8}
NEIGHBOURS: Final = 3  # floats on each side of 1 / factor that may divide as the factor multiplies: no others can


def regroup(values: NDArray[Any], own: int, group: int, columns: int) -> NDArray[Any]:
    """Values of groups of `own` columns [rows, G] as those of groups of `group`, which lie within one."""
    if own == group:
        return np.ascontiguousarray(values)
    starts = np.arange(0, columns, group)
    return np.ascontiguousarray(values[:, starts // own])


def regrouped(coded: Coded, group: int, columns: int) -> Coded:
    """The same codes with zero points and biases for smaller groups; scales stay."""
    v = coded.values
    zeros, biases = (None if x is None else regroup(x, coded.group, group, columns) for x in (v.zeros, v.biases))
    return Coded(coded.element, group, replace(v, zeros=zeros, biases=biases))


def rounded(values: Floats, name: str, kernels: KernelSet) -> Floats:
    """Values as a reader gets them back from the format `name`; what it does not hold becomes another number."""
    if name in ARRAYS:
        return load(store(np.ascontiguousarray(values), np.dtype(ARRAYS[name]))).astype(np.float32)
    if name == "e5m3":
        return e5m3_values(e5m3_codes(np.maximum(values, np.float32(0))))
    assert name == "e4m3fn", f"no scale format {name}"
    codes, found = np.empty(values.shape, np.uint8), np.empty(values.shape, np.float32)
    e4m3_codes(np.ascontiguousarray(values), codes, kernels)
    e4m3_values(codes, found, kernels)
    return found


def above(v: Quantized) -> Floats:
    """What codes are multiplied by."""
    if v.global_scale is None:
        return v.scales
    with np.errstate(all="ignore"):
        return np.divide(v.scales, np.float32(v.global_scale), dtype=np.float32)


def divisor_of(factor: np.float32) -> np.float32:
    """The number that divides scales of e4m3 as `factor` multiplies them, in fp32: all of them, where there is one (for
    every power of two, and for about one in five others), else as many as possible. Deterministic: rows of a matrix
    that are carried apart get the same."""
    values = byte_values("e4m3fn")[1:0x7F]
    with np.errstate(all="ignore"):
        wanted = values * factor
        nearest = np.float32(1) / factor
        found = [nearest]
        for toward in (np.float32(np.inf), np.float32(-np.inf)):
            at = nearest
            for _ in range(NEIGHBOURS):
                at = np.nextafter(at, toward)
                found.append(at)
        return max(found, key=lambda g: int((values / g == wanted).sum()))


def zero_groups(coded: Coded) -> NDArray[np.bool_]:
    """[rows, G]: where all codes stand for zero, whatever the scale is."""
    v, form = coded.values, ELEMENTS[coded.element]
    if not form.is_integer:
        return ~any_in_groups((v.codes & ((1 << (form.bits - 1)) - 1)) != 0, coded.group)
    if v.biases is not None:
        biased: NDArray[np.bool_] = v.biases != 0
        return ~(any_in_groups(v.codes != 0, coded.group) | biased)
    columns = v.codes.shape[1]
    half = np.full((1, 1), 1 << (form.bits - 1), np.uint8)
    zeros = half if v.zeros is None else v.zeros.repeat(coded.group, axis=1)[:, :columns]
    other: NDArray[np.bool_] = v.codes != zeros
    return ~any_in_groups(other, coded.group)


def any_in_groups(there: NDArray[np.bool_], group: int) -> NDArray[np.bool_]:
    """[rows, G]: whether a group of [rows, columns] has any."""
    found: NDArray[np.bool_] = np.logical_or.reduceat(there, np.arange(0, there.shape[1], group), axis=1)
    return found


def decoded(coded: Coded, kernels: KernelSet) -> Floats:
    """fp32 weights [rows, columns]."""
    return decode_rows(coded.values, Scheme(coded.element, coded.group, symmetric=True), kernels)
