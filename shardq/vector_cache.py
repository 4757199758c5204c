"""Vectors of importance that a worker keeps for its next task."""

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shardq.importance_vectors import Ref

CACHED_VECTORS: Final = 8


class VectorCache:
    """The last vectors that a worker has used, ready for a search: tasks of a tensor follow each other."""

    def __init__(self, limit: int = CACHED_VECTORS) -> None:
        self._limit = limit
        self._held: OrderedDict[tuple[Ref, bool], NDArray[np.float32]] = OrderedDict()

    def get(self, ref: "Ref") -> "NDArray[np.float32]":
        """`weights_of` the vector, read-only. Raises as `read_vector`."""
        return self._find(ref, raw=False)

    def get_raw(self, ref: "Ref") -> "NDArray[np.float32]":
        """The vector as it is, read-only. Raises as `read_vector`."""
        return self._find(ref, raw=True)

    def _find(self, ref: "Ref", raw: bool) -> "NDArray[np.float32]":
        held = self._held.pop((ref, raw), None)
        if held is None:
            from shardq.importance_vectors import read_vector, weights_of  # what tasks weigh no errors need none of it

            held = read_vector(ref) if raw else weights_of(read_vector(ref))
            held.setflags(write=False)
        self._held[ref, raw] = held
        while len(self._held) > self._limit:
            self._held.popitem(last=False)
        return held
