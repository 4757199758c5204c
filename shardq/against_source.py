"""An output against its source: weights are read again, decoded where the source has them encoded, and measured against
what the output has of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardq.carry import Goal
from shardq.checkpoint import TensorRef
from shardq.dequantize.base import Encoded
from shardq.errors import BadFold, UnsupportedSource
from shardq.figures import FIGURES
from shardq.headers import read_checkpoint
from shardq.kernels import KernelSet, load
from shardq.ledger import DECODED
from shardq.making import TARGET_ARRAYS
from shardq.outputs import Output, target_of
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.rtn import measure_rows
from shardq.recorded import check_account, goal_of, is_as_recorded, is_of_source, weights_of
from shardq.schemes import Scheme, parse_name
from shardq.source_rows import WINDOW_BYTES, NoRowsError, SourceRows
from shardq.sources.base import Source
from shardq.unpack import OutputShard, check_figures, check_packing, read_arrays
from shardq.weights import is_turned


def check_against_source(output: Output, source: Source, shards: Mapping[str, OutputShard]) -> tuple[list[str], int]:
    """Problems, and how many tensors were compared: the ledger has all of the source and nothing else, error figures
    are recomputed from the source's weights and the unpacked output, which packed again must give the same bytes; what
    was copied or decoded is compared byte for byte. Raises what reading raises.
    """
    ledger = output.ledger["tensors"]
    checkpoint = read_checkpoint(source)
    try:
        weights = weights_of(output, checkpoint)
    except (UnsupportedSource, BadFold) as e:
        return [str(e)], 0
    problems = list(check_account(output.ledger, weights))
    compared = [n for n in ledger if n in weights.tensors]
    against = Against(output, source, load())
    for name in compared:
        t, entry = weights.tensors[name], ledger[name]
        if not is_as_recorded(t, entry):
            problems.append(f"{name} is not in the source as the ledger has it")
            continue
        try:
            problems += against.check(t, entry, shards)
        except NoRowsError as e:
            problems.append(f"{name} cannot be derived: {e}")
    return problems, sum(is_of_source(ledger[name]) for name in compared)


@dataclass(frozen=True, slots=True)
class Against:
    """A source that an output is compared with."""

    output: Output
    source: Source
    kernels: KernelSet

    def check(self, t: TensorRef, entry: Mapping[str, Any], shards: Mapping[str, OutputShard]) -> Iterator[str]:
        """Problems of one weight. Raises what reading and decoding raise."""
        if entry["outcome"] == "dropped" or not is_of_source(entry):
            return
        shard = shards[entry["file"]]
        if entry["outcome"] == "copied":
            if not _is_copy(t, self.source, shard):
                yield f"{t.name} differs from the source although it was copied"
        elif entry["outcome"] == DECODED:
            if not self._is_decoded(t, shard):
                yield f"{t.name} differs from the source although it was only decoded"
        else:
            layout = self.output.layout
            scheme = layout.settle(parse_name(entry["scheme"]))
            arrays = read_arrays(shard, target_of(t.name, entry))
            q = layout.unpack(arrays, scheme, self.kernels)
            seen = layout.unpacks_to(scheme)
            if seen == scheme:  # values that stand for codes cannot be packed again
                yield from check_packing(t.name, entry, arrays, q, layout, self.kernels)
            del arrays
            yield from check_figures(t.name, entry, self._measure(t, entry, q, seen), has_codes=seen == scheme)

    def _measure(self, t: TensorRef, entry: Mapping[str, Any], q: Quantized, scheme: Scheme) -> NDArray[np.float64]:
        """Figures of each row of `q` against the source's weights, with the same kernel as the worker."""
        goal = goal_of(t, entry, self.output.layout)
        rows = self._rows(t, t.encoded[0] if t.encoded else None, goal)
        stats = np.empty((len(q.codes), FIGURES), np.float64)
        for part in _windows(*q.codes.shape):
            weights, dtype = rows.taken(part.start, part.stop)
            measure_rows(weights, dtype, scheme, q.rows(part), stats[part], self.kernels)
        return stats

    def _is_decoded(self, t: TensorRef, shard: OutputShard) -> bool:
        """Whether the output has what the source's codes stand for. Memory: of a stack whose rows became columns one
        slice."""
        there = next(x for x in shard.header.tensors if x.name == t.name)
        slice_bytes = (there.end - there.begin) // len(t.encoded)
        for number, e in enumerate(t.encoded):
            at, row_bytes = there.begin + number * slice_bytes, slice_bytes // e.rows
            rows, columns = self._rows(t, e), None
            if is_turned(t):
                data: NDArray[Any] = np.frombuffer(
                    shard.source.read(shard.file, at, at + slice_bytes), TARGET_ARRAYS[there.dtype]
                )
                columns = data.reshape(e.columns, e.rows)
            for part in _windows(e.rows, e.columns):
                kept = rows.kept(part.start, part.stop)
                if columns is not None:
                    found = np.ascontiguousarray(columns[:, part].T).tobytes()
                else:
                    found = shard.source.read(shard.file, at + part.start * row_bytes, at + part.stop * row_bytes)
                if found != kept.tobytes():
                    return False
        return True

    def _rows(self, t: TensorRef, e: Encoded | None, goal: Goal | None = None) -> SourceRows:
        return SourceRows(t, e, self.output.rounded, self.source, self.kernels, goal=goal)


def _windows(rows: int, columns: int) -> Iterator[slice]:
    """Rows that are compared at once: as many as 16-bit weights make a window of."""
    step = max(1, WINDOW_BYTES // (2 * columns))
    yield from (slice(row, min(rows, row + step)) for row in range(0, rows, step))


def _is_copy(ref: TensorRef, source: Source, shard: OutputShard) -> bool:
    begin = next(t.begin for t in shard.header.tensors if t.name == ref.name)
    for at in range(0, ref.size_bytes, WINDOW_BYTES):
        size = min(WINDOW_BYTES, ref.size_bytes - at)
        weights = source.read(ref.shard, ref.begin + at, ref.begin + at + size)
        if shard.source.read(shard.file, begin + at, begin + at + size) != weights:
            return False
    return True
