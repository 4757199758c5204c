"""How much each scheme would harm each matrix: quantized in memory, on some of its rows, and compared.

The harm is the share of the output's energy that the error takes: sum(e * (w - q)^2) / sum(e * w^2), once with e the
importance of the column and once with 1, whichever is larger: by importance alone a few columns with massive inputs,
which a search spares, would hide what becomes of the others. A share, because every matrix feeds the next: a small
v_proj does as much damage as a large up_proj that is hurt alike (reference quality.md, 5.4). Squared, because twice
the error of a matrix does more than twice the damage: a few of them at 2 bits ruin a model. Between matrices a little
less, as those that are harder to quantize than others matter less than their shares say (bench/README.md). Times what
experience says of the module (sensitivity.py). Rows of giants are sampled, evenly; nothing is written.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.arena import Arena, reserve
from shardq.checkpoint import TensorRef
from shardq.figures import FIGURES
from shardq.importance_vectors import Ref, read_vector, weights_of
from shardq.kernels import KernelSet, load
from shardq.quantizers.buffers import buffer_shapes, take_buffers
from shardq.quantizers.decode import decode_rows
from shardq.quantizers.rtn import quantize_rows
from shardq.schemes import Scheme
from shardq.source_rows import NoRowsError, SourceRows
from shardq.sources.base import Source

if TYPE_CHECKING:
    from shardq.search import Search

SAMPLED_WEIGHTS: Final = 1 << 21  # of a matrix; a smaller one is scored whole
WINDOWS: Final = 8  # that a sample comes from
ROWS: Final = 128  # a window is a multiple: no scale that rows share is cut
GROWTH: Final = 2.0  # power of a share, of one matrix under its candidates
BETWEEN: Final = 1.9  # power of shares, of one matrix beside others
KEPT: Final = 0.0  # the harm of what is not quantized


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to quantize a matrix."""

    scheme: Scheme | None  # None: kept
    search: "Search | None"


@dataclass(frozen=True, slots=True)
class Subject:
    """One matrix, and what it may become."""

    tensor: TensorRef
    candidates: tuple[Candidate, ...]
    importance: Ref | None
    sensitivity: float = 1.0  # what its harm is multiplied by


def score_all(subjects: Sequence[Subject], source: Source, rounded: bool, threads: int) -> Mapping[str, list[float]]:
    """Module -> its harm under each of its candidates. The same for any number of threads. `rounded`: decoded rows are
    rounded to the weight's type, as by --decode. No scheme has scales that reach beyond a group. Raises what reading
    raises; a matrix that holds NaN or infinity counts as unharmed: the run that quantizes it will say so.
    """
    kernels = load()
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda s: _score(s, source, rounded, kernels), subjects)
        return {s.tensor.module: harms for s, harms in zip(subjects, found, strict=True)}


def sample_rows(rows: int, columns: int) -> list[tuple[int, int]]:
    """Windows of rows, evenly spread, that hold about SAMPLED_WEIGHTS; all rows where these are fewer."""
    if rows * columns <= SAMPLED_WEIGHTS:
        return [(0, rows)]
    high = max(1, SAMPLED_WEIGHTS // columns // WINDOWS // ROWS) * ROWS
    count = max(1, min(WINDOWS, rows // high))
    starts = dict.fromkeys(i * (rows - high) // max(1, count - 1) // ROWS * ROWS for i in range(count))
    return [(at, min(rows, at + high)) for at in starts]


def _score(s: Subject, source: Source, rounded: bool, kernels: KernelSet) -> list[float]:
    t = s.tensor
    assert t.shape is not None
    rows, columns = t.shape
    e = t.encoded[0] if t.encoded else None
    taken = SourceRows(t, e, rounded, source, kernels)
    importance = None if s.importance is None else weights_of(read_vector(s.importance))
    counts = np.ones((1, columns)) if importance is None else np.stack([np.ones(columns), importance])
    errors, energy = np.zeros((len(s.candidates), len(counts))), np.zeros(len(counts))
    for row, end_row in sample_rows(rows, columns):
        try:
            weights, dtype = taken.taken(row, end_row)
        except NoRowsError:
            return [KEPT] * len(s.candidates)
        wide = np.empty(weights.shape, np.float32)
        kernels.widen(weights, dtype, wide)
        energy += _weigh(wide, counts)
        for k, c in enumerate(s.candidates):
            errors[k] += _harm(weights, dtype, wide, c, t.dtype or dtype, importance, counts, kernels)
    if not (energy > 0).all():
        return [KEPT] * len(s.candidates)
    harms = weigh_shares((errors / energy).max(axis=1)) * s.sensitivity
    return [x if math.isfinite(x) else KEPT for x in harms.tolist()]


def weigh_shares(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """What shares of the energy, [candidates] of one matrix, say of harm: s^GROWTH * t^(BETWEEN - GROWTH), with t the
    typical one, the geometric mean of those that are finite and above 0. All 0: 0; NaN and infinity stay what they are,
    or NaN."""
    hurt = shares[(shares > 0) & np.isfinite(shares)]
    typical = math.exp(float(np.log(hurt).mean())) if len(hurt) else 1.0
    harms: NDArray[np.float64] = shares**GROWTH * typical ** (BETWEEN - GROWTH)
    return harms


def _harm(
    weights: NDArray[Any], dtype: str, wide: NDArray[np.float32], c: Candidate, stored: str,
    importance: NDArray[np.float32] | None, counts: NDArray[np.float64], kernels: KernelSet,
) -> NDArray[np.float64]:  # fmt: skip
    """Energy of the error, by each row of `counts`."""
    if c.scheme is None:
        return np.zeros(len(counts))
    rows, columns = weights.shape
    arena = Arena()
    arena.reset(reserve(*buffer_shapes(rows, columns, c.scheme)))
    buffers = take_buffers(arena, rows, columns, c.scheme)
    stats = np.empty((rows, FIGURES))
    weighed = importance if c.search else None
    part, bad = quantize_rows(weights, dtype, c.scheme, buffers, stats, kernels, None, stored, c.search, weighed)
    return np.zeros(len(counts)) if bad else _weigh(wide - decode_rows(part, c.scheme, kernels), counts)


def _weigh(values: NDArray[np.float32], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    energies: NDArray[np.float64] = counts @ np.einsum("rc,rc->c", values, values, dtype=np.float64)
    return energies


def count_sampled(tensors: Iterable[TensorRef]) -> int:
    """Source bytes that scoring reads, roughly: those of the sampled rows."""
    total = 0
    for t in tensors:
        assert t.shape is not None
        rows = sum(end - row for row, end in sample_rows(*t.shape))
        total += t.size_bytes * rows // t.shape[0]
    return total
