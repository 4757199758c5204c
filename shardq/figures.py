"""How far quantized weights are from their source, and what shows that they were damaged: the figures of some rows."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shardq.kernels import KernelSet

COUNTS: Final = slice(4, 6)  # figures that are counted on codes
KEYS: Final = ("sse", "ssw", "max", "swe", "ends", "zeroed")  # of a journal's line


@dataclass(frozen=True, slots=True)
class Figures:
    """Of some rows, in the order of the kernels."""

    squared_error: float = 0.0  # sum of (weight - dequantized)**2
    squared_weight: float = 0.0  # sum of weight**2
    max_error: float = 0.0  # largest |weight - dequantized|
    error_product: float = 0.0  # sum of weight * (weight - dequantized)
    saturated: int = 0  # weights whose code is at an end of its range: the lowest or the highest code of integers, the
    # largest magnitude of floats with either sign
    zeroed_groups: int = 0  # groups of a row that dequantize to zeros alone although some weight is not zero


@dataclass(frozen=True, slots=True)
class Losses:
    """Sums of weighed squared errors where scales were searched."""

    before: float  # under round-to-nearest's scales
    after: float  # under those chosen
    energy: float  # of the weights themselves, weighed alike


FIGURES: Final = len(fields(Figures))  # of each row, as the kernels measure them
WEIGHED: Final = len(fields(Losses))  # of each row whose scales were searched


def sum_figures(stats: "NDArray[np.float64]", kernels: "KernelSet") -> Figures:
    """Figures of all rows of [rows, 6]; sums are exactly rounded, so that the cut into rows does not matter."""
    squares, weights, largest, products, saturated, zeroed = kernels.sum_errors(stats)
    return Figures(squares, weights, largest, products, int(saturated), int(zeroed))


def sum_losses(losses: "NDArray[np.float64]") -> Losses:
    """Losses of all rows of [rows, 3], exactly rounded."""
    return Losses(*(math.fsum(losses[:, i].tolist()) for i in range(WEIGHED)))


def merge_figures(parts: Iterable[Figures]) -> Figures:
    """Figures over several slabs or tensors; sums are exactly rounded, so that their order does not matter."""
    found = tuple(parts)
    return Figures(
        math.fsum(p.squared_error for p in found),
        math.fsum(p.squared_weight for p in found),
        max((p.max_error for p in found), default=0.0),
        math.fsum(p.error_product for p in found),
        sum(p.saturated for p in found),
        sum(p.zeroed_groups for p in found),
    )


def merge_losses(parts: Iterable[Losses]) -> Losses:
    """Likewise."""
    found = tuple(parts)
    return Losses(*(math.fsum(getattr(p, k) for p in found) for k in ("before", "after", "energy")))


def write_figures(figures: Figures, losses: Losses | None) -> dict[str, Any]:
    """Plain values for a journal."""
    f = figures
    values = (f.squared_error, f.squared_weight, f.max_error, f.error_product, f.saturated, f.zeroed_groups)
    written: dict[str, Any] = dict(zip(KEYS, values, strict=True))
    return written if losses is None else written | {"losses": [losses.before, losses.after, losses.energy]}


def read_figures(event: Mapping[str, Any]) -> tuple[Figures, Losses | None] | None:
    """The inverse; None for a line of a version that measured less."""
    if any(key not in event for key in KEYS):
        return None
    losses = event.get("losses")
    if losses is not None and len(losses) != WEIGHED:
        return None
    return Figures(*(event[key] for key in KEYS)), None if losses is None else Losses(*losses)
