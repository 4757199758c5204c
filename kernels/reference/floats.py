"""Raw weights as fp32 numbers."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shardq.kernels.reference.arrays import filled, grouped


def widened(src: NDArray[Any], dtype: str) -> torch.Tensor:
    """fp32 values of raw weights, made of integers so that a NaN keeps its bits. ValueError for an unknown dtype."""
    if dtype == "F32":
        return torch.from_numpy(filled("src", src, np.float32).copy())
    if dtype not in ("BF16", "F16"):
        raise ValueError(f"dtype: expected BF16, F16 or F32, found {dtype}")
    raw = torch.from_numpy(filled("src", src, np.uint16).astype(np.int32))
    if dtype == "BF16":
        return (raw << 16).view(torch.float32)
    sign = (raw & 0x8000) << 16
    exponent, mantissa = raw >> 10 & 31, raw & 1023
    normal = exponent + 112 << 23 | mantissa << 13
    special = 255 << 23 | mantissa << 13
    subnormal = (mantissa.to(torch.float32) * 2.0**-24).view(torch.int32)
    magnitude = torch.where(exponent == 0, subnormal, torch.where(exponent == 31, special, normal))
    return (sign | magnitude).view(torch.float32)


def narrowed(src: NDArray[np.float32]) -> torch.Tensor:
    """fp16 patterns of fp32 values, as int16; a NaN keeps no more than its sign."""
    x = torch.from_numpy(src.copy())
    nan = torch.where(x.view(torch.int32) < 0, torch.tensor(0xFE00 - 2**16), torch.tensor(0x7E00)).to(torch.int16)
    return torch.where(x.isnan(), nan, x.half().view(torch.int16))


def group_extremes(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest of each group, [rows, G]; NaN is passed over, zeros are +0."""
    infinity = float("inf")
    low = grouped(x.nan_to_num(infinity, infinity, -infinity), group, infinity).amin(2)
    high = grouped(x.nan_to_num(-infinity, infinity, -infinity), group, -infinity).amax(2)
    return low + 0.0, high + 0.0
