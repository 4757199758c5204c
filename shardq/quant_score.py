"""How far anyone's quantized checkpoint is from its source, tensor by tensor: both are read by ranges and decoded, and
compared under the names that their weights have.

What a checkpoint's codes stand for is told by its own headers and configuration, so that it does not matter who made
it. Where its maker has moved scales between layers (AWQ, SmoothQuant) or turned them (QuaRot), weights differ though
the model may compute the same: `Score.moved` says so where norms differ as well. GGUF files: see gguf_score.py.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from shardq.checkpoint import Checkpoint, TensorRef
from shardq.errors import UnsupportedSource
from shardq.formats import WEIGHT_DTYPES
from shardq.gguf.headers import holds_gguf
from shardq.halves import holds_halves
from shardq.headers import read_checkpoint
from shardq.kernels import KernelSet, load
from shardq.recipe import make_recipe
from shardq.scored import Score, Scored, Tally, Told, check_sample, choose_sample, pieces, windows
from shardq.source_rows import NoRowsError, SourceRows
from shardq.sources.base import Source
from shardq.staging import PROVENANCE
from shardq.weights import find_weights

# Recipes by which stacks of experts are matrices, rows of gate and up in halves or not; nothing is quantized here.
SPLITTING: Final = {False: "W4A16", True: "W4A16@gptq"}


def score_result(
    result: Source,
    source: Source,
    *,
    file: str | None = None,
    source_file: str | None = None,
    sample: int | None = None,
    full: bool = False,
    report: Told | None = None,
) -> Score:
    """Compare `result`, a checkpoint that anyone has quantized, with what it was made of.

    `file`, `source_file`: which GGUF model of a side, see gguf_model.choose_model. `sample`: how many matrices in codes
    are compared, evenly spread over the checkpoint; None: all. Plain tensors are all compared. Without `full` some 2
    million weights of each, in evenly spread windows of rows. Figures are those of the kernels' `error_values`: q as
    the reader of these codes has them in fp32. NaN and infinity in a source's weight make its figures NaN. Raises
    BadOption, UnsupportedSource for codes without a reader, and what reading and gguf_score.score_gguf raise.
    """
    check_sample(sample)
    _refuse_folded(result)
    if file is not None or holds_gguf(result.files()):
        from shardq.gguf_score import score_gguf

        return score_gguf(result, source, file, source_file, sample, full, report)
    if source_file is not None or holds_gguf(source.files()):
        raise UnsupportedSource(
            f"{result.label} is not in GGUF: expected the checkpoint that it was made of as its source, no GGUF file"
        )
    made, original = (read_checkpoint(side) for side in (result, source))
    halves = holds_halves(made.config)
    ours, theirs = (_weights(c, halves) for c in (made, original))
    common = [n for n in theirs if n in ours]
    coded = {n for n in common if ours[n].encoded}
    chosen = choose_sample(common, coded, sample)
    comparing = _Comparing(result, source, load(), full)
    scored: list[Scored] = []
    left: dict[str, str] = {}
    for done, name in enumerate(chosen):
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


def _weights(checkpoint: Checkpoint, halves: bool) -> Mapping[str, TensorRef]:
    """Matrices, those of experts one by one, and all else that a checkpoint stands for."""
    return find_weights(checkpoint, make_recipe(SPLITTING[halves])).tensors


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
        tally = Tally(self.kernels, columns)
        for row, end_row in (piece for w in windows(rows, columns, self.full) for piece in pieces(*w, columns)):
            (mine, dtype), (weights, stored) = (side.taken(row, end_row) for side in sides)
            values = np.empty(weights.shape, np.float32)
            self.kernels.widen(mine, dtype, values)
            tally.add(weights, stored, values)
        kind = ours.encoded[0].kind if ours.encoded else ""
        return Scored(theirs.name, theirs.shape or (), kind, tally.errors, tally.rows, tally.same)


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
