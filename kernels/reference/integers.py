"""Integer quantization as formulas: auto-round 0.16.1, model-free, plain RTN. Always true division."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shardq.kernels.reference.arrays import filled, group_count, grouped, per_column, shaped

SMALLEST_SCALE = torch.tensor(1e-5).half().float()
BLOCK_COLUMNS = 128


@dataclass(frozen=True, slots=True)
class Rounded:
    """codes [rows, cols], scales and zeros [rows, G], bad [rows, G]."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bad: torch.Tensor


def symmetric_scales(mx: torch.Tensor, mn: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed fp16 scales as fp32; a positive extreme, and a tie, give a negative one."""
    extreme = torch.where(mx < -mn, -mn, -mx)
    scales = (extreme / (1 << (bits - 1))).half().float()
    return torch.where(scales < 0, scales.minimum(-SMALLEST_SCALE), scales.maximum(SMALLEST_SCALE))


def asymmetric_scales(mx: torch.Tensor, mn: torch.Tensor, bits: int) -> torch.Tensor:
    """Positive fp16 scales as fp32."""
    return ((mx - mn) / ((1 << bits) - 1)).half().float().maximum(SMALLEST_SCALE)


def round_to_nearest(w: torch.Tensor, bits: int, group: int, symmetric: bool) -> Rounded:
    """Codes, scales and zero points of fp32 weights [rows, cols]."""
    cols, middle, top = w.shape[1], 2 ** (bits - 1), 2**bits - 1
    groups = grouped(w, group, 0.0)
    mx, mn = groups.amax(2).clamp(min=0), groups.amin(2).clamp(max=0)
    scales = symmetric_scales(mx, mn, bits) if symmetric else asymmetric_scales(mx, mn, bits)
    bad = ~(groups.isfinite().all(2) & scales.isfinite())
    scales = torch.where(bad, SMALLEST_SCALE, scales)
    zeros = torch.full_like(scales, middle) if symmetric else (-mn / scales).round().clamp(0, top)
    zeros = torch.where(bad, middle, zeros)
    levels = (groups / scales[..., None]).round() + zeros[..., None]
    codes = torch.where(bad[..., None], middle, levels.clamp(0, top))
    return Rounded(codes.flatten(1)[:, :cols], scales, zeros, bad)


def dequantized(codes: NDArray[Any], scales: NDArray[Any], zeros: NDArray[Any], group: int) -> torch.Tensor:
    """fp32 scale * (code - zero), [rows, cols]."""
    rows, cols = filled("codes", codes, np.uint8).shape
    shape = (rows, group_count(cols, group))
    steps = torch.from_numpy(shaped("scales", scales, np.float32, shape).copy())
    points = torch.from_numpy(shaped("zeros", zeros, np.uint8, shape).astype(np.float32))
    levels = torch.from_numpy(codes.astype(np.float32)) - per_column(points, group, cols)
    return per_column(steps, group, cols) * levels


def in_blocks(x: torch.Tensor) -> torch.Tensor:
    """[rows, cols] as [rows, blocks, 128], padded with zeros."""
    missing = -x.shape[1] % BLOCK_COLUMNS
    return torch.nn.functional.pad(x, (0, missing)).reshape(x.shape[0], -1, BLOCK_COLUMNS)


def sum_of_products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Per row, float64 [rows], in the order that KernelSet.error_int fixes."""
    products = in_blocks(x) * in_blocks(y)
    lanes = products[..., 0::2] + products[..., 1::2]
    for half in (32, 16):
        lanes = lanes[..., :half] + lanes[..., half:]
    total = torch.zeros(x.shape[0], 16, dtype=torch.float64)
    for block in lanes.double().unbind(1):
        total = total + block
    for half in (8, 4, 2, 1):
        total = total[:, :half] + total[:, half:]
    return total[:, 0]


def zeroed_groups(w: torch.Tensor, values: torch.Tensor, group: int) -> torch.Tensor:
    """Per row, how many groups have nothing but zeros among `values`, and something else among `w`; int64 [rows]."""
    nothing, something = grouped(values, group, 0.0) == 0, grouped(w, group, 0.0) != 0
    return (nothing.all(2) & something.any(2)).sum(1)


def number_ends(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Which int32 codes are the first or the last of `bits` bits."""
    return (codes == 0) | (codes >= (1 << bits) - 1)


def error_figures(w: torch.Tensor, values: torch.Tensor, at_ends: torch.Tensor, group: int) -> torch.Tensor:
    """float64 [rows, 6], as KernelSet.error_int says, of fp32 weights and what they decode to."""
    difference = w - values
    figures = (
        sum_of_products(difference, difference),
        sum_of_products(w, w),
        difference.abs().amax(1),
        sum_of_products(w, difference),
        at_ends.sum(1),
        zeroed_groups(w, values, group),
    )
    return torch.stack([f.double() for f in figures], 1)
