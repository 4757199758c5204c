"""compressed-tensors pack-quantized: integers of 1 to 8 bits as a bit stream for each row, in 32-bit words.

w = (q - 2^(bits-1)) * s without zero points, (q - z) * s with them, rounded once; zero points are a bit stream down the
rows, [ceil(rows * bits / 32), groups]. `weight_g_idx`, of versions that still wrote it, has the group of each column.
Columns, and where bits and group size leave a choice the bits too, are only in `weight_shape` for certain; it is asked
for where shapes and configuration do not settle them. Words of 3, 5, 6 and 7 bits with gaps, as versions before 0.19
wrote them, fit no bits and are refused.

Source: compressed-tensors 0.20 `PackedQuantizationCompressor` (`unpack_from_int32`, `dequantize`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardq.dequantize.base import WORD_BITS, Coded, Description, Encoded, Mismatch, Module, Part, Wanted
from shardq.dequantize.hints import block_size
from shardq.dequantize.integers import decode_integers, integer_codes
from shardq.dequantize.stacks import result_dtype, whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardq.dequantize.base import Arrays
    from shardq.kernels import KernelSet


@dataclass(frozen=True, slots=True)
class IntPack:
    """Reader of pack-quantized modules; see the module."""

    def describe(self, module: Module) -> Description:
        """See Reader."""
        codes, scale = module.refs["codes"], module.refs["scale"]
        assert codes.shape is not None
        assert scale.shape is not None
        if codes.dtype not in ("I32", "U32") or len(codes.shape) != 2 or 0 in codes.shape:
            return Mismatch("shapes", codes.name, f"is {codes.dtype} {list(codes.shape)}: expected a matrix of I32")
        rows, words = codes.shape
        if scale.shape[:1] != (rows,) or len(scale.shape) > 2:
            return Mismatch("shapes", scale.name, f"is {list(scale.shape)}: expected scales of {rows} rows")
        groups = scale.shape[1] if len(scale.shape) == 2 else 1
        found = set(_fits(rows, words, groups, module))
        if len(found) != 1:
            shape = module.refs.get("shape")
            if shape is not None and shape.name not in module.peeked:
                return Wanted(shape)
            return Mismatch("shapes", codes.name, f"{words} words and {groups} scales of a row fit no width of codes")
        ((bits, columns, group),) = found
        parts = [
            Part("codes", codes.name, codes.shard, "I32", codes.begin, rows, words, 0),
            Part("scale", scale.name, scale.shard, scale.dtype or "", scale.begin, rows, groups, 0),
        ]
        if (zeros := module.refs.get("zeros")) is not None:
            lines = -(-rows * bits // WORD_BITS)
            if zeros.shape != (lines, groups) or zeros.dtype not in ("I32", "U32"):
                return Mismatch("shapes", zeros.name, f"is {zeros.dtype} {zeros.shape}: expected I32 {[lines, groups]}")
            parts.append(Part("zeros", zeros.name, zeros.shard, "I32", zeros.begin, lines, groups, 0, bits, WORD_BITS))
        if (index := module.refs.get("groups")) is not None:
            if index.shape != (columns,) or index.dtype not in ("I32", "U32"):
                return Mismatch("shapes", index.name, f"is {index.dtype} {index.shape}: expected I32 {[columns]}")
            parts.append(whole("groups", index, index.begin, (columns,)))
        dtype = result_dtype(scale, module.hints)
        e = Encoded(module.name, module.kind, None, rows, columns, dtype, tuple(parts), f"int{bits}", (1, group))
        return (e,)

    def decode(
        self, e: Encoded, parts: "Arrays", row: int, end_row: int, out: "NDArray[Any]", kernels: "KernelSet"
    ) -> None:
        """See Reader."""
        decode_integers(e, self.codes(e, parts, row, end_row, kernels), parts.get("groups"), out, kernels)

    def codes(self, e: Encoded, parts: "Arrays", row: int, end_row: int, kernels: "KernelSet") -> Coded:
        """See Reader."""
        import numpy as np

        from shardq.dequantize.values import scale_values, stream_codes, unpacked

        bits = int(e.element.removeprefix("int"))
        codes = unpacked(parts["codes"], bits, e.columns, kernels)
        scale = e.part("scale")
        assert scale is not None
        zeros: NDArray[np.uint8] | None = None
        if "zeros" in parts:
            words = np.ascontiguousarray(parts["zeros"].T).view(np.uint32)
            first_bit = row * bits - row * bits // WORD_BITS * WORD_BITS
            zeros = np.ascontiguousarray(stream_codes(words, bits, first_bit, end_row - row).T)
        return integer_codes(e, codes, scale_values(parts["scale"], scale.dtype), zeros)


def _fits(rows: int, words: int, groups: int, module: Module) -> Iterator[tuple[int, int, int]]:
    """Bits, columns and group size that shapes and what is said allow."""
    shape = module.refs.get("shape")
    said = [] if shape is None else _numbers(module.peeked.get(shape.name, b""), shape.dtype)
    if said and said[0] != rows:
        return
    hints = [*module.hints.widths(module.name.removesuffix(".weight"))]
    for bits in range(1, 9) if said else sorted({b for b, _ in hints}):
        for columns in {said[1]} if said else _columns(words, bits, groups, [g for b, g in hints if b == bits]):
            group = block_size(columns, groups, *(g for b, g in hints if b == bits))
            if group is not None and -(-columns * bits // WORD_BITS) == words:
                yield bits, columns, group


def _columns(words: int, bits: int, groups: int, sizes: list[int]) -> set[int]:
    """Columns that as many words may hold, if they fill them or whole groups; for a single group any that fit."""
    full = words * WORD_BITS // bits
    if groups == 1:
        return set(range((words - 1) * WORD_BITS // bits + 1, full + 1))
    return {c for c in (full, *(groups * s for s in sizes)) if any(s > 0 and -(-c // s) == groups for s in sizes)}


def _numbers(content: bytes, dtype: str | None) -> list[int]:
    size = {"I64": 8, "I32": 4}.get(dtype or "", 8)
    numbers = [int.from_bytes(content[i : i + size], "little") for i in range(0, len(content), size)]
    return numbers if len(numbers) == 2 else []
