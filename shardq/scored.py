"""What comparing a quantized checkpoint with its source finds: the figures of each tensor, and what belongs to one side
alone."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.block_tasks import FP32
from shardq.errors import BadOption
from shardq.figures import FIGURES, Figures, merge_figures, sum_figures
from shardq.kernels import KernelSet
from shardq.ledger import Errors, merge
from shardq.scoring import sample_rows
from shardq.source_rows import WINDOW_BYTES, Span

MATRIX: Final = 2  # dimensions
DIGIT: Final = 2.0**-22  # relative: exponentials and factors of ropes are computed, and others may round otherwise
Told = Callable[[int, int], None]  # tensors done, and all


@dataclass(frozen=True, slots=True)
class Scored:
    """One weight that both have."""

    name: str  # as the result has it
    shape: tuple[int, ...]
    kind: str  # of the codes that the result has, of GGUF files the type of blocks; empty where it has plain numbers
    errors: Errors  # of the rows that were compared
    rows: int  # compared
    same: bool  # both hold the same numbers there
    origin: str = ""  # the source's only weight that it is made of, where that has another name


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
    file: str | None = None  # which of the result's GGUF models this is
    source_file: str | None = None  # and of the source's

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
        """Vectors that are not the source's, by more than the last digit: norms that took up scales, or that were
        trained."""
        vectors = (t for t in self.tensors if not t.kind and not t.same and len(t.shape) < MATRIX)
        return tuple(t.name for t in vectors if not t.errors.relative <= DIGIT)  # a NaN is neither


class Tally:
    """The figures of one weight while its rows come."""

    def __init__(self, kernels: KernelSet, group: int) -> None:
        """`group`: consecutive columns that count as zeroed where all of their values are 0."""
        self._kernels, self._group = kernels, group
        self._figures: list[Figures] = []
        self._weights = 0
        self.rows = 0
        self.same = True  # all numbers so far are equal

    def add(self, weights: NDArray[Any], dtype: str, values: NDArray[np.float32]) -> None:
        """Compare rows of a source, as kernels take them, with those of a result: both [rows, columns]."""
        stats = np.empty((len(weights), FIGURES))
        self._kernels.error_values(weights, dtype, values, self._group, stats)
        self._figures.append(sum_figures(stats, self._kernels))
        self.same = self.same and self._figures[-1].max_error == 0
        self.rows += len(weights)
        self._weights += values.size

    @property
    def errors(self) -> Errors:
        """Of all rows so far."""
        return Errors(merge_figures(self._figures), self._weights)


def choose_sample(names: Sequence[str], coded: Collection[str], sample: int | None) -> list[str]:
    """Those of `names` that are compared, in order: all that are not in codes, and of the others `sample`, evenly
    spread, or all."""
    stride = 1 if sample is None else max(1, len(coded) // sample)
    chosen = frozenset([n for n in names if n in coded][::stride][:sample])
    return [n for n in names if n in chosen or n not in coded]


def check_sample(sample: int | None) -> None:
    """Raises BadOption for a sample of nothing."""
    if sample is not None and sample < 1:
        raise BadOption(f"--sample {sample}: expected at least one tensor")


def windows(rows: int, columns: int, full: bool) -> list[Span]:
    """The rows of a tensor that are compared: all, or evenly spread ones."""
    return [(0, rows)] if full else sample_rows(rows, columns)


def pieces(row: int, end_row: int, columns: int) -> Iterator[Span]:
    """Rows in windows that fit into memory."""
    step = max(1, WINDOW_BYTES // (FP32 * max(1, columns)))
    yield from ((at, min(end_row, at + step)) for at in range(row, end_row, step))
