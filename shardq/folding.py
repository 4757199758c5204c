"""Finds a fold: from rows of some weights, how much each column is smaller or larger than the others.

A layer's widest input channels meet small columns of v_proj and up_proj, and in a group the large weights of other
columns drown them (reference quality.md, 5.4 and 6 E). A power of two moved into the norm before makes their sizes more
alike; what is left of the difference tells what errors count.
"""

import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shardq.checkpoint import TensorRef
from shardq.decide import decide_weights
from shardq.decoded import round_rows
from shardq.dequantize.base import Scaling
from shardq.dequantize.decoding import scale_rows
from shardq.dequantize.plain import plain_rows
from shardq.errors import BadFold, BadOption
from shardq.fold import Fold, source_digest
from shardq.fold_sites import WEIGHT, NormSite, PairSite, Sites, find_sites
from shardq.fold_weights import power_of
from shardq.fused import model_types
from shardq.headers import read_checkpoint
from shardq.kernels import KernelSet, load
from shardq.recipe import Recipe
from shardq.search import kind_of
from shardq.source_rows import NoRowsError, SourceRows
from shardq.sources.base import Source
from shardq.weights import find_weights

SAMPLED_ROWS: Final = 1024  # of a matrix
EXPERTS: Final = ".experts."
EXPERT_ROWS: Final = 256  # of one of them
WINDOW_WEIGHTS: Final = 4 << 20  # that are read at once
MOST: Final = 64  # sixteenths of log2: a column that is nearly dead must not outweigh all others


Told = Callable[[int, int], None]  # bytes done, and all


@dataclass(frozen=True, slots=True)
class Found:
    """A fold, and what it is of."""

    fold: Fold
    norms: int
    pairs: int
    left: tuple[str, ...]  # layers that stay as they are, each with the reason


def find_fold(source: Source, recipe: Recipe, threads: int | None = None, report: Told | None = None) -> Found:
    """The fold of a checkpoint. The same for any number of threads. Memory: for each thread WINDOW_WEIGHTS in fp32
    twice, and the codes of a matrix whose rows are stored as columns. `report` is called with bytes done, and all.

    Raises BadOption for a model whose layers are not known, BadFold for weights that are not finite, and what planning
    and reading raise.
    """
    checkpoint = read_checkpoint(source)
    recipe = replace(recipe, fold=None)
    weights = find_weights(checkpoint, recipe)
    tensors = weights.tensors
    kept = {d.tensor.name for d in decide_weights(weights, checkpoint, recipe) if d.scheme is None}
    sites = _exact(find_sites(tensors, checkpoint.config), tensors, kept)
    if not sites.norms and not sites.pairs:
        types = ", ".join(sorted(model_types(checkpoint.config))) or "none"
        why = f": {sites.left[0]}" if sites.left else f" (its model types: {types})"
        raise BadOption(f"--fold: nothing of {checkpoint.label} is known to stay the same{why}; leave it out")
    probe = Probe(source, load(), recipe.decode == "rounded")
    sizes = _measure(sites, tensors, probe, threads or os.cpu_count() or 1, report)
    most, power = _rule(recipe)
    exponents = {name: np.clip(np.rint(own), -most, most).astype(np.int8) for name, own in sizes.items()}
    added = {s.norm: probe.factors(s, exponents.pop(s.norm), tensors[s.norm]) for s in sites.norms if s.adds}
    fold = Fold(
        {name.removesuffix(WEIGHT): x.tobytes() for name, x in exponents.items() if x.any()},
        {name.removesuffix(WEIGHT): x for name, x in added.items() if most},
        {name.removesuffix(WEIGHT): _sixteenths(own).tobytes() for name, own in sizes.items()},
        power,
        source_digest(checkpoint),
    )
    return Found(fold, len(sites.norms), len(sites.pairs), sites.left)


def _rule(recipe: Recipe) -> tuple[int, int]:
    """The largest exponent, and the power by which sizes count: what was measured best (bench/README.md). The fewest
    levels are better off without a fold, unless there are data for those of 3 bits, too."""
    scheme, has_data = recipe.scheme, recipe.importance is not None
    if scheme.format.is_integer and (scheme.bits == 2 or (scheme.bits == 3 and scheme.symmetric and not has_data)):
        return 0, 2
    return 1, 2 if has_data and kind_of(scheme) == "small_floats" else 4


def _measure(
    sites: Sites,
    tensors: Mapping[str, TensorRef],
    probe: "Probe",
    threads: int,
    report: Told | None,
) -> dict[str, NDArray[np.float64]]:
    """Sizes of the columns behind each norm, and behind the rows of each pair; by the names of these."""
    names = dict.fromkeys([*(n for s in sites.norms for n in s.of), *(p.columns for p in sites.pairs)])
    refs = [tensors[name] for name in names]
    found: dict[str, NDArray[np.float64]] = {}
    done_bytes, all_bytes = 0, sum(map(_read_bytes, refs))
    with ThreadPoolExecutor(threads) as pool:
        for t, own in zip(refs, pool.map(probe.sizes, refs), strict=True):
            found[t.name] = own
            done_bytes += _read_bytes(t)
            if report:
                report(done_bytes, all_bytes)
    of_norms = {s.norm: _centred(np.mean([found[name] for name in s.of], axis=0)) for s in sites.norms}
    return of_norms | {p.rows: _shared(found[p.columns], p, tensors[p.rows]) for p in sites.pairs}


