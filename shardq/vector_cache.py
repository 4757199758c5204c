"""Vectors of importance that a worker keeps for its next task."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shardq.importance_vectors import Means, Ref

K = TypeVar("K")
V = TypeVar("V")
CACHED_VECTORS: Final = 8


class VectorCache:
    """The last vectors that a worker has used, ready for a search: tasks of a tensor follow each other."""

    def __init__(self, limit: int = CACHED_VECTORS) -> None:
        self._limit = limit
        self._held: OrderedDict[tuple[Ref, bool], NDArray[np.float32]] = OrderedDict()
        self._means: OrderedDict[Ref, Means] = OrderedDict()

    def get(self, ref: "Ref") -> "NDArray[np.float32]":
        """`weights_of` the vector, read-only. Raises as `read_vector`."""
        return self._keep(self._held, (ref, False), partial(_read, ref, raw=False))

    def get_raw(self, ref: "Ref") -> "NDArray[np.float32]":
        """The vector as it is, read-only. Raises as `read_vector`."""
        return self._keep(self._held, (ref, True), partial(_read, ref, raw=True))

    def get_means(self, ref: "Ref") -> "Means":
        """`read_means`. Raises as it does."""
        return self._keep(self._means, ref, partial(_read_means, ref))

    def _keep(self, kept: OrderedDict[K, V], key: K, read: Callable[[], V]) -> V:
        """What was read before, or is now; those that were used last stay."""
        found = kept.pop(key, None)
        if found is None:
            found = read()
        kept[key] = found
        while len(kept) > self._limit:
            kept.popitem(last=False)
        return found


def _read(ref: "Ref", raw: bool) -> "NDArray[np.float32]":
    from shardq.importance_vectors import read_vector, weights_of  # where no errors are weighed none of it is needed

    found = read_vector(ref) if raw else weights_of(read_vector(ref))
    found.setflags(write=False)
    return found


def _read_means(ref: "Ref") -> "Means":
    from shardq.importance_vectors import read_means  # see _read

    return read_means(ref)
