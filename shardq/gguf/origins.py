"""Where the rows of a GGUF file's tensors are among the weights of a checkpoint: stacks of experts are one source to
llama.cpp's converter, and a matrix for each expert here."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from shardq.checkpoint import Checkpoint, TensorRef
from shardq.errors import UnsupportedSource
from shardq.gguf.tensors import Part, SourceTensor
from shardq.stacks import ExpertStack
from shardq.weights import Weights

CODES: Final = ("mxfp4_gptoss",)  # kinds whose codes the converter takes under their own names, with all their axes


@dataclass(frozen=True, slots=True)
class Taken:
    """What a part of a tensor is: rows of one weight, in order; `turned`: its columns are the rows of the part."""

    weight: str
    rows: range
    turned: bool = False
    carried: bool = False  # with the codes that it has


@dataclass(frozen=True, slots=True)
class _Stack:
    """A stack as one source."""

    source: SourceTensor
    shard: str
    transposed: bool  # slices are [in, out]
    pieces: Mapping[int, tuple[tuple[str, range], ...]]  # slice -> weights, and which of its outputs they are


class Origins:
    """Of the weights of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, weights: Weights) -> None:
        self._checkpoint, self._weights = checkpoint, weights
        found = (s for stack in weights.stacks for s in self._stacks_of(stack))
        self._stacks = {s.source.name: s for s in found}

    def shards(self) -> list[list[SourceTensor]]:
        """All sources as the converter knows them, by shard. Raises UnsupportedSource for unknown shapes."""
        by_shard: dict[str, list[SourceTensor]] = {s.name: [] for s in self._checkpoint.shards}
        inside = {name for s in self._stacks.values() for own in s.pieces.values() for name, _ in own}
        for t in self._weights.tensors.values():
            if t.shape is None:
                raise UnsupportedSource(
                    f"{self._checkpoint.label}: only an index is known, and GGUF needs the headers of all shards"
                )
            if t.name not in inside:
                by_shard[t.shard].append(SourceTensor(t.name, t.shape))
        for stack in self._stacks.values():
            by_shard[stack.shard].append(stack.source)
        return list(by_shard.values())

    def find(self, part: Part) -> Taken:
        """Where a part lies. Raises UnsupportedSource for a stack that is cut otherwise here."""
        stack = self._stacks.get(part.source)
        if stack is None:
            if part.slice is not None or part.columns is not None:
                raise UnsupportedSource(f"{part.source}: its slices are no matrices of experts that are known")
            return Taken(part.source, part.rows, part.turned)
        wanted = part.columns if stack.transposed else part.rows
        for name, own in stack.pieces.get(-1 if part.slice is None else part.slice, ()):
            rows = _positions(wanted, own) if wanted is not None else None
            if rows is not None and self._agrees(part, stack, name):
                return Taken(name, rows, carried=part.scales is not None)
        raise UnsupportedSource(
            f"{part.source}: llama.cpp's converter cuts slice {part.slice} otherwise than is known of this family; "
            "expected whole experts"
        )

    def _agrees(self, part: Part, stack: _Stack, name: str) -> bool:
        """True if the part has all inputs of the weight, and the same idea of what is turned."""
        columns = (self._weights.tensors[name].shape or ())[-1]
        inputs = part.rows if stack.transposed else part.columns
        return part.turned == stack.transposed and inputs in (None, range(columns))

    def _stacks_of(self, stack: ExpertStack) -> Iterator[_Stack]:
        matrices: dict[int, list[tuple[str, range]]] = {}
        if stack.emit == "stacked":
            raise UnsupportedSource(f"{stack.tensor}: stacks of the family {stack.row} are not written to GGUF")
        for m in stack.matrices():
            matrices.setdefault(m.expert, []).append((m.name, m.lines))
        source, shard = self._source(stack, self._weights.tensors[matrices[0][0][0]])
        yield _Stack(source, shard, stack.transposed, _frozen(matrices))
        if stack.bias:
            biases: dict[int, list[tuple[str, range]]] = {}
            for b in stack.biases():
                biases.setdefault(b.expert, []).append((b.name, b.lines))
            t = self._checkpoint.tensors[stack.bias]
            yield _Stack(SourceTensor(t.name, t.shape or ()), t.shard, False, _frozen(biases))

    def _source(self, stack: ExpertStack, first: TensorRef) -> tuple[SourceTensor, str]:
        """The stack that `first` is a matrix of, and its shard. Encoded ones are called after the weights they stand
        for, and codes that go over as they are after themselves."""
        encoded = first.encoded[0] if first.encoded else None
        if encoded and encoded.kind in CODES:
            codes = self._checkpoint.tensors[encoded.parts[0].tensor]
            return SourceTensor(codes.name, codes.shape or ()), codes.shard
        outputs, inputs = sum(len(p.lines) for p in stack.parts), stack.columns or 0
        slices = (inputs, outputs) if stack.transposed else (outputs, inputs)
        return SourceTensor(stack.weight, (stack.experts or 0, *slices)), first.shard


def _frozen(pieces: Mapping[int, list[tuple[str, range]]]) -> dict[int, tuple[tuple[str, range], ...]]:
    return {index: tuple(own) for index, own in pieces.items()}


def _positions(wanted: range, own: range) -> range | None:
    """Where `wanted` lies in `own`; None if not all of it does."""
    if not wanted or wanted[0] not in own or wanted[-1] not in own or wanted.step % own.step:
        return None
    first, step = own.index(wanted[0]), wanted.step // own.step
    return range(first, first + step * (len(wanted) - 1) + 1, step)
