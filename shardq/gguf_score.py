"""How far a GGUF file of anyone is from its source, tensor by tensor, under the names of the file: from a checkpoint,
whose rows are brought into the order of the file first, or from another GGUF file of the same model."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from shardq.errors import UnsupportedSource
from shardq.ggml import GGML
from shardq.gguf.contents import find_contents
from shardq.gguf.headers import holds_gguf, show
from shardq.gguf_decoding import FLOATS, why_undecoded
from shardq.gguf_expected import expect_rows
from shardq.gguf_model import OpenedModel, PlacedTensor, open_model
from shardq.headers import read_checkpoint
from shardq.kernels import KernelSet, load
from shardq.schemes import BLOCKS
from shardq.scored import Score, Scored, Tally, Told, choose_sample, pieces, windows
from shardq.source_rows import NoRowsError, Span
from shardq.sources.base import Source

READERS: Final = 4  # tensors that are compared side by side


class Rows(Protocol):
    """Where the rows of a source come from: gguf_model.OpenedModel, gguf_expected.ExpectedRows."""

    def rows(self, name: str, spans: Sequence[Span], kernels: KernelSet) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Rows in fp32 [rows, columns] and the number of the first, at least those that are asked for, each once."""
        ...


@dataclass(frozen=True, slots=True)
class Original:
    """What a file is compared with."""

    label: str
    commit: str | None
    file: str | None  # which GGUF model
    architecture: str | None
    shapes: Mapping[str, tuple[int, ...]]  # of all tensors, GGUF's order
    weights: Mapping[str, tuple[str, ...]]  # of a checkpoint, that a tensor is made of
    types: Mapping[str, str]  # of tensors that are in GGUF
    rows: Rows


def score_gguf(
    result: Source,
    source: Source,
    file: str | None,
    source_file: str | None,
    sample: int | None,
    full: bool,
    report: Told | None,
) -> Score:
    """As quant_score.score_result, where the result is in GGUF. All names but `Scored.origin` are those of GGUF
    tensors; files of other versions of llama.cpp may lack some, and have extra ones. Rows of a checkpoint are decoded
    exactly, never by way of BF16; tensors with NaN or infinity among those that are compared are left out, while those
    of a GGUF file as source make figures NaN.

    Raises BadOption for a side that holds several models and none is chosen; UnsupportedSource for a checkpoint that
    shardq makes no GGUF files of, and for a file of another architecture; MissingPackage without gguf, where the source
    is a checkpoint; what opening and reading raise.
    """
    made = open_model(result, file, "--file")
    original = _open_original(source, source_file)
    if made.architecture != original.architecture:
        raise UnsupportedSource(
            f"{made.name} of {made.source.label} says that its architecture is {show(made.architecture)}, and that of "
            f"{original.label} is {show(original.architecture)}: expected one, since each has its own order of rows"
        )
    common = [name for name in made.tensors if name in original.shapes]
    coded = {name for name in common if made.tensors[name].tensor.type not in FLOATS}
    chosen = choose_sample(common, coded, sample)
    comparing = _Comparing(made, original, load(), full)
    scored: list[Scored] = []
    left: dict[str, str] = {}
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(comparing.score, name) for name in chosen]
        try:
            for done, (name, future) in enumerate(zip(chosen, futures, strict=True)):
                found = future.result()
                if isinstance(found, Scored):
                    scored.append(found)
                else:
                    left[name] = found
                if report:
                    report(done + 1, len(chosen))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    lacking = tuple(n for n in original.shapes if n not in made.tensors)
    extra = tuple(n for n in made.tensors if n not in original.shapes)
    return Score(
        result.label, result.commit, original.label, original.commit, tuple(scored), lacking, extra, left, len(coded),
        made.name, original.file,
    )  # fmt: skip


def _open_original(source: Source, file: str | None) -> Original:
    if file is not None or holds_gguf(source.files()):
        model = open_model(source, file, "--source-file")
        shapes = {name: t.shape for name, t in model.tensors.items()}
        types = {name: t.tensor.type for name, t in model.tensors.items()}
        return Original(source.label, source.commit, model.name, model.architecture, shapes, {}, types, model)
    checkpoint = read_checkpoint(source)
    contents = find_contents(checkpoint, source)
    shapes = {name: t.shape for name, t in contents.tensors.items()}
    weights = {name: t.weights for name, t in contents.tensors.items()}
    rows = expect_rows(contents, source)
    return Original(checkpoint.label, checkpoint.commit, None, contents.architecture, shapes, weights, {}, rows)


@dataclass(frozen=True, slots=True)
class _Comparing:
    """Two sides that are read by ranges."""

    made: OpenedModel
    original: Original
    kernels: KernelSet
    full: bool

    def score(self, name: str) -> Scored | str:
        """What was found of a tensor that both have, or why it is not compared. Raises what reading raises."""
        ours, shape = self.made.tensors[name], self.original.shapes[name]
        if ours.shape != shape:
            return f"{list(reversed(ours.shape))} there, {list(reversed(shape))} in the source"
        if not prod(shape):
            return "it is empty"
        theirs = self.original.types.get(name)
        for kind in (ours.tensor.type, theirs):
            if kind and (why := why_undecoded(kind)):
                return why
        try:
            return self._compare(name, ours)
        except NoRowsError as error:
            return str(error)

    def _compare(self, name: str, ours: PlacedTensor) -> Scored:
        kind = "" if ours.tensor.type in FLOATS else ours.tensor.type
        tally = Tally(self.kernels, _group(kind) or ours.columns)
        spans = windows(ours.rows, ours.columns, self.full)
        for first, weights in self.original.rows.rows(name, spans, self.kernels):
            for row, end_row in pieces(first, first + len(weights), ours.columns):
                values = self.made.read_rows(name, row, end_row, self.kernels)
                tally.add(np.ascontiguousarray(weights[row - first : end_row - first]), "F32", values)
        names = self.original.weights.get(name, ())
        origin = names[0] if len(names) == 1 else ""
        shape = tuple(reversed(ours.shape))
        return Scored(name, shape, kind, tally.errors, tally.rows, tally.same, origin)


def _group(kind: str) -> int:
    """Columns that share a scale; 0 for plain numbers."""
    if not kind:
        return 0
    return BLOCKS[kind].group_size if kind in BLOCKS else GGML[kind].block_weights
