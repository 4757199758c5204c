"""Random choices of calibration data: the same for a seed on every machine and with every version of Python and numpy.

Python and numpy promise that their generators' raw bits stay as they are, but not what they make of them; so that is
written down here. `shuffled` and `permuted` choose as AutoRound 0.16.1 does (`random.Random(seed).shuffle` for texts,
the datasets library's `shuffle(seed)`, which is `numpy.random.default_rng(seed).permutation`, for mixes).
"""

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


def shuffled(items: Sequence[T], seed: int) -> list[T]:
    """The items in the order of `random.Random(seed).shuffle` of CPython 3.11."""
    generator = random.Random(seed)  # noqa: S311 - nothing secret
    order = list(items)
    for last in reversed(range(1, len(order))):
        bits = (last + 1).bit_length()
        chosen = generator.getrandbits(bits)
        while chosen > last:
            chosen = generator.getrandbits(bits)
        order[last], order[chosen] = order[chosen], order[last]
    return order


def permuted(items: Sequence[T], seed: int) -> list[T]:
    """The items in the order of `numpy.random.default_rng(seed).permutation` of numpy 2.4."""
    halves = _halves(np.random.PCG64(seed))
    order = list(items)
    for last in reversed(range(1, len(order))):
        chosen = _bounded(halves, last)
        order[last], order[chosen] = order[chosen], order[last]
    return order


def draw(limit: int, count: int, seed: int) -> NDArray[np.int64]:
    """[count] whole numbers, uniform in [0, limit) (a bias below limit / 2**32); `limit` at most 2**32."""
    raw = np.random.PCG64(seed).random_raw(count) >> np.uint64(32)
    return (raw * np.uint64(limit) >> np.uint64(32)).astype(np.int64)


def draw_fractions(count: int, seed: int) -> NDArray[np.float64]:
    """[count] numbers, uniform in [0, 1), in steps of 2**-53."""
    raw = np.random.PCG64(seed).random_raw(count) >> np.uint64(11)
    return np.asarray(raw, np.float64) * 2.0**-53


def _halves(bits: np.random.PCG64) -> Iterator[int]:
    """The 32-bit numbers that numpy takes from a generator: the low half of each 64 first."""
    while True:
        raw = int(bits.random_raw())
        yield raw & 0xFFFFFFFF
        yield raw >> 32


def _bounded(halves: Iterator[int], most: int) -> int:
    """Uniform in [0, most]: as many low bits as it needs, until they fit; numpy's `random_interval`."""
    mask = (1 << most.bit_length()) - 1
    while (found := next(halves) & mask) > most:
        pass
    return found
