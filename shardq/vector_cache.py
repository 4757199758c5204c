"""Vectors of importance that a worker keeps for its next task."""

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shardq.importance_vectors import Means, Ref

CACHED_VECTORS: Final = 8


class VectorCache:
    """The last vectors that a worker has used, ready for a search: tasks of a tensor follow each other."""

    def __init__(self, limit: int = CACHED_VECTORS) -> None:
        self._limit = limit
        self._held: OrderedDict[tuple[Ref, bool], NDArray[np.float32]] = OrderedDict()
        self._means: OrderedDict[Ref, Means] = OrderedDict()

    def get(self, ref: "Ref") -> "NDArray[np.float32]":
        """`weights_of` the vector, read-only. Raises as `read_vector`."""
        return self._find(ref, raw=False)

    def get_raw(self, ref: "Ref") -> "NDArray[np.float32]":
        """The vector as it is, read-only. Raises as `read_vector`."""
        return self._find(ref, raw=True)

    def get_means(self, ref: "Ref") -> "Means":
        """`read_means`. Raises as it does."""
        held = self._means.pop(ref, None)
        if held is None:
            from shardq.importance_vectors import read_means  # see _find

            held = read_means(ref)
        self._means[ref] = held
        while len(self._means) > self._limit:
            self._means.popitem(last=False)
        return held

    def _find(self, ref: "Ref", raw: bool) -> "NDArray[np.float32]":
        held = self._held.pop((ref, raw), None)
        if held is None:
            from shardq.importance_vectors import (  # where no errors are weighed none of it is needed
                read_vector,
                weights_of,
            )

            held = read_vector(ref) if raw else weights_of(read_vector(ref))
            held.setflags(write=False)
        self._held[ref, raw] = held
        while len(self._held) > self._limit:
            self._held.popitem(last=False)
        return held
