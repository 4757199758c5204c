"""GPTQ of one matrix: codes that make up for each other's errors, by what is known of the matrix' inputs.

Source: E. Frantar et al., arXiv:2210.17323, in the form of J. Chee et al., arXiv:2307.13304, which gives the same
codes without an inverse of H = X^T X (`hessians`): columns are rounded one after the other, each where the errors of
those before it want it; in blocks, so that most of what errors add up to is one product of matrices. Groups are static:
scales are found once, for the weights as they are, by shardq's own search with the diagonal of H as importance; so
columns may go in any order, those with the largest inputs first, and a layout needs no order of groups. Other than the
paper's code: a column whose input is always 0 keeps its nearest codes, and so does a row that is no better by H for all
the moving; and H off its diagonal is made smaller, towards what a few tokens do tell of others (O. Ledoit and M. Wolf,
doi:10.1016/S0047-259X(03)00096-4, whose target is another one).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

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
from shardq.tune.hessians import Factored
from shardq.tune.inputs import importance_by
from shardq.tune.settings import Scales

if TYPE_CHECKING:
    from shardq.kernels import KernelSet

STATS: Final = 6  # figures of a row
TILE_WEIGHTS: Final = 1 << 22  # of rows that get codes together, which are copied
ERROR_ROWS: Final = 256  # of which errors are found at once


@dataclass(frozen=True, slots=True)
class Compensated:
    """A matrix after GPTQ."""

    quantized: Quantized
    nearest_errors: NDArray[np.float64]  # [rows]: e H e^T, e what a row errs, with the nearest codes of the same scales
    errors: NDArray[np.float64]  # [rows]: of the result, never more


def quantize_gptq(
    weight: NDArray[np.float32],
    factored: Factored,
    scheme: Scheme,
    kernels: "KernelSet",
    *,
    block: int = 128,
    scales: Scales = "search",
    amax: float | None = None,
    stored: str | None = None,
) -> Compensated:
    """Quantize a weight [rows, columns], fp32, with H of its inputs; any factor of that gives the same codes.

    Codes are the kernels' nearest ones of the moved weights; ties and saturation as in round-to-nearest. `amax`,
    `stored`: as for `quantizers.rtn.quantize_rows`. Raises BadOption for a scheme of GGUF's blocks, NonFiniteWeight for
    NaN or infinity in the weight.
    """
    rows, columns = weight.shape
    if scheme.block:
        raise BadOption(f"{scheme.name}: its codes and scales are found together; GPTQ needs the scales first")
    if block < 1:
        raise BadOption(f"GPTQ in blocks of {block} columns: expected at least 1")
    if len(factored.chosen) != columns:
        raise ValueError(f"expected H [{columns}, {columns}], found {list(factored.both.shape)}")
    found = _find_scales(weight, factored.diagonal, scheme, kernels, scales, amax, stored)
    nearest_errors, errors = np.empty(rows), np.empty(rows)
    step = max(1, TILE_WEIGHTS // columns)
    for begin in range(0, rows, step):
        part = slice(begin, min(rows, begin + step))
        start = found.rows(part)
        codes, erred = _sweep(weight[part], factored, _Columns(start, scheme, kernels, columns), block)
        moved = factored.weigh(erred)
        del erred
        nearest = _nearest_errors(weight[part], start, factored, scheme, kernels)
        worse = moved >= nearest
        codes[worse] = start.codes[worse]
        found.codes[part] = codes
        nearest_errors[part], errors[part] = nearest, np.where(worse, nearest, moved)
    return Compensated(found, nearest_errors, errors)


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
    weight: NDArray[np.float32], factored: Factored, columns: _Columns, block: int
) -> tuple[NDArray[np.uint8], torch.Tensor]:
    """Codes [rows, columns], each of what a weight is beside the errors of the columns before it; and what all err,
    fp32, in the chosen order."""
    chosen = factored.chosen
    left = torch.from_numpy(weight)[:, torch.from_numpy(chosen)]  # a copy, in which errors take the place of weights
    codes = np.empty(weight.shape, np.uint8)
    for begin in range(0, len(chosen), block):
        end = min(begin + block, len(chosen))
        by = factored.feedback(begin, end)
        own, within = left[:, begin:end], by[begin:]
        aims = torch.addmm(own, left[:, :begin], by[:begin])
        for i in range(end - begin):
            column = int(chosen[begin + i])
            found, stands_for = columns.round(aims[:, i : i + 1].contiguous().numpy(), column)
            codes[:, column] = found[:, 0]
            own[:, i : i + 1] -= torch.from_numpy(stands_for)
            aims[:, i + 1 :] += torch.outer(own[:, i], within[i, i + 1 :])
    return codes, left


def _nearest_errors(
    weight: NDArray[np.float32], q: Quantized, factored: Factored, scheme: Scheme, kernels: "KernelSet"
) -> NDArray[np.float64]:
    """e H e^T of each row, e what its codes err."""

    def found() -> Iterator[NDArray[np.float64]]:
        for begin in range(0, len(weight), ERROR_ROWS):
            rows = slice(begin, begin + ERROR_ROWS)
            e = weight[rows] - decode_rows(q.rows(rows), scheme, kernels)
            yield factored.weigh(torch.from_numpy(e)[:, torch.from_numpy(factored.chosen)])

    return np.concatenate([*found()])
