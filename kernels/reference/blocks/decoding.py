"""Blocks to weights."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np

from shardq.kernels.contract_blocks import BLOCK_FORMATS
from shardq.kernels.reference.blocks.arithmetic import Codes, Floats, Octets, floats_of
from shardq.kernels.reference.blocks.plain import MXFP4_VALUES
from shardq.kernels.reference.blocks.searches import TABLE


def _nibbles(octets: Octets) -> Codes:
    """[N, bytes] to [N, 2 * bytes], low halves first."""
    return np.concatenate([octets & 15, octets >> 4], 1).astype(np.int32)


def _bits(octets: Octets) -> Codes:
    """[N, 4] to [N, 32], the lowest first."""
    return np.unpackbits(octets, axis=1, bitorder="little").astype(np.int32)


def _pairs(octets: Octets) -> Codes:
    """[N, 64] to [N, 256]."""
    shifts = np.arange(0, 8, 2)[None, None, :, None]
    return (octets.reshape(-1, 2, 1, 32) >> shifts & 3).astype(np.int32).reshape(-1, 256)


def _planes(octets: Octets) -> Codes:
    """[N, 32] to [N, 256]."""
    return np.unpackbits(octets[:, None], axis=1, bitorder="little").astype(np.int32).reshape(-1, 256)


def _spread(scales: Floats, codes: Codes) -> Floats:
    """Scales [N, subs] times codes [N, columns]."""
    subs = scales.shape[1]
    return (scales[:, :, None] * codes.reshape(len(codes), subs, -1).astype(np.float32)).reshape(len(codes), -1)


def _plain(b: Octets, bits: int, bias: bool) -> Floats:
    at = 4 if bias else 2
    codes = _nibbles(b[:, -16:])
    if bits == 5:
        codes = codes | _bits(b[:, at : at + 4]) << 4
    product = (codes - (0 if bias else 1 << bits - 1)).astype(np.float32) * floats_of(b[:, :2])
    return product + floats_of(b[:, 2:4]) if bias else product


def _q2_k(b: Octets) -> Floats:
    scale = floats_of(b[:, 80:82]) * (b[:, :16] & 15).astype(np.float32)
    least = floats_of(b[:, 82:84]) * (b[:, :16] >> 4).astype(np.float32)
    return _spread(scale, _pairs(b[:, 16:80])) - np.repeat(least, 16, 1)


def _q3_k(b: Octets) -> Floats:
    j = np.arange(16)
    high = b[:, 104:108].astype(np.int32)[:, j % 4] >> j // 4 * 2 & 3
    scales = (_nibbles(b[:, 96:104]) | high << 4) - 32
    codes = (_pairs(b[:, 32:96]) | _planes(b[:, :32]) << 2) - 4
    return _spread(floats_of(b[:, 108:]) * scales.astype(np.float32), codes)


def _line_k(b: Octets, bits: int) -> Floats:
    s = b[:, 4:16].astype(np.int32)
    scales = np.concatenate([s[:, :4] & 63, (s[:, 8:] & 15) | s[:, :4] >> 6 << 4], 1)
    minima = np.concatenate([s[:, 4:8] & 63, s[:, 8:] >> 4 | s[:, 4:8] >> 6 << 4], 1)
    quarters = b[:, -128:].reshape(-1, 4, 1, 32)
    codes = np.concatenate([quarters & 15, quarters >> 4], 2).astype(np.int32).reshape(-1, 256)
    if bits == 5:
        codes = codes | _planes(b[:, 16:48]) << 4
    least = floats_of(b[:, 2:4]) * minima.astype(np.float32)
    return _spread(floats_of(b[:, :2]) * scales.astype(np.float32), codes) - np.repeat(least, 32, 1)


def _q6_k(b: Octets) -> Floats:
    halves = b[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([halves & 15, halves >> 4], 2).astype(np.int32).reshape(-1, 256)
    scales = np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    return _spread(floats_of(b[:, 208:]) * scales, (low | _pairs(b[:, 128:192]) << 4) - 32)


def _iq4_xs(b: Octets) -> Floats:
    high = np.ascontiguousarray(b[:, 2:4]).view("<u2").astype(np.int32) >> np.arange(0, 16, 2) & 3
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], 2).astype(np.int32).reshape(-1, 8)
    step = floats_of(b[:, :2]) * ((low | high << 4) - 32).astype(np.float32)
    values = TABLE[_nibbles(b[:, 8:].reshape(-1, 16))].reshape(-1, 8, 32)
    return (step[:, :, None] * values).reshape(-1, 256)


def _trits(octets: Octets, count: int) -> Codes:
    """[N, bytes] to [N, count * bytes]: the first trits of all bytes, then the second."""
    powers = 3 ** np.arange(count)
    cut = octets.astype(np.int32)[:, None] * powers[:, None] & 255
    return (cut * 3 >> 8).astype(np.int32).reshape(len(octets), -1)


def _ternary(b: Octets, fives: bool) -> Floats:
    if fives:
        codes = np.concatenate([_trits(b[:, :32], 5), _trits(b[:, 32:48], 5), _trits(b[:, 48:52], 4)], 1)
    else:
        codes = _pairs(b[:, :64])
    return (codes - 1).astype(np.float32) * floats_of(b[:, -2:])


def _mxfp4(b: Octets) -> Floats:
    scale = np.ldexp(1.0, b[:, :1].astype(np.int32) - 128).astype(np.float32)
    return MXFP4_VALUES[_nibbles(b[:, 1:])] * scale


DECODERS: Final[Mapping[str, Callable[[Octets], Floats]]] = MappingProxyType(
    {
        "Q4_0": lambda b: _plain(b, 4, bias=False),
        "Q4_1": lambda b: _plain(b, 4, bias=True),
        "Q5_0": lambda b: _plain(b, 5, bias=False),
        "Q5_1": lambda b: _plain(b, 5, bias=True),
        "Q8_0": lambda b: np.ascontiguousarray(b[:, 2:]).view(np.int8).astype(np.float32) * floats_of(b[:, :2]),
        "Q2_K": _q2_k,
        "Q3_K": _q3_k,
        "Q4_K": lambda b: _line_k(b, 4),
        "Q5_K": lambda b: _line_k(b, 5),
        "Q6_K": _q6_k,
        "IQ4_NL": lambda b: floats_of(b[:, :2]) * TABLE[_nibbles(b[:, 2:])],
        "IQ4_XS": _iq4_xs,
        "TQ1_0": lambda b: _ternary(b, fives=True),
        "TQ2_0": lambda b: _ternary(b, fives=False),
        "MXFP4": _mxfp4,
    }
)


def dequantized(blocks: Octets, name: str) -> Floats:
    """fp32 [rows, columns] of blocks [rows, bytes]."""
    with np.errstate(all="ignore"):
        values = DECODERS[name](blocks.reshape(-1, BLOCK_FORMATS[name].size_bytes))
    return values.astype(np.float32, copy=False).reshape(len(blocks), -1)
