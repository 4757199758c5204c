"""An order in which GGUF has rows or columns of a weight, as two axes of their numbering that change places."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Regrouping:
    """Places along one axis, numbered as [outer, first, second, inner], become [outer, second, first, inner]."""

    outer: int
    first: int
    second: int
    inner: int = 1

    @property
    def size(self) -> int:
        """Places on the axis."""
        return self.outer * self.first * self.second * self.inner

    @property
    def run(self) -> int:
        """Neighbours, from a multiple on, that are neighbours afterwards, in whatever order."""
        return self.inner if self.inner > 1 else self.first * self.second

    def apply(self, data: "NDArray[Any]", axis: int) -> "NDArray[Any]":
        """`data`, which has all places along `axis`, with that axis in the new order; a copy, contiguous."""
        import numpy as np

        shape = data.shape
        at = axis % data.ndim
        split = data.reshape(*shape[:at], self.outer, self.first, self.second, self.inner, *shape[at + 1 :])
        return np.ascontiguousarray(split.swapaxes(at + 1, at + 2)).reshape(shape)

    def places(self, begin: int, end: int) -> "NDArray[np.int64]":
        """Where the places from `begin` to `end` are in the new order."""
        import numpy as np

        outer, left = np.divmod(np.arange(begin, end), self.first * self.second * self.inner)
        first, left = np.divmod(left, self.second * self.inner)
        second, inner = np.divmod(left, self.inner)
        return ((outer * self.second + second) * self.first + first) * self.inner + inner

    def origins(self, begin: int, end: int) -> "NDArray[np.int64]":
        """Which places those from `begin` to `end` of the new order were."""
        return Regrouping(self.outer, self.second, self.first, self.inner).places(begin, end)
