"""The rows that a GGUF file of a checkpoint should have, in fp32 and in the order of the file, from a source that is
read by ranges: they are made by what makes files, so that nothing is known here of names and stacks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shardq.block_tasks import FP32, BlocksTask, Take, Vector
from shardq.gguf.contents import Contents
from shardq.gguf_rows import DerivedRows, Made, Span, made_by
from shardq.kernels import KernelSet
from shardq.sources.base import Source


@dataclass(frozen=True, slots=True)
class ExpectedRows:
    """Of all tensors of a file."""

    source: Source
    contents: Contents
    made: Mapping[str, tuple[Made, ...]]  # tensor -> weights, each with what it has of this tensor alone

    def rows(self, name: str, spans: Sequence[Span], kernels: KernelSet) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Rows of a tensor in fp32, valid until the next ones are asked for, with the number of the first. `spans` say
        which; others come with them that the source has between these. Numbers are exactly the source's, but for what
        the converter computes of vectors. Raises NoRowsError for NaN and infinity, and what reading raises."""
        content = self.contents.tensors[name]
        columns = content.shape[0]
        if content.values:
            yield 0, np.array([content.values], np.float32)
        wanted = [(content.begin + FP32 * columns * a, content.begin + FP32 * columns * b) for a, b in spans]
        for made in self.made.get(name, ()):
            derived: DerivedRows | None = None
            for begin, end in _joined(_rows_in(made, wanted)):
                derived = derived or DerivedRows(made, False, self.source, kernels)
                for slab in made.slabs(begin, end):
                    for _, (data, offset) in derived.derive(*slab)[0]:
                        row, rest = divmod(offset - content.begin, FP32 * columns)
                        assert rest == 0
                        yield row, data.view(np.float32).reshape(-1, columns)


def expect_rows(contents: Contents, source: Source) -> ExpectedRows:
    """Those of the checkpoint that `contents` are of."""
    found: dict[str, list[Made]] = {}
    for made in made_by(contents.tasks, contents.weights).values():
        for tensor in dict.fromkeys(take.tensor for take in made.takes):
            own = tuple(take for take in made.takes if take.tensor == tensor)
            found.setdefault(tensor, []).append(Made(made.tensor, replace(made.work, takes=own)))
    return ExpectedRows(source, contents, {name: tuple(own) for name, own in found.items()})


def _rows_in(made: Made, wanted: Sequence[Span]) -> Iterator[Span]:
    """Rows of a weight that some bytes of the file are made of, with what must stay together."""
    for begin, end in wanted:
        for take in made.takes:
            columns = made.work.columns if isinstance(made.work, BlocksTask) else 1
            size, count = take.row_bytes(columns), columns if take.turned else len(take.rows)
            first, behind = max(0, (begin - take.begin) // size), min(count, -(-(end - take.begin) // size))
            if first >= behind:
                continue
            if isinstance(made.work, Vector):
                yield 0, made.rows
                continue
            for a, b in _positions(take, first, behind):
                yield made.snap(take.rows[a], take.rows[b - 1] + 1)


def _positions(take: Take, first: int, behind: int) -> Iterator[Span]:
    """Positions among the rows of a take of what its matrix has from `first` to `behind`."""
    if take.turned:
        yield 0, len(take.rows)
    elif take.order:
        run = take.order.run
        for place in np.unique(take.order.origins(first, behind) // run).tolist():
            yield place * run, (place + 1) * run
    else:
        yield first, behind


def _joined(spans: Iterator[Span]) -> Iterator[Span]:
    """The same rows in order, each once."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    yield from found
