"""What the numbers of a GGUF file are, as far as that shows without its source: finite."""

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shardq.files.gguf_read import GgufHeader, GgufTensor
from shardq.ggml import GGML, GgmlType
from shardq.gguf_decoding import FLOATS, INTEGERS
from shardq.kernels import KernelSet
from shardq.kernels.contract_blocks import BLOCK_FORMATS
from shardq.source_rows import WINDOW_BYTES
from shardq.sources.base import Source

TILE_BYTES: Final = 1 << 20  # decoded at once: at most ten times that in fp32
_BF16_EXPONENT: Final = 0x7F80


def check_values(source: Source, file: str, header: GgufHeader, kernels: KernelSet) -> Iterator[str]:
    """Tensors of a file with a number that is NaN or infinite: a scale of a block, what it decodes to, or a float.

    Types that no kernel decodes are passed over, see `undecoded`. Memory: a window of the file, and a tile in fp32.
    Raises what reading raises."""
    for t in header.tensors:
        if t.type in INTEGERS or t.type in undecoded(header):
            continue
        at = _first_bad(source, file, t, kernels)
        if at is not None:
            row = at // t.shape[0] if t.shape else 0
            yield f"{t.name} in {file} has a number in row {row} that is NaN or infinite, or a scale: expected none"


def undecoded(header: GgufHeader) -> frozenset[str]:
    """Types of a file that no kernel decodes."""
    return frozenset(t.type for t in header.tensors) - FLOATS.keys() - INTEGERS - BLOCK_FORMATS.keys()


def _first_bad(source: Source, file: str, t: GgufTensor, kernels: KernelSet) -> int | None:
    """Where among the numbers of a tensor the first is that is not finite."""
    kind = GGML[t.type]
    window, step = (size // kind.block_bytes * kind.block_bytes for size in (WINDOW_BYTES, TILE_BYTES))
    done = 0
    for begin in range(t.begin, t.end, window):
        data = np.frombuffer(source.read(file, begin, min(t.end, begin + window)), np.uint8)
        for tile in (data[at : at + step] for at in range(0, len(data), step)):
            bad = ~_finite(tile, kind, kernels)
            if bad.any():
                return done + int(bad.argmax())
            done += bad.size
    return None


def _finite(data: NDArray[np.uint8], kind: GgmlType, kernels: KernelSet) -> NDArray[np.bool_]:
    """For each number whether it is finite. A scale that is not makes all numbers of its block NaN or infinite."""
    finite: NDArray[np.bool_]
    if kind.name == "BF16":
        finite = (data.view(FLOATS[kind.name]) & _BF16_EXPONENT) != _BF16_EXPONENT
    elif kind.name in FLOATS:
        finite = np.isfinite(data.view(FLOATS[kind.name]))
    else:
        wide = np.empty((1, data.size // kind.block_bytes * kind.block_weights), np.float32)
        kernels.dequantize_blocks(data[None], kind.name, wide)
        finite = np.isfinite(wide[0])
    return finite
