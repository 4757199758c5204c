"""What tests of kernels share: cases that are drawn, of what kinds numbers are, and ladders of scales."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardq.kernels import DTYPES, KernelSet

Check = Callable[[NDArray[Any], NDArray[Any]], None]  # the fixtures of conftest.py: same_bits, ...
WithoutNan = Callable[[NDArray[Any]], NDArray[Any]]
Make = Callable[[int, str, int, int, str], NDArray[Any]]
MakeImportance = Callable[[int, str, int], NDArray[np.float32] | None]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

KINDS = ("plain", "edges", "ties", "tiny", "wild")  # of weights
SPREADS = ("equal", "plain", "zeros", "all_zero", "huge")  # of what counts by column
IMPORTANCES = ("none", *SPREADS)
FLOATS = ("e0m3", "e2m1", "e2m3", "e3m2", "e4m3fn", "e5m2")


@dataclass(frozen=True)
class Case:
    """Weights in groups of columns, and the seed of all that is drawn beside them."""

    seed: int
    kind: str
    shape: tuple[int, int]
    dtype: str
    group: int

    @property
    def groups(self) -> tuple[int, int]:
        """Rows, and groups of each; the last may be short."""
        return self.shape[0], -(-self.shape[1] // self.group)


def draw_cases(columns: int, groups: Sequence[int]) -> st.SearchStrategy[Case]:
    """Cases of every kind and dtype with up to 19 rows, which is more than any lanes, and up to `columns`."""
    return st.builds(
        Case,
        seed=st.integers(0, 2**32 - 1),
        kind=st.sampled_from(KINDS),
        shape=st.tuples(st.integers(1, 19), st.integers(1, columns)),
        dtype=st.sampled_from(DTYPES),
        group=st.sampled_from(groups),
    )


def make_ladder(kernels: KernelSet, kind: str) -> Floats:
    """Powers of two by their exponent, e4m3 by its code below a global scale, or numbers that no one should pass."""
    if kind == "powers":
        return np.exp2(np.arange(-127.0, 129.0).clip(max=127)).astype(np.float32)
    if kind == "wild":
        return np.random.default_rng(5).integers(0, 0x7F800000, 256, np.uint32).view(np.float32)
    values, one = np.empty((1, 256), np.float32), np.ones((1, 1), np.float32)
    kernels.decode_scaled(np.arange(256, dtype=np.uint8).reshape(1, -1), "e4m3fn", one, 256, values)
    return np.where(np.arange(256) < 127, values[0], 0).astype(np.float32) / np.float32(37000)


def draw_rungs(case: Case, low: int, high: int, most: int) -> tuple[Bytes, Bytes, Bytes]:
    """First codes of [low, high), last ones from the one before to `most` after, and chosen ones around the first."""
    rng = np.random.default_rng(case.seed)
    begin = rng.integers(low, high, case.groups)
    codes = begin, begin + rng.integers(-1, most + 1, case.groups), begin + rng.integers(-3, 4, case.groups)
    first, last, chosen = (x.clip(0, 255).astype(np.uint8) for x in codes)
    return first, last, chosen
