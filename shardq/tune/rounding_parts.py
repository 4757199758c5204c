"""What grids of all kinds have in common."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

TILE_WEIGHTS: Final = (1 << 15) - 1  # rounded at once, in a cache, and with one thread: torch shares out more than that
DEVICE_TILE_WEIGHTS: Final = 1 << 24  # the same on a device of its own, where a call costs more than memory
HALF: Final = 4  # bits of a byte
TYPES: Final[Mapping[str, torch.dtype]] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix among the rows of a grid."""

    rows: slice  # from start to stop, with a step where matrices take turns
    amax: float | None  # the largest magnitude of all that its scheme reaches; None where that is a group


@dataclass(frozen=True, slots=True)
class Rounded:
    """What groups of weights become."""

    levels: Tensor  # in the form of V: int32 (of int16 torch's compiler makes no vectors), or elements as float8_e4m3fn
    scales: Tensor  # of each group, as a reader multiplies by them
    shift: Tensor | None = None  # of each group: weight = scale * (level - shift), or scale * level + shift
    saturated: Tensor | None = None  # bool, in the form of V: V has no say
    kept: Tensor | None = None  # scales as they are stored, where that is something else


@dataclass(frozen=True, slots=True)
class Kept:
    """Codes of all rows of a weight in few bytes, until they are canonical ones; and their scales."""

    levels: Tensor  # [rows, columns]: uint8, of which two may share a byte, or values of elements as float8_e4m3fn
    scales: Tensor  # of each group, as they are stored
    shift: Tensor | None  # of each group: see Rounded


def pack_pairs(levels: Tensor) -> Tensor:
    """Numbers below 16, uint8 [rows, columns], two neighbours in a byte; those of an odd number of columns as they
    are."""
    return levels[:, ::2] | levels[:, 1::2] << HALF if levels.shape[1] % 2 == 0 else levels


def unpack_pairs(packed: Tensor, columns: int) -> Tensor:
    """What `pack_pairs` was given."""
    if packed.shape[1] == columns:
        return packed
    return torch.stack((packed & (1 << HALF) - 1, packed >> HALF), 2).flatten(1)


def row_tiles(weight: Tensor) -> Iterator[slice]:
    """Rows of a weight [rows, columns], so many at a time; never one alone of several, whose sums over a long group
    torch would share out and so add in another order."""
    rows, columns = weight.shape
    step = max(2, (TILE_WEIGHTS if weight.device.type == "cpu" else DEVICE_TILE_WEIGHTS) // columns)
    begin = 0
    while begin < rows:
        end = begin + step if begin + step + 1 < rows else rows
        yield slice(begin, end)
        begin = end


def in_groups(rows: Tensor, group: int) -> Tensor:
    """[rows, columns] as [rows, groups, columns of a group], where zeros fill a short last group."""
    short = -rows.shape[1] % group
    return (pad(rows, (0, short)) if short else rows).reshape(len(rows), -1, group)
