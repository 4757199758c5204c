"""What the searches share: groups with the weights of their errors, sums in the order that the contract fixes, and
scales as they are stored."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from shardq.kernels.contract import OBJECTIVES
from shardq.kernels.raw import RawWeights
from shardq.kernels.reference.arrays import group_count, grouped
from shardq.kernels.reference.elements import ROUND
from shardq.kernels.reference.floats import widened

CHUNK: Final = 128  # columns summed before their sum is added
LARGEST_HALF: Final = 65504.0
LADDER_RUNGS: Final = 256
MOST_CANDIDATES: Final = 256
MOST_SWEEPS: Final = 64


@dataclass(frozen=True, slots=True)
class Groups:
    """Weights and what their squared errors count, [rows, G, width]; both are 0 behind a row's last column, where
    `there` is False."""

    w: torch.Tensor
    e: torch.Tensor
    there: torch.Tensor

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """`sums` of [rows, G, width] numbers of columns that are there."""
        return sums(torch.where(self.there, x, 0.0))


def checked(name: str, value: str, known: tuple[str, ...]) -> str:
    """value, if it is one of `known`; else ValueError."""
    if value not in known:
        raise ValueError(f"{name}: expected {', '.join(known[:-1])} or {known[-1]}, found {value}")
    return value


def checked_sweeps(sweeps: int) -> int:
    """sweeps, if 0 to 64; else ValueError."""
    if not 0 <= sweeps <= MOST_SWEEPS:
        raise ValueError(f"sweeps: expected 0 to {MOST_SWEEPS}, found {sweeps}")
    return sweeps


def checked_factors(factors: NDArray[Any]) -> list[torch.Tensor]:
    """The candidates one by one; ValueError for none, too many, and those that are not positive and finite."""
    if factors.dtype != np.float32 or factors.ndim != 1 or not 1 <= len(factors) <= MOST_CANDIDATES:
        raise ValueError(f"factors: expected 1 to {MOST_CANDIDATES} float32 numbers, found {factors.shape}")
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ValueError("factors: expected finite numbers above 0")
    return list(torch.from_numpy(factors.copy()).unbind())


def checked_importance(importance: NDArray[Any] | None, cols: int, name: str = "importance") -> torch.Tensor:
    """What an error in a column counts [cols], 1 for None; ValueError for another size, or numbers below 0."""
    if importance is None:
        return torch.ones(cols)
    if importance.dtype != np.float32 or importance.shape != (cols,):
        raise ValueError(f"{name}: expected {cols} float32 numbers, found {importance.dtype} {importance.shape}")
    if not (np.isfinite(importance).all() and (importance >= 0).all()):
        raise ValueError(f"{name}: expected finite numbers from 0 up")
    return torch.from_numpy(importance.copy())


def sums(x: torch.Tensor) -> torch.Tensor:
    """fp32 [rows, G] of [rows, G, width]: over each 128 columns in order, then over these sums in order, from +0."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[2] % CHUNK))
    chunks = padded.reshape(*x.shape[:2], -1, CHUNK)
    with np.errstate(all="ignore"):
        inner = np.add.accumulate(chunks.numpy(), axis=3)[..., -1] + np.float32(0)
        return torch.from_numpy(np.add.accumulate(inner, axis=2)[..., -1].copy())


def weighed(w: torch.Tensor, group: int, importance: torch.Tensor, objective: str) -> Groups:
    """Groups of weights [rows, cols] under an objective."""
    rows, cols = w.shape
    groups, width = grouped(w, group, 0.0), min(group, cols)
    e = grouped(importance.expand(rows, cols), group, 0.0)
    if objective == "square":
        e = e * (groups * groups)
    elif objective == "root":
        columns = torch.full((group_count(cols, width),), float(width))
        columns[-1] = cols - width * (len(columns) - 1)
        mean = sums(groups * groups) / columns
        e = e * roots(mean[..., None] + groups * groups)
    there = grouped(torch.ones(rows, cols), group, 0.0) == 1
    return Groups(groups, torch.where(there, e, 0.0), there)


def read_groups(
    src: RawWeights, dtype: str, group: int, importance: NDArray[np.float32] | None, objective: str
) -> Groups:
    """Groups of raw weights under an objective."""
    w = widened(src, dtype)
    weights = checked_importance(importance, w.shape[1])
    return weighed(w, group, weights, checked("objective", objective, OBJECTIVES))


def roots(x: torch.Tensor) -> torch.Tensor:
    """Square roots, rounded once: those of torch may be off by a unit."""
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.sqrt(x.numpy()))


def level(x: torch.Tensor, lowest: torch.Tensor | float, highest: torch.Tensor | float) -> torch.Tensor:
    """Whole numbers from lowest to highest, halves to even; NaN becomes lowest."""
    x = torch.where(x > lowest, x, lowest)
    return (torch.where(x < highest, x, highest) + ROUND) - ROUND


def stored(x: torch.Tensor, scale: str) -> torch.Tensor:
    """Rounded to the format, half to even; NaN and what is beyond it become infinite."""
    kept = x if scale == "fp32" else x.half().float() if scale == "fp16" else x.bfloat16().float()
    return torch.where(kept.isnan(), torch.inf, kept)


def row_losses(before: torch.Tensor, after: torch.Tensor) -> NDArray[np.float64]:
    """float64 [rows, 2]: errors of groups [rows, G] added in order."""
    with np.errstate(all="ignore"):
        totals = np.add.accumulate(torch.stack((before, after), 1).double().numpy(), axis=2)
    return totals[..., -1]
