"""What grids of all kinds have in common."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

TYPES: Final[Mapping[str, torch.dtype]] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix among the rows of a grid."""

    rows: slice  # from start to stop, with a step where matrices take turns
    amax: float | None  # the largest magnitude of all that its scheme reaches; None where that is a group


@dataclass(frozen=True, slots=True)
class Rounded:
    """What groups of weights become."""

    levels: Tensor  # in the form of V: int16, or values of elements as float8_e4m3fn, which holds all of them
    scales: Tensor  # of each group, as a reader multiplies by them
    shift: Tensor | None = None  # of each group: weight = scale * (level - shift), or scale * level + shift
    saturated: Tensor | None = None  # bool, in the form of V: V has no say
    kept: Tensor | None = None  # scales as they are stored, where that is something else
    slopes: Tensor | None = None  # of scales by factors
