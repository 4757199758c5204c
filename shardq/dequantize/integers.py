"""Integer codes with scales and zero points for groups of columns: what compressed-tensors, GPTQ and AWQ share.

w = scale * (code - zero) in fp32, rounded once."""

from typing import TYPE_CHECKING, Any

from shardq.dequantize.base import Coded, Encoded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shardq.kernels import KernelSet


def integer_codes(
    e: Encoded, codes: "NDArray[np.uint8]", scales: "NDArray[np.float32]", zeros: "NDArray[np.uint8] | None"
) -> Coded:
    """Canonical codes [rows, columns], scales and zeros [rows, groups]; no zeros: all are half the range."""
    import numpy as np

    from shardq.quantizers.quantized import Quantized

    return Coded(e.element, e.block[1], Quantized(codes, np.ascontiguousarray(scales), zeros))


def decode_integers(q: Coded, groups: "NDArray[Any] | None", out: "NDArray[np.float32]", kernels: "KernelSet") -> None:
    """fp32 values to out [rows, columns]. `groups`, if there are any, has the group of each column [columns, 1]; where
    columns are in order, it says what the group size does."""
    import numpy as np

    v, group = q.values, q.group
    scales, zeros = v.scales, v.zeros
    columns = v.codes.shape[1]
    if groups is not None and not np.array_equal(groups[:, 0], np.arange(columns) // group):
        scales = np.ascontiguousarray(scales[:, groups[:, 0]])
        zeros = None if zeros is None else np.ascontiguousarray(zeros[:, groups[:, 0]])
        group = 1
    if zeros is None:
        kernels.decode_scaled(v.codes, q.element, scales, group, out)
    else:
        kernels.dequantize_int(v.codes, scales, zeros, group, out)
