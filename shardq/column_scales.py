"""How large each column of a matrix is beside the others, once its rows are made alike (Sinkhorn)."""

import numpy as np
from numpy.typing import NDArray


def column_scales(weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """log2 of each column's scale, above or below their median; 0 for columns of zeros. Draft."""
    rows = np.sqrt(np.mean(np.square(weights, dtype=np.float64), axis=1, keepdims=True))
    even = weights / np.where(rows > 0, rows, 1)
    sizes = np.sqrt(np.mean(np.square(even), axis=0))
    some = sizes > 0
    found = np.zeros(len(sizes))
    found[some] = np.log2(sizes[some])
    return found - np.median(found[some]) if some.any() else found
