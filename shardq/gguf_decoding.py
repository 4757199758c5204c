"""Numbers of GGUF files as fp32: plain ones, blocks by the kernels, and by the package gguf those that shardq does not
write (IQ1, IQ2, IQ3, NVFP4)."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.errors import MissingPackage
from shardq.ggml import GGML
from shardq.gguf.packages import import_gguf
from shardq.kernels import KernelSet
from shardq.kernels.contract_blocks import BLOCK_FORMATS

FLOATS: Final[dict[str, np.dtype[Any]]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"),
}
INTEGERS: Final = frozenset({"I8", "I16", "I32", "I64"})


def why_undecoded(kind: str) -> str | None:
    """Why numbers of a type of ggml.GGML cannot be had, and what to install; None where they can."""
    if kind in FLOATS or kind in BLOCK_FORMATS:
        return None
    if kind in INTEGERS:
        return f"{kind} is no number to compare"
    try:
        _decode_by_package(np.zeros((1, GGML[kind].block_bytes), np.uint8), kind)
    except MissingPackage:
        return f"{kind} is decoded by the package gguf, which is not there: install shardq[gguf]"
    except (NotImplementedError, KeyError):
        return f"nothing here decodes {kind}, neither shardq nor the package gguf"
    return None


def decode_numbers(data: NDArray[np.uint8], kind: str, columns: int, kernels: KernelSet) -> NDArray[np.float32]:
    """Bytes of whole rows of a type that `why_undecoded` knows nothing against, as fp32 [rows, columns].

    F64 is rounded to the nearest, beyond fp32 to infinity. Blocks of shardq's types are exact as of the kernels'
    `dequantize_blocks`; others have the arithmetic of gguf 0.19.0 (`gguf.quants.dequantize`), fp32 too.
    """
    if kind == "F32":
        return data.view(FLOATS[kind]).reshape(-1, columns)
    if kind == "BF16":
        wide = data.view(FLOATS[kind]).astype(np.uint32) << 16
        return wide.view(np.float32).reshape(-1, columns)
    if kind in FLOATS:
        with np.errstate(over="ignore"):
            return data.view(FLOATS[kind]).astype(np.float32).reshape(-1, columns)
    rows = data.reshape(-1, columns // GGML[kind].block_weights * GGML[kind].block_bytes)
    if kind in BLOCK_FORMATS:
        out = np.empty((len(rows), columns), np.float32)
        kernels.dequantize_blocks(np.ascontiguousarray(rows), kind, out)
        return out
    return _decode_by_package(rows, kind)


def _decode_by_package(rows: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    """Raises MissingPackage, KeyError and NotImplementedError for types that it does not know."""
    gguf = import_gguf()
    with np.errstate(all="ignore"):  # files of others may hold any scale
        made: NDArray[np.float32] = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    return made
