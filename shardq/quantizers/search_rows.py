"""Which search a scheme gets."""

import numpy as np
from numpy.typing import NDArray

from shardq.quantizers.quantized import Quantized
from shardq.quantizers.search_floats import search_powers, search_small_floats
from shardq.quantizers.search_integers import search_asymmetric, search_biases, search_symmetric
from shardq.quantizers.search_job import SearchJob
from shardq.search import kind_of


def search_rows(job: SearchJob, stats: NDArray[np.float64], amax: float | None) -> tuple[Quantized, int]:
    """`rtn.quantize_rows` with a search. ValueError where the scheme has nothing to search."""
    kind = kind_of(job.scheme)
    if kind == "symmetric":
        return search_symmetric(job, stats)
    if kind == "asymmetric":
        return (search_biases if job.scheme.numbers == "mlx" else search_asymmetric)(job, stats)
    if kind == "powers":
        return search_powers(job, stats)
    if kind == "small_floats":
        return search_small_floats(job, stats, amax)
    raise ValueError(f"{job.scheme.name}: its scales leave nothing to search")
