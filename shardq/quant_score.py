"""How far anyone's quantized checkpoint is from its source, tensor by tensor: both are read by ranges and decoded, and
compared under the names that their weights have.

What a checkpoint's codes stand for is told by its own headers and configuration, so that it does not matter who made
it. Where its maker has moved scales between layers (AWQ, SmoothQuant) or turned them (QuaRot), weights differ though
the model may compute the same: `moved` says so where norms differ as well.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from shardq.checkpoint import Checkpoint, TensorRef
from shardq.errors import BadOption, UnsupportedSource
from shardq.figures import FIGURES, Figures, merge_figures, sum_figures
from shardq.formats import WEIGHT_DTYPES
from shardq.gguf.headers import holds_gguf
from shardq.headers import read_checkpoint
from shardq.kernels import KernelSet, load
from shardq.ledger import Errors, merge
from shardq.recipe import make_recipe
from shardq.scoring import sample_rows
from shardq.source_rows import WINDOW_BYTES, NoRowsError, SourceRows
from shardq.sources.base import Source
from shardq.staging import PROVENANCE
from shardq.weights import find_weights

MATRIX: Final = 2  # dimensions
SPLITTING: Final = "W4A16"  # a recipe by which stacks of experts are matrices; nothing is quantized here
Told = Callable[[int, int], None]  # tensors done, and all


@dataclass(frozen=True, slots=True)
class Scored:
    """One weight that both have."""

    name: str
    shape: tuple[int, ...]
    kind: str  # of the codes that the result has; empty where it has plain numbers
    errors: Errors  # of the rows that were compared
    rows: int  # compared
    same: bool  # both hold the same numbers there


@dataclass(frozen=True, slots=True)
class Score:
    """A quantized checkpoint beside its source."""

    result: str
    result_commit: str | None
    source: str
    source_commit: str | None
    tensors: tuple[Scored, ...]
    lacking: tuple[str, ...]  # weights of the source that the result has not
    extra: tuple[str, ...]  # and the reverse
    left: Mapping[str, str]  # weights that were not compared, and why
    matrices: int  # of the source that the result has in codes; `tensors` has some of them

    @property
    def quantized(self) -> tuple[Scored, ...]:
        """What the result has in codes, and matrices of plain numbers that are not the source's."""
        return tuple(t for t in self.tensors if t.kind or (len(t.shape) >= MATRIX and not t.same))

    @property
    def errors(self) -> Errors:
        """Over all that is quantized."""
        return merge(t.errors for t in self.quantized)

    @property
    def moved(self) -> tuple[str, ...]:
        """Vectors that are not the source's: norms that took up scales, or that were trained."""
        return tuple(t.name for t in self.tensors if not t.kind and not t.same and len(t.shape) < MATRIX)


