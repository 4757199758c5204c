"""GPTQ of one matrix: codes that make up for each other's errors, by what is known of the matrix' inputs.

Source: E. Frantar et al., arXiv:2210.17323: columns are rounded one after the other, and what a column errs is moved
to those that are not rounded yet, by the Cholesky factor of the inverse of H = X^T X; in blocks, so that most of the
moving is one product of matrices. Groups are static: scales are found once, for the weights as they are, by shardq's
own search with the diagonal of H as importance; so columns may go in any order, those with the largest inputs first,
and a layout needs no order of groups. Other than the paper's code: a column whose input is always 0 keeps its nearest
codes, and so does a row that is no better by H for all the moving; and H off its diagonal is made smaller, towards what
a few tokens do tell of others (O. Ledoit and M. Wolf, doi:10.1016/S0047-259X(03)00096-4, whose target is another one).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from shardq.errors import BadOption, NonFiniteWeight
from shardq.quantizers.buffers import Buffers, buffer_shapes
from shardq.quantizers.decode import decode_rows
from shardq.quantizers.native_fp8 import sign_zeros
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.rtn import quantize_rows
from shardq.schemes import Scheme
from shardq.search import default_search
from shardq.tune.inputs import importance_by
from shardq.tune.settings import Order, Scales

if TYPE_CHECKING:
    from shardq.kernels import KernelSet

MOST_DAMPING: Final = 1.0
STATS: Final = 6  # figures of a row
ERROR_ROWS: Final = 256  # of which errors are found at once


@dataclass(frozen=True, slots=True)
class Compensated:
    """A matrix after GPTQ."""

    quantized: Quantized
    damping: float  # share of H's mean diagonal that was added to it: more than was asked for where H needs it
    nearest_errors: NDArray[np.float64]  # [rows]: e H e^T, e what a row errs, with the nearest codes of the same scales
    errors: NDArray[np.float64]  # [rows]: of the result, never more


def quantize_gptq(
    weight: NDArray[np.float32],
    hessian: NDArray[Any],
    scheme: Scheme,
    kernels: "KernelSet",
    *,
    damping: float = 0.01,
    shrinkage: float = 0.0,
    order: Order = "static",
    block: int = 128,
    scales: Scales = "search",
    amax: float | None = None,
    stored: str | None = None,
) -> Compensated:
    """Quantize a weight [rows, columns], fp32, with H [columns, columns], fp32 or fp64: the sum or mean of x x^T over
    its inputs; any factor of it gives the same codes.

    Codes are the kernels' nearest ones of the moved weights; ties and saturation as in round-to-nearest. `shrinkage`,
    from 0 to 1, is the share of H off its diagonal that does not count: at 1 nothing is moved. `damping`, from 0 to 1,
    is multiplied by 10 until H can be factored. `amax`, `stored`: as for `quantizers.rtn.quantize_rows`. H in fp64 is
    factored so, and costs twice as much. Raises BadOption for a scheme of GGUF's blocks, or damping or shrinkage beyond
    its range, NonFiniteWeight for NaN or infinity in the weight or H.
    """
    columns = weight.shape[1]
    if scheme.block:
        raise BadOption(f"{scheme.name}: its codes and scales are found together; GPTQ needs the scales first")
    if not 0 <= damping <= MOST_DAMPING or block < 1:
        raise BadOption(f"GPTQ with damping {damping} and blocks of {block} columns: expected 0 to 1, and at least 1")
    if not 0 <= shrinkage <= 1:
        raise BadOption(f"GPTQ with a shrinkage of {shrinkage}: expected 0 to 1")
    if hessian.shape != (columns, columns):
        raise ValueError(f"expected H [{columns}, {columns}], found {list(hessian.shape)}")
    if not np.isfinite(hessian).all():
        raise NonFiniteWeight(
            f"GPTQ: H [{columns}, {columns}] holds NaN or infinity; do the model's activations overflow?"
        )
    diagonal = np.ascontiguousarray(np.diagonal(hessian)).astype(np.float64)
    start = _find_scales(weight, diagonal, scheme, kernels, scales, amax, stored)
    chosen = np.argsort(-diagonal, kind="stable") if order == "static" else np.arange(columns)
    factor, used = _factor(torch.from_numpy(hessian), torch.from_numpy(chosen), damping, shrinkage)
    codes = _sweep(weight, factor.float(), chosen, _Columns(start, scheme, kernels, columns), block)
    del factor  # as large as H
    moved = Quantized(codes, start.scales, start.zeros, start.biases, start.global_scale)
    nearest_errors = _errors(weight, start, hessian, scheme, kernels)
    errors = _errors(weight, moved, hessian, scheme, kernels)
    worse = errors >= nearest_errors
    codes[worse] = start.codes[worse]
    return Compensated(moved, used, nearest_errors, np.where(worse, nearest_errors, errors))


def _find_scales(
    weight: NDArray[np.float32],
    diagonal: NDArray[np.float64],
    scheme: Scheme,
    kernels: "KernelSet",
    scales: Scales,
    amax: float | None,
    stored: str | None,
) -> Quantized:
    """The scales that stay, and the nearest codes under them. Raises NonFiniteWeight."""
    rows, columns = weight.shape
    buffers = Buffers(*(np.zeros(shape, kind) for shape, kind in buffer_shapes(rows, columns, scheme)))
    importance = importance_by(diagonal)
    search = default_search(scheme, weighted=importance is not None) if scales == "search" else None
    stats = np.empty((rows, STATS))
    found, bad = quantize_rows(
        weight, "F32", scheme, buffers, stats, kernels, amax, stored, search, importance if search else None
    )
    if bad:
        raise NonFiniteWeight(f"GPTQ: {bad} groups hold NaN or infinity, or their scales overflow")
    return found


def _factor(
    hessian: torch.Tensor, chosen: torch.Tensor, damping: float, shrinkage: float
) -> tuple[torch.Tensor, float]:
    """U, upper, with U^T U = (shrunk H + damping)^-1 in the chosen order; and the damping that it took. Raises
    BadOption."""
    own = hessian.diagonal()[chosen]
    while True:  # of what is as large as H two at a time, beside H itself
        damped = hessian[chosen][:, chosen]
        mean = damped.diagonal().mean().item() or 1.0
        damped.lerp_(damped.new_zeros(()), shrinkage)
        damped.diagonal().copy_(own + damping * mean)
        damped.diagonal()[damped.diagonal() == 0] = mean  # such a column has no part in anything
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            del inverse
        if not failed and bool(torch.isfinite(upper).all()):
            return upper, damping
        if damping >= MOST_DAMPING:
            raise BadOption("GPTQ: H cannot be factored, even damped; is it symmetric, a sum of x x^T?")
        damping = min(max(damping * 10, 1e-4), MOST_DAMPING)


@dataclass(frozen=True, slots=True)
class _Columns:
    """Codes of single columns under scales that are there."""

    start: Quantized
    scheme: Scheme
    kernels: "KernelSet"
    columns: int

    def round(self, values: NDArray[np.float32], column: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """The nearest codes [rows, 1] of a column's values [rows, 1], and what they stand for."""
        q, scheme, kernels = self.start, self.scheme, self.kernels
        group = slice(place := column // scheme.group_columns(self.columns), place + 1)
        steps = np.ascontiguousarray(q.scales[:, group])
        codes, zeros, biases = np.empty(values.shape, np.uint8), None, None
        if q.biases is not None:
            biases = np.ascontiguousarray(q.biases[:, group])
            kernels.encode_affine(values, "F32", scheme.bits, 1, steps, biases, "subtract", codes)
        elif not scheme.symmetric:
            assert q.zeros is not None
            zeros = np.ascontiguousarray(q.zeros[:, group])
            rule = "round_add" if scheme.numbers == "auto_round" else "add_round"
            kernels.encode_affine(values, "F32", scheme.bits, 1, steps, zeros.astype(np.float32), rule, codes)
        else:
            shared = steps if q.global_scale is None else steps / np.float32(q.global_scale)
            kernels.encode_scaled(values, "F32", scheme.element, 1, shared, codes)
            if scheme.numbers == "fp8":
                sign_zeros(values, codes)
        single = Quantized(codes, steps, zeros, biases, q.global_scale)
        return codes, self._decode(single)

    def _decode(self, single: Quantized) -> NDArray[np.float32]:
        return decode_rows(single, self.scheme, self.kernels)


def _sweep(
    weight: NDArray[np.float32], factor: torch.Tensor, chosen: NDArray[np.int64], columns: _Columns, block: int
) -> NDArray[np.uint8]:
    """Codes [rows, columns] after each column's error was moved to those that follow in the chosen order."""
    left = torch.from_numpy(weight[:, chosen])  # a copy
    codes = np.empty(weight.shape, np.uint8)
    for begin in range(0, len(chosen), block):
        end = min(begin + block, len(chosen))
        own, within = left[:, begin:end], factor[begin:end, begin:end]
        errors = torch.empty_like(own)
        for i in range(end - begin):
            column = int(chosen[begin + i])
            values = own[:, i : i + 1].contiguous()
            found, stands_for = columns.round(values.numpy(), column)
            codes[:, column] = found[:, 0]
            errors[:, i] = (values - torch.from_numpy(stands_for))[:, 0] / within[i, i]
            own[:, i + 1 :] -= torch.outer(errors[:, i], within[i, i + 1 :])
        left[:, end:] -= errors @ factor[begin:end, end:]
    return codes


def _errors(
    weight: NDArray[np.float32], q: Quantized, hessian: NDArray[Any], scheme: Scheme, kernels: "KernelSet"
) -> NDArray[np.float64]:
    """e H e^T of each row, e what its codes err."""
    h = torch.from_numpy(hessian)
    found = np.empty(len(weight))
    for begin in range(0, len(weight), ERROR_ROWS):
        rows = slice(begin, begin + ERROR_ROWS)
        e = torch.from_numpy(weight[rows] - decode_rows(q.rows(rows), scheme, kernels)).to(h.dtype)
        found[rows] = ((e @ h).double() * e.double()).sum(1).numpy()
    return found
