"""Between numpy arrays and torch tensors, and the argument checks that all reference kernels share."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def filled(name: str, array: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """The array, if it is a C-contiguous matrix of this dtype with at least one row and column; else ValueError."""
    if array.dtype != dtype or array.ndim != 2 or 0 in array.shape or not array.flags.c_contiguous:
        found = f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"{name}: expected a filled C-contiguous {np.dtype(dtype).name} matrix, found {found}")
    return array


def shaped(name: str, array: NDArray[Any], dtype: type[np.generic], shape: tuple[int, int]) -> NDArray[Any]:
    """As filled, and of exactly this shape."""
    filled(name, array, dtype)
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, found {list(array.shape)}")
    return array


def checked_bits(bits: int) -> int:
    """bits, if 2 to 8; else ValueError."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: expected 2 to 8, found {bits}")
    return bits


def group_count(cols: int, group: int) -> int:
    """Groups of a row of `cols` columns; ValueError for a group below 1."""
    if group < 1:
        raise ValueError(f"group: expected at least 1 column, found {group}")
    return -(-cols // group)


def grouped(x: torch.Tensor, group: int, fill: float) -> torch.Tensor:
    """[rows, cols] as [rows, G, group], the short last group filled up. A group wider than the row is the row."""
    rows, cols = x.shape
    width = min(group, cols)
    count = group_count(cols, width)
    padded = torch.full((rows, count * width), fill, dtype=x.dtype)
    padded[:, :cols] = x
    return padded.reshape(rows, count, width)


def per_column(x: torch.Tensor, group: int, cols: int) -> torch.Tensor:
    """One value per group, [rows, G], repeated for every column, [rows, cols]."""
    return x.repeat_interleave(min(group, cols), dim=1)[:, :cols]


def group_values(name: str, array: NDArray[Any], matrix: NDArray[Any], group: int) -> torch.Tensor:
    """One fp32 value per group of a matrix [rows, cols], as a tensor [rows, G]; ValueError as shaped."""
    rows, cols = matrix.shape
    return torch.from_numpy(shaped(name, array, np.float32, (rows, group_count(cols, group))).copy())


def whole_blocks(name: str, size: int, block_type: str, block: int) -> int:
    """Blocks of a row of `size` columns or bytes; ValueError if the last one is not whole."""
    if size % block:
        raise ValueError(f"{name}: expected rows of whole {block_type} blocks of {block}, found {size}")
    return size // block
