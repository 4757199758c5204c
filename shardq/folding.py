"""Finds a fold: from rows of some weights, how much each column is smaller or larger than the others.

A layer's widest input channels meet small columns of v_proj and up_proj, and in a group the large weights of other
columns drown them (reference quality.md, 5.4 and 6 E). Moved into the norm before, all columns are of one size.
"""

import os
from collections.abc import Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shardq.checkpoint import TensorRef
from shardq.column_scales import column_scales
from shardq.decide import decide_weights
from shardq.decoded import round_rows
from shardq.dequantize.base import Scaling
from shardq.dequantize.decoding import scale_rows
from shardq.dequantize.plain import plain_rows
from shardq.errors import BadFold, BadOption
from shardq.fold import MAX_EXPONENT, Fold, power_of, source_digest
from shardq.fold_sites import WEIGHT, NormSite, PairSite, Sites, find_sites
from shardq.fused import model_types
from shardq.headers import read_checkpoint
from shardq.kernels import KernelSet, load
from shardq.recipe import Recipe
from shardq.source_rows import NoRowsError, SourceRows
from shardq.sources.base import Source
from shardq.weights import find_weights

SAMPLED_ROWS: Final = 2048  # of a matrix
WINDOWS: Final = 8  # that a sample comes from


@dataclass(frozen=True, slots=True)
class Found:
    """A fold, and what it is of."""

    fold: Fold
    norms: int
    pairs: int
    left: tuple[str, ...]  # layers that stay as they are, each with the reason
    read_bytes: int  # of the source, roughly


def find_fold(source: Source, recipe: Recipe, threads: int | None = None) -> Found:
    """The fold of a checkpoint. The same for any number of threads. Memory: for each thread SAMPLED_ROWS of a matrix,
    in fp32 three times.

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
    names = dict.fromkeys([*(n for s in sites.norms for n in s.of), *(p.columns for p in sites.pairs)])
    refs = [tensors[name] for name in names]
    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        scales = dict(zip(names, pool.map(probe.scales, refs), strict=True))
    exponents: dict[str, bytes] = {}
    factors: dict[str, bytes] = {}
    for norm in sites.norms:
        powers = _exponents(np.mean([scales[name] for name in norm.of], axis=0))
        module = norm.norm.removesuffix(WEIGHT)
        if norm.adds:
            factors[module] = probe.factors(norm, powers, tensors[norm.norm])
        else:
            exponents[module] = powers.tobytes()
    for pair in sites.pairs:
        shape = tensors[pair.rows].shape
        assert shape
        exponents[pair.rows.removesuffix(WEIGHT)] = _exponents(_shared(scales[pair.columns], pair, shape[0])).tobytes()
    fold = Fold(exponents, factors, source_digest(checkpoint))
    return Found(fold, len(sites.norms), len(sites.pairs), sites.left, sum(map(_read_bytes, refs)))


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


def sample_rows(rows: int) -> list[tuple[int, int]]:
    """Windows of rows, evenly spread; all rows where these are few."""
    if rows <= SAMPLED_ROWS:
        return [(0, rows)]
    high = SAMPLED_ROWS // WINDOWS
    return [(at, at + high) for at in (i * (rows - high) // (WINDOWS - 1) for i in range(WINDOWS))]


@dataclass(frozen=True, slots=True)
class Probe:
    """Reads weights of a source."""

    source: Source
    kernels: KernelSet
    rounded: bool  # decoded rows are rounded to the type of their weight

    def scales(self, t: TensorRef) -> NDArray[np.float64]:
        """log2 of the scale of each column. Raises BadFold, and what reading raises."""
        assert t.shape is not None
        wide = self._rows(t, sample_rows(t.shape[0]))
        if not np.isfinite(wide).all():
            raise BadFold(f"{t.name} in {t.shard} holds NaN or infinity: expected finite weights; leave out --fold")
        return column_scales(wide)

    def factors(self, site: NormSite, powers: NDArray[np.int8], t: TensorRef) -> bytes:
        """What columns behind a norm that adds something are multiplied by: as much less as what it multiplies by comes
        out larger, which is rounded to the norm's type."""
        assert t.dtype is not None
        assert t.shape is not None
        own = self._rows(t, [(0, t.shape[0])])
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
        ratio: NDArray[np.float32] = np.divide(before, behind, out=np.ones_like(before), where=usable).astype(
            np.float32
        )
        return ratio

    def _rows(self, t: TensorRef, windows: Iterable[tuple[int, int]]) -> NDArray[np.float32]:
        assert t.shape is not None
        e = t.encoded[0] if t.encoded else plain_rows(t) if len(t.shape) == 1 else None
        reader = SourceRows(t, e, self.rounded, self.source, self.kernels)
        parts = []
        for row, end_row in windows:
            try:
                weights, dtype = reader.taken(row, end_row)
            except NoRowsError as error:
                raise BadFold(f"{t.name} in {t.shard} cannot be decoded ({error}): leave out --fold") from error
            wide = np.empty(weights.shape, np.float32)
            self.kernels.widen(weights, dtype, wide)
            parts.append(wide)
        return np.concatenate(parts)


def _shared(scales: NDArray[np.float64], pair: PairSite, rows: int) -> NDArray[np.float64]:
    """Of each row the mean of its columns, in exponents: the geometric one of their sizes; 0 without any."""
    owners = np.asarray(pair.owners)
    counts = np.bincount(owners, minlength=rows)
    sums = np.bincount(owners, weights=scales, minlength=rows)
    return sums / np.maximum(counts, 1)


def _exponents(scales: NDArray[np.float64]) -> NDArray[np.int8]:
    return np.clip(np.rint(scales), -MAX_EXPONENT, MAX_EXPONENT).astype(np.int8)


def _read_bytes(t: TensorRef) -> int:
    assert t.shape is not None
    rows = sum(end - row for row, end in sample_rows(t.shape[0]))
    return t.size_bytes * rows // max(1, t.shape[0])
