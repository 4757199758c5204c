"""The arrays that a quantizer works in."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardq.arena import Arena
from shardq.schemes import Scheme


@dataclass(frozen=True, slots=True)
class Buffers:
    """Room for the result of up to so many rows, and for what comes before it."""

    codes: NDArray[np.uint8]  # [rows, columns]
    scales: NDArray[np.float32]  # [rows, G]
    zeros: NDArray[np.uint8]  # [rows, G]
    low: NDArray[np.float32]  # [rows, G], scratch
    high: NDArray[np.float32]  # [rows, G], scratch

    def first(self, rows: int) -> "Buffers":
        """Those of the first rows."""
        return Buffers(self.codes[:rows], self.scales[:rows], self.zeros[:rows], self.low[:rows], self.high[:rows])


def buffer_shapes(rows: int, columns: int, scheme: Scheme) -> tuple[tuple[tuple[int, ...], Any], ...]:
    """Shapes and types of the arrays, in order."""
    groups = (rows, scheme.groups(columns))
    return (
        ((rows, columns), np.uint8),
        (groups, np.float32),
        (groups, np.uint8),
        (groups, np.float32),
        (groups, np.float32),
    )


def take_buffers(arena: Arena, rows: int, columns: int, scheme: Scheme) -> Buffers:
    """Buffers from an arena that has room for `buffer_shapes`."""
    return Buffers(*(arena.take(shape, kind) for shape, kind in buffer_shapes(rows, columns, scheme)))
