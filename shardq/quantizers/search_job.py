"""What every search works on."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shardq.quantizers.buffers import Buffers
from shardq.quantizers.scales import STORED
from shardq.schemes import WEIGHT_TYPE, Scheme
from shardq.search import Search

if TYPE_CHECKING:
    from shardq.importance_vectors import Means
    from shardq.kernels import KernelSet


@dataclass(frozen=True, slots=True)
class SearchJob:
    """Rows to quantize; fields as the arguments of `rtn.quantize_rows`."""

    source: NDArray[Any]
    dtype: str
    stored: str
    scheme: Scheme
    search: Search
    importance: NDArray[np.float32] | None  # [columns]: how much an error counts; finite, from 0 up
    buffers: Buffers
    losses: NDArray[np.float64]  # [rows, 2]: weighted errors under round-to-nearest's scales, and under those chosen
    kernels: "KernelSet"
    means: "Means | None" = None  # of a search that is `centered`

    @property
    def group(self) -> int:
        """Columns of a full group."""
        return self.scheme.group_columns(self.source.shape[1])

    @property
    def scale_format(self) -> str:
        """fp16, bf16 or fp32: what a scale is rounded to."""
        return STORED[self.stored] if self.scheme.scale == WEIGHT_TYPE else self.scheme.scale

    def weigh(self) -> NDArray[np.float64]:
        """What the weights of each row [rows] count, as `losses` counts their errors."""
        sums = np.empty(len(self.source))
        objective = "none" if self.search.rule == "auto_round" else self.search.objective
        self.kernels.weigh_squares(self.source, self.dtype, self.group, self.importance, objective, sums)
        return sums

    def factors(self, logarithmic: bool) -> NDArray[np.float32]:
        """The candidates."""
        return np.array(self.search.factors(logarithmic), np.float32)
