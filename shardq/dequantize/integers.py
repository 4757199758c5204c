"""Integer codes with scales and zero points for groups of columns: what compressed-tensors, GPTQ and AWQ share.

w = scale * (code - zero) in fp32, rounded once."""

from typing import TYPE_CHECKING, Any

from shardq.dequantize.base import Coded, Encoded
from shardq.errors import CorruptShard

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


def decode_integers(
    e: Encoded, q: Coded, groups: "NDArray[Any] | None", out: "NDArray[np.float32]", kernels: "KernelSet"
) -> None:
    """fp32 values to out [rows, columns]. `groups`, if there are any, has the group of each column [columns, 1]; where
    columns are in order, it says what the group size does. Raises CorruptShard for a group that does not exist."""
    import numpy as np

    v, group = q.values, q.group
    scales, zeros = v.scales, v.zeros
    columns = v.codes.shape[1]
    if groups is not None and not np.array_equal(groups[:, 0], np.arange(columns) // group):
        if groups.min() < 0 or groups.max() >= scales.shape[1]:
            raise CorruptShard(
                f"{e.name} in {e.parts[0].shard}: columns have groups {groups.min()} to {groups.max()}, expected 0 to "
                f"{scales.shape[1] - 1}; the checkpoint may be damaged"
            )
        half = 1 << (int(q.element.removeprefix("int")) - 1)
        points = np.full(scales.shape, half, np.float32) if zeros is None else zeros.astype(np.float32)
        np.subtract(v.codes, _by_column(points, groups[:, 0], kernels), out=out, dtype=np.float32)
        np.multiply(out, _by_column(scales, groups[:, 0], kernels), out=out)
    elif zeros is None:
        kernels.decode_scaled(v.codes, q.element, scales, group, out)
    else:
        kernels.dequantize_int(v.codes, scales, zeros, group, out)


def _by_column(
    values: "NDArray[np.float32]", groups: "NDArray[np.int32]", kernels: "KernelSet"
) -> "NDArray[np.float32]":
    """values[:, groups] for [rows, G], by lines: gathering single values takes five times as long."""
    import numpy as np

    from shardq.dequantize.values import turned_words

    return turned_words(np.ascontiguousarray(values.T)[groups], kernels).view(np.float32)
