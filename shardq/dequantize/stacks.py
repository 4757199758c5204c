"""What the descriptions of all kinds share: slices of stacks, and the type of the result."""

from collections.abc import Iterator, Sequence
from math import prod

from shardq.checkpoint import TensorRef
from shardq.dequantize.base import Part
from shardq.dequantize.hints import Hints


def slices(refs: Sequence[TensorRef], count: int | None) -> Iterator[tuple[int | None, list[int]]]:
    """For each matrix of a stack of `count` its index and where its share of each tensor begins; one tensor for all
    slices (one element, or another first dimension) begins where it does. Without a count one matrix, index None."""
    if count is None:
        yield None, [t.begin for t in refs]
        return
    steps = [t.size_bytes // count if is_stacked(t, count) else 0 for t in refs]
    for index in range(count):
        yield index, [t.begin + index * step for t, step in zip(refs, steps, strict=True)]


def is_stacked(ref: TensorRef, count: int) -> bool:
    """Whether each slice has its own share of a tensor."""
    assert ref.shape is not None
    return bool(ref.shape) and ref.shape[0] == count and prod(ref.shape) >= count


def own_shape(ref: TensorRef, count: int | None) -> tuple[int, ...]:
    """The shape of a slice's share of a tensor."""
    assert ref.shape is not None
    return ref.shape[1:] if count is not None and is_stacked(ref, count) else ref.shape


def whole(role: str, ref: TensorRef, begin: int, shape: tuple[int, ...]) -> Part:
    """A part that any row needs all of, as one line for each element but of matrices."""
    lines, width = shape if len(shape) == 2 else (prod(shape), 1)
    return Part(role, ref.name, ref.shard, ref.dtype or "", begin, lines, width, None)


def result_dtype(scale: TensorRef, hints: Hints) -> str:
    """BF16 or F16: what the configuration says, else the type of the scales, else BF16."""
    return next((d for d in (hints.dtype, scale.dtype) if d in ("BF16", "F16")), "BF16")
