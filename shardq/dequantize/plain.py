"""Weights that are stored as floats, but not as the rows that are wanted: slices of a stack that are [in, out], or
whose gate and up rows alternate, and their biases. w is what is stored, exactly."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardq.checkpoint import TensorRef
from shardq.dequantize.base import PLAIN, Coded, Description, Encoded, Mismatch, Module, Part
from shardq.dequantize.stacks import slices

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardq.dequantize.base import Arrays
    from shardq.kernels import KernelSet


def plain_slices(t: TensorRef) -> tuple[Encoded, ...]:
    """Each slice of a stack [slices, a, b] of plain floats as rows; one of [slices, n] as a single column."""
    assert t.shape is not None
    assert t.dtype is not None
    count, rows, columns = (*t.shape, 1)[:3]
    made = []
    for index, (begin,) in slices([t], count):
        part = Part("codes", t.name, t.shard, t.dtype, begin, rows, columns, 0)
        made.append(Encoded(t.name, PLAIN, index, rows, columns, t.dtype, (part,), PLAIN, (1, columns)))
    return tuple(made)


def plain_rows(t: TensorRef) -> Encoded:
    """A matrix of plain floats as rows, or a vector as a single column."""
    assert t.shape is not None
    assert t.dtype is not None
    rows, columns = (*t.shape, 1)[:2]
    part = Part("codes", t.name, t.shard, t.dtype, t.begin, rows, columns, 0)
    return Encoded(t.name, PLAIN, None, rows, columns, t.dtype, (part,), PLAIN, (1, columns))


@dataclass(frozen=True, slots=True)
class PlainFloats:
    """Reader of plain floats; see the module."""

    def describe(self, module: Module) -> Description:
        """Nothing is described by names: `plain_slices` makes them of stacks that are known."""
        return Mismatch("refused", module.name, "is not encoded")

    def decode(
        self, e: Encoded, parts: "Arrays", row: int, end_row: int, out: "NDArray[Any]", kernels: "KernelSet"
    ) -> None:
        """See Reader."""
        import numpy as np

        from shardq.dequantize.values import turned_words

        del row, end_row
        stored = np.ascontiguousarray(parts["codes"])
        patterns = stored if stored.dtype == np.float32 else stored.view(np.uint16)
        if not e.transposed:
            kernels.widen(patterns, e.dtype, out)
            return
        wide = np.empty(stored.shape, np.float32)
        kernels.widen(patterns, e.dtype, wide)
        out[...] = turned_words(wide, kernels).view(np.float32)

    def codes(self, e: Encoded, parts: "Arrays", row: int, end_row: int, kernels: "KernelSet") -> Coded | None:
        """See Reader: there are none."""
        del e, parts, row, end_row, kernels
        return None
