"""The tensors of weights that are small floats beside scales that are small too: MX and their kin.

Facts (compressed-tensors 0.20, auto-round 0.16.1): codes of 8 bits are `weight`, smaller ones a dense little-endian bit
stream along the columns in the bytes of `weight_packed`; `weight_scale` [rows, G] is one byte for a group: an exponent
(E8M0), e4m3 or e5m3; `weight_global_scale` fp32 [1] is what readers divide scales of e4m3 by.
"""

from typing import TYPE_CHECKING, Final

from shardq.layouts.base import OutSpec
from shardq.schemes import Scheme

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shardq.kernels import KernelSet
    from shardq.layouts.base import Arrays
    from shardq.quantizers.quantized import Quantized

# Types of weight_scale, by its format.
SCALE_TYPES: Final = {"e8m0": "U8", "e4m3fn": "F8_E4M3", "e5m3": "U8"}


def float_outputs(scheme: Scheme, rows: int, columns: int) -> tuple[OutSpec, ...]:
    """See Layout.outputs."""
    bits = scheme.bits
    specs = (
        OutSpec("weight", "F8_E4M3", (rows, columns), slab_axis=0)
        if bits == 8
        else OutSpec("weight_packed", "U8", (rows, columns * bits // 8), slab_axis=0),
        OutSpec("weight_scale", SCALE_TYPES[scheme.scale], (rows, scheme.groups(columns)), slab_axis=0),
    )
    if scheme.reach == "group":
        return specs
    return (*specs, OutSpec("weight_global_scale", "F32", (1,), slab_axis=None))


def pack_floats(part: "Quantized", row: int, out: "Arrays", scheme: Scheme, kernels: "KernelSet") -> None:
    """See Layout.pack."""
    import numpy as np

    lines = slice(row, row + len(part.codes))
    if "weight" in out:
        out["weight"][lines] = part.codes
    else:
        words = np.empty((len(part.codes), -(-part.codes.shape[1] * scheme.bits // 32)), np.uint32)
        kernels.pack_bits(part.codes, scheme.bits, words)
        packed = out["weight_packed"][lines]
        packed[:] = words.view(np.uint8)[:, : packed.shape[1]]
    out["weight_scale"][lines] = _scale_bytes(part.scales, scheme, kernels)
    if "weight_global_scale" in out:
        out["weight_global_scale"][:] = part.global_scale  # size 0 but in the first slab


def unpack_floats(arrays: "Arrays", scheme: Scheme, kernels: "KernelSet") -> "Quantized":
    """See Layout.unpack."""
    import numpy as np

    from shardq.quantizers.quantized import Quantized

    if "weight" in arrays:
        codes = arrays["weight"].view(np.uint8)
    else:
        packed = arrays["weight_packed"]
        rows, size = packed.shape
        words = np.zeros((rows, -(-size // 4)), np.uint32)
        words.view(np.uint8)[:, :size] = packed
        codes = np.empty((rows, size * 8 // scheme.bits), np.uint8)
        kernels.unpack_bits(words, scheme.bits, codes)
    of_all = arrays.get("weight_global_scale")
    return Quantized(
        codes,
        _scale_values(arrays["weight_scale"], scheme, kernels),
        None,
        global_scale=None if of_all is None else float(of_all[0]),
    )


def _scale_bytes(scales: "NDArray[np.float32]", scheme: Scheme, kernels: "KernelSet") -> "NDArray[np.uint8]":
    """Exact: scales are rounded to their format already."""
    import numpy as np

    from shardq.layouts.stored import store
    from shardq.quantizers.float_scales import e4m3_codes, e5m3_codes

    if scheme.scale == "e8m0":
        return store(scales, np.dtype(np.uint8))
    if scheme.scale == "e5m3":
        return e5m3_codes(scales)
    codes = np.empty(scales.shape, np.uint8)
    e4m3_codes(scales, codes, kernels)
    return codes


def _scale_values(stored: "NDArray[np.uint8]", scheme: Scheme, kernels: "KernelSet") -> "NDArray[np.float32]":
    import numpy as np

    from shardq.layouts.stored import load
    from shardq.quantizers.float_scales import e4m3_values, e5m3_values

    stored = np.ascontiguousarray(stored).view(np.uint8)
    if scheme.scale == "e8m0":
        return load(stored)
    if scheme.scale == "e5m3":
        return e5m3_values(stored)
    values = np.empty(stored.shape, np.float32)
    e4m3_values(stored, values, kernels)
    return values
