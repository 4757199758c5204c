"""Weights whose bits are the same everywhere: made of integers, with operations that IEEE 754 rounds."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
ROWS, COLS = 3, 768  # an odd number of super-blocks, so that kernels see rests
IMPORTANCES: Final = ("none", "plain", "zeros")


def words(seed: int, count: int) -> NDArray[np.int64]:
    """32 random bits each (splitmix64)."""
    x = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return ((x ^ x >> np.uint64(31)) >> np.uint64(32)).astype(np.int64)


def per_group(seed: int, group: int, lowest: int, highest: int) -> NDArray[np.int64]:
    """An integer from lowest to highest - 1 for each group of columns, [ROWS, COLS]."""
    each = lowest + words(seed, ROWS * COLS // group) % (highest - lowest)
    return each.repeat(group).reshape(ROWS, COLS)


def bell(seed: int) -> Floats:
    """Near enough to normal, with a deviation of about 0.02."""
    total = sum((words(seed + i, ROWS * COLS) >> 16) - 32768 for i in range(4))
    return (np.asarray(total) * 2.0**-21).astype(np.float32).reshape(ROWS, COLS)


def scaled(x: Floats, exponents: NDArray[np.int64]) -> Floats:
    """x * 2^exponents, rounded once."""
    return np.ldexp(x.astype(np.float64), exponents).astype(np.float32)


def truncated(x: Floats) -> Floats:
    """To bf16 values."""
    return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def with_zeros(x: Floats) -> Floats:
    """Half of the groups of 16 columns are zeros of both signs."""
    zeros = np.where(words(7, x.size).reshape(x.shape) & 1, np.float32(0), np.float32(-0.0))
    return np.where(per_group(8, 16, 0, 2) == 1, zeros, x)


def tails() -> Floats:
    """A few far from all others."""
    return bell(40) / (words(48, ROWS * COLS).reshape(ROWS, COLS) * 2.0**-32 + 2.0**-8).astype(np.float32)


def signs() -> Floats:
    """-1, 0 and 1."""
    return (words(9, ROWS * COLS).reshape(ROWS, COLS) % 3 - 1).astype(np.float32)


def below_powers() -> Floats:
    """Powers of two, and what is so near below them that a rounded logarithm does not tell."""
    missing = words(10, ROWS * COLS).reshape(ROWS, COLS) % 60
    return scaled((1 - missing * 2.0**-24).astype(np.float32), per_group(11, 32, -140, 15))


KINDS: Final[Mapping[str, Callable[[], Floats]]] = MappingProxyType(
    {
        "bell": lambda: bell(20),
        "bf16": lambda: truncated(bell(30)),
        "tails": tails,
        "grid": lambda: scaled(signs() * (words(12, ROWS * COLS).reshape(ROWS, COLS) % 9).astype(np.float32) / 16,
                               per_group(13, 32, -3, 1)),
        "zeros": lambda: with_zeros(bell(50)),
        "tiny": lambda: scaled(bell(60), per_group(14, 16, -145, -95)),
        "spread": lambda: scaled(bell(70), per_group(15, 16, -60, 1)),
        "constant": lambda: per_group(16, 32, -40, 40).astype(np.float32) / np.float32(7),
        "ends": lambda: signs() * (per_group(17, 32, 1, 100) / 8).astype(np.float32),
        "positive": lambda: np.abs(bell(80)) + np.float32(0.5),
        "outliers": lambda: np.where(words(18, ROWS * COLS).reshape(ROWS, COLS) % 97 == 0, bell(90) * 8192, bell(91)),
        "below_powers": below_powers,
    }
)  # fmt: skip


def importance(name: str) -> Floats | None:
    """What errors in columns count."""
    if name == "none":
        return None
    each = (words(19, COLS) * 2.0**-32 + 2.0**-10).astype(np.float32) ** 2
    return np.where(words(21, COLS) % 5 < 2, np.float32(0), each) if name == "zeros" else each