def _exact(sites: Sites, tensors: Mapping[str, TensorRef], kept: Container[str]) -> Sites:
    """Without those that would cost a matrix digits that is kept: behind norms that add something, and in F16."""
    lost: dict[str, str] = {}
    for s in sites.norms:
        fed = next((n for n in (*s.of, *s.also) if n in kept and (s.adds or tensors[n].dtype == "F16")), None)
        if fed:
            lost[s.norm] = fed
    for p in sites.pairs:
        half = next((n for n in (p.rows, p.columns) if n in kept and tensors[n].dtype == "F16"), None)
        if half:
            lost[p.rows] = half
    norms = tuple(s for s in sites.norms if s.norm not in lost)
    pairs = tuple(p for p in sites.pairs if p.rows not in lost)
    left = (f"{name}: {of} is kept and would not stay exact" for name, of in lost.items())
    return Sites(norms, pairs, (*sites.left, *left))


def sample_rows(t: TensorRef) -> list[tuple[int, int]]:
    """Windows of a matrix' rows, evenly spread where these are many; each is one read."""
    assert t.shape is not None
    rows, columns = t.shape
    most, windows = (EXPERT_ROWS, 2) if EXPERTS in t.name else (SAMPLED_ROWS, 4)
    spread = [(0, rows)]
    if rows > most:
        high = most // windows
        spread = [(at, at + high) for at in (i * (rows - high) // (windows - 1) for i in range(windows))]
    step = max(1, WINDOW_WEIGHTS // columns)
    return [(at, min(end, at + step)) for begin, end in spread for at in range(begin, end, step)]


@dataclass(frozen=True, slots=True)
class Probe:
    """Reads weights of a source."""

    source: Source
    kernels: KernelSet
    rounded: bool  # decoded rows are rounded to the type of their weight

    def sizes(self, t: TensorRef) -> NDArray[np.float64]:
        """log2 of how large each column is, above or below the median: the mean magnitude once that of each row is 1; 0
        for a column of zeros. Raises BadFold, and what reading raises."""
        assert t.shape is not None
        total = np.zeros(t.shape[1])
        for wide in self._rows(t, sample_rows(t)):
            np.abs(wide, out=wide)
            means = wide.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
            if not np.isfinite(means).all():
                raise BadFold(f"{t.name} in {t.shard} holds NaN or infinity: expected finite weights; leave out --fold")
            np.divide(wide, np.where(means > 0, means, np.float32(1)), out=wide)
            total += wide.sum(axis=0, dtype=np.float64)
        found, some = np.zeros_like(total), total > 0
        if some.any():
            found[some] = _centred(np.log2(total[some]))
        return found

    def factors(self, site: NormSite, powers: NDArray[np.int8], t: TensorRef) -> bytes:
        """What columns behind a norm that adds something are multiplied by: as much less as what it multiplies by comes
        out larger, which is rounded to the norm's type."""
        assert t.dtype is not None
        assert t.shape is not None
        own = np.concatenate(list(self._rows(t, [(0, t.shape[0])])))
        folded = self._factor(own, site.adds, powers, t.dtype)
        plain = self._factor(own, site.adds, np.zeros_like(powers), t.dtype)
        right = [power_of(g) == k for g, k in zip(folded.tolist(), powers.tolist(), strict=True)]
        return np.where(right, folded, plain).astype("<f4").tobytes()

    def _factor(
        self, own: NDArray[np.float32], adds: float, powers: NDArray[np.int8], dtype: str
    ) -> NDArray[np.float32]:
        """1 where a norm multiplies by nothing."""
        scaled, stored = own.copy(), np.empty_like(own)
        scale_rows(scaled, Scaling(rows=powers.tobytes(), added=adds), 0)
        self.kernels.widen(round_rows(scaled, dtype), dtype, stored)
        before, behind = own[:, 0].astype(np.float64) + adds, stored[:, 0].astype(np.float64) + adds
        usable = (before > 0) & (behind > 0) | (before < 0) & (behind < 0)
        ratio = np.divide(before, behind, out=np.ones_like(before), where=usable)
        return np.asarray(ratio, np.float32)

    def _rows(self, t: TensorRef, windows: Iterable[tuple[int, int]]) -> Iterator[NDArray[np.float32]]:
        assert t.shape is not None
        e = t.encoded[0] if t.encoded else plain_rows(t) if len(t.shape) == 1 else None
        reader = SourceRows(t, e, self.rounded, self.source, self.kernels)
        for row, end_row in windows:
            try:
                weights, dtype = reader.taken(row, end_row)
            except NoRowsError as error:
                raise BadFold(f"{t.name} in {t.shard} cannot be decoded ({error}): leave out --fold") from error
            wide = np.empty(weights.shape, np.float32)
            self.kernels.widen(weights, dtype, wide)
            yield wide


def _shared(sizes: NDArray[np.float64], pair: PairSite, t: TensorRef) -> NDArray[np.float64]:
    """Of each row of `t` the mean of its columns, in logarithms, above or below the median; 0 without any column."""
    assert t.shape
    owners = np.asarray(pair.owners)
    counts = np.bincount(owners, minlength=t.shape[0])
    shared, some = np.zeros(t.shape[0]), counts > 0
    shared[some] = _centred(np.bincount(owners, weights=sizes, minlength=t.shape[0])[some] / counts[some])
    return shared


def _centred(sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Above or below their median."""
    return sizes - np.median(sizes)


def _sixteenths(sizes: NDArray[np.float64]) -> NDArray[np.int8]:
    return np.clip(np.rint(16 * sizes), -MOST, MOST).astype(np.int8)


def _read_bytes(t: TensorRef) -> int:
    assert t.shape is not None
    rows = sum(end - row for row, end in sample_rows(t))
    return t.size_bytes * rows // max(1, t.shape[0])
