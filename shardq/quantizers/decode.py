"""What canonical codes stand for."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shardq.quantizers.quantized import Quantized
from shardq.schemes import Scheme

if TYPE_CHECKING:
    from shardq.kernels import KernelSet


def decode_rows(
    q: Quantized, scheme: Scheme, kernels: "KernelSet", out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """fp32 weights [rows, columns] of `q`: scale * (code - zero), scale * value, or scale * code + bias, each operation
    rounded once; a scale is divided by the global scale first, where there is one. They are put into `out` if that is
    given."""
    rows, columns = q.codes.shape
    group = scheme.group_columns(columns)
    scales = q.scales if q.global_scale is None else q.scales / np.float32(q.global_scale)
    out = np.empty((rows, columns), np.float32) if out is None else out
    if q.biases is not None:
        kernels.decode_affine(q.codes, scales, q.biases, group, "bias", out)
    elif q.zeros is not None:
        kernels.dequantize_int(q.codes, scales, q.zeros, group, out)
    else:
        kernels.decode_scaled(q.codes, scheme.element, scales, group, out)
    return out
