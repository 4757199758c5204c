"""Bit streams and digests."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

WORD_BITS = 32
DIGEST_LANES = 16
UNSIGNED = 2**64 - 1
FACTOR = 0x9E3779B97F4A7C15


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int64 words [rows, ceil(n * bits / 32)] of the stream of codes [rows, n], least significant bit first."""
    stream = (codes.long()[..., None] >> torch.arange(bits) & 1).flatten(1)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % WORD_BITS))
    return (stream.reshape(len(codes), -1, WORD_BITS) << torch.arange(WORD_BITS)).sum(2)


def unpacked(words: torch.Tensor, bits: int, cols: int) -> torch.Tensor:
    """int64 codes [rows, cols] of int64 words."""
    stream = (words[..., None] >> torch.arange(WORD_BITS) & 1).flatten(1)[:, : cols * bits]
    return (stream.reshape(len(words), cols, bits) << torch.arange(bits)).sum(2)


def shifted_right(x: torch.Tensor, count: int) -> torch.Tensor:
    """int64 shifted as if unsigned."""
    return x >> count & (1 << 64 - count) - 1


def digest(data: NDArray[Any]) -> int:
    """The digest that KernelSet.checksum specifies. int64 wraps as unsigned numbers do."""
    padded = np.zeros(-(-data.size // 128) * 128, np.uint8)
    padded[: data.size] = data
    blocks = torch.from_numpy(padded.view("<i8").astype(np.int64).reshape(-1, DIGEST_LANES))
    starts = [(i + 1) * FACTOR & UNSIGNED for i in range(DIGEST_LANES)]
    lanes = torch.from_numpy(np.array(starts, np.uint64).view(np.int64))
    for words in blocks:
        total = lanes + words
        lanes = (total ^ shifted_right(total, 29)) * (FACTOR - 2**64)
    result = data.size
    for lane in lanes.tolist():
        result = (result ^ (lane & UNSIGNED)) * 0xFF51AFD7ED558CCD & UNSIGNED
        result ^= result >> 32
    return result