def score_result(
    result: Source, source: Source, *, sample: int | None = None, full: bool = False, report: Told | None = None
) -> Score:
    """Compare `result`, a checkpoint that anyone has quantized, with what it was made of.

    `sample`: how many matrices in codes are compared, evenly spread over the checkpoint; None: all. Plain tensors are
    all compared. Without `full` some 2 million weights of each, in evenly spread windows of rows. Figures are those of
    the kernels' `error_values`: q as the reader of these codes has them in fp32. NaN and infinity in a source's weight
    make its figures NaN. Raises BadOption, UnsupportedSource for GGUF and for codes without a reader, and what reading
    raises.
    """
    if sample is not None and sample < 1:
        raise BadOption(f"--sample {sample}: expected at least one tensor")
    for side in (result, source):
        if holds_gguf(side.files()):
            raise UnsupportedSource(
                f"{side.label} is in GGUF, whose rows are in another order: `shardq verify --source` compares GGUF "
                "outputs of shardq"
            )
    _refuse_folded(result)
    made, original = (read_checkpoint(side) for side in (result, source))
    ours, theirs = (_weights(c) for c in (made, original))
    common = [n for n in theirs if n in ours]
    coded = [n for n in common if ours[n].encoded]
    stride = 1 if sample is None else max(1, len(coded) // sample)
    chosen = {*coded[::stride][:sample], *(n for n in common if not ours[n].encoded)}
    comparing = _Comparing(result, source, load(), full)
    scored: list[Scored] = []
    left: dict[str, str] = {}
    for done, name in enumerate(n for n in common if n in chosen):
        reason = _incomparable(ours[name], theirs[name])
        try:
            if reason is None:
                scored.append(comparing.score(ours[name], theirs[name]))
        except NoRowsError as error:
            reason = str(error)
        if reason:
            left[name] = reason
        if report:
            report(done + 1, len(chosen))
    return Score(
        made.label, made.commit, original.label, original.commit, tuple(scored),
        tuple(n for n in theirs if n not in ours), tuple(n for n in ours if n not in theirs), left, len(coded),
    )  # fmt: skip


def _refuse_folded(result: Source) -> None:
    """Of our own outputs the records say that scales were moved."""
    found = next((f for f in result.files() if f.name == PROVENANCE), None)
    if found is None:
        return
    try:
        fold = json.loads(result.read(PROVENANCE, 0, found.size_bytes))["identity"].get("recipe.fold")
    except (ValueError, LookupError, TypeError, AttributeError):
        return  # not ours
    if fold:
        raise UnsupportedSource(
            f"{result.label} was folded, so that its weights are not those of its source: `shardq verify --source` "
            "takes the fold into account"
        )


def _weights(checkpoint: Checkpoint) -> Mapping[str, TensorRef]:
    """Matrices, those of experts one by one, and all else that a checkpoint stands for."""
    return find_weights(checkpoint, make_recipe(SPLITTING)).tensors


def _incomparable(ours: TensorRef, theirs: TensorRef) -> str | None:
    if ours.shape != theirs.shape:
        return f"{list(ours.shape or ())} there, {list(theirs.shape or ())} in the source"
    for t in (ours, theirs):
        if not t.encoded and t.dtype not in WEIGHT_DTYPES:
            return f"{t.dtype} is no number to compare"
        if len(t.encoded) > 1:
            return "a stack of slices that are no matrices of their own"
    return None


@dataclass(frozen=True, slots=True)
class _Comparing:
    """Two sides that are read by ranges."""

    result: Source
    source: Source
    kernels: KernelSet
    full: bool

    def score(self, ours: TensorRef, theirs: TensorRef) -> Scored:
        """Raises NoRowsError, and what reading raises."""
        rows, columns = _as_matrix(theirs)
        sides = [_rows(t, side, self.kernels) for t, side in ((ours, self.result), (theirs, self.source))]
        figures: list[Figures] = []
        same, compared = True, 0
        for window in [(0, rows)] if self.full else sample_rows(rows, columns):
            for row, end_row in _pieces(*window, columns):
                (mine, dtype), (weights, stored) = (side.taken(row, end_row) for side in sides)
                values = np.empty(weights.shape, np.float32)
                self.kernels.widen(mine, dtype, values)
                stats = np.empty((len(weights), FIGURES))
                self.kernels.error_values(weights, stored, values, columns, stats)
                figures.append(sum_figures(stats, self.kernels))
                same = same and figures[-1].max_error == 0
                compared += len(weights)
        errors = Errors(merge_figures(figures), compared * columns)
        kind = ours.encoded[0].kind if ours.encoded else ""
        return Scored(theirs.name, theirs.shape or (), kind, errors, compared, same)


def _as_matrix(t: TensorRef) -> tuple[int, int]:
    """Rows and columns; vectors are a row, what has more dimensions lies in rows of the last one."""
    assert t.shape is not None
    columns = t.shape[-1] if t.shape else 1
    return (t.numel // columns if columns else 0), columns


def _rows(t: TensorRef, side: Source, kernels: KernelSet) -> SourceRows:
    if t.encoded:
        return SourceRows(t, t.encoded[0], False, side, kernels)
    rows, columns = _as_matrix(t)
    flat = TensorRef(t.name, t.shard, t.dtype, (rows, columns), t.begin, t.end)
    return SourceRows(flat, None, False, side, kernels)


def _pieces(row: int, end_row: int, columns: int) -> Sequence[tuple[int, int]]:
    """Windows that fit into memory."""
    step = max(1, WINDOW_BYTES // (4 * max(1, columns)))
    return [(at, min(end_row, at + step)) for at in range(row, end_row, step)]
