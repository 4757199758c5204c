"""Which format is made how, and what becomes of bad blocks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np

from shardq.kernels.contract_blocks import BLOCK_FORMATS
from shardq.kernels.reference.blocks import plain, super_blocks
from shardq.kernels.reference.blocks.arithmetic import Floats, Octets, Truths, real, total
from shardq.kernels.reference.blocks.searches import IMPORTANT_STEPS, line, ray

Make = Callable[[Floats, Floats | None], tuple[Octets, Floats]]  # bytes, and scales as stored


@dataclass(frozen=True, slots=True)
class Made:
    """Bytes [rows, bytes] and the number of bad blocks."""

    out: Octets
    bad: int


def _signed(bits: int) -> Make:
    def make(x: Floats, w: Floats | None) -> tuple[Octets, Floats]:
        if w is None:
            return plain.signed(x, bits)
        found = ray(x, w, 1 << bits - 1)
        return plain.with_fifths([found.scale], found.codes, bits)

    return make


def _affine(bits: int) -> Make:
    def make(x: Floats, w: Floats | None) -> tuple[Octets, Floats]:
        if w is None:
            return plain.affine(x, bits)
        found = line(x, w, (1 << bits) - 1, IMPORTANT_STEPS)
        return plain.with_fifths([found.scale, -found.least], found.codes, bits)

    return make


WEIGHED_BY_ROW: Final[Mapping[str, Make]] = MappingProxyType(
    {"Q4_0": _signed(4), "Q5_0": _signed(5), "Q4_1": _affine(4), "Q5_1": _affine(5)}
)
OTHERS: Final[Mapping[str, Make]] = MappingProxyType(
    {
        "Q8_0": lambda x, _: plain.bytes8(x),
        "Q2_K": lambda x, v: super_blocks.line_k(x, v, 2),
        "Q3_K": super_blocks.q3_k,
        "Q4_K": lambda x, v: super_blocks.line_k(x, v, 4),
        "Q5_K": lambda x, v: super_blocks.line_k(x, v, 5),
        "Q6_K": super_blocks.q6_k,
        "IQ4_NL": super_blocks.table_blocks,
        "IQ4_XS": super_blocks.table_blocks,
        "TQ1_0": lambda x, _: plain.ternary(x, fives=True),
        "TQ2_0": lambda x, _: plain.ternary(x, fives=False),
        "MXFP4": lambda x, _: plain.mxfp4(x),
    }
)


def quantized(values: Floats, name: str, importance: Floats | None) -> Made:
    """Blocks of a matrix [rows, cols] of whole blocks."""
    rows, cols = values.shape
    width = BLOCK_FORMATS[name].cols
    x = values.reshape(-1, width)
    bad: Truths = np.logical_not(np.isfinite(x).all(1))
    x = np.where(bad[:, None], real(0), x)
    v = None if importance is None else np.tile(importance, rows).reshape(-1, width)
    with np.errstate(all="ignore"):
        if name in WEIGHED_BY_ROW:
            row = x.reshape(rows, cols)
            mean = total(row * row) / real(cols)
            w = None if v is None else v * np.sqrt(np.repeat(mean, cols // width)[:, None] + x * x)
            out, scales = WEIGHED_BY_ROW[name](x, w)
        else:
            out, scales = OTHERS[name](x, v)
    bad |= ~np.isfinite(scales).all(1)
    out[bad] = 0
    return Made(out.reshape(rows, -1), int(bad.sum()))
