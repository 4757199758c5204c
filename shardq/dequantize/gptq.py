"""GPTQ: qweight [columns * bits / 32, rows], qzeros [groups, rows * bits / 32], scales [groups, rows], maybe g_idx.

w = scale * (code - zero), rounded once, with the scale and zero of the column's group: g_idx[column], which act-order
permutes, else column // group size. Version 1 stores zero - 1 and its readers add 1 (here within the width; readers do
not agree on a stored zero point that is full, and no valid file has one); version 2 and auto-round's own packing store
the zero point. Headers do not tell them apart: the configuration does, and without one
it is version 1, which nearly all files are. Rows are columns of the tensors, so that a slab of rows is one range of
bytes in each line.

Source: GPTQModel 7.7 `PackableQuantLinear.dequantize_weight`, auto-round 0.16.1 `qlinear_torch`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardq.dequantize.base import WORD_BITS, Coded, Description, Encoded, Mismatch, Module, Part
from shardq.dequantize.hints import ZERO_ADDED, block_size
from shardq.dequantize.integers import decode_integers, integer_codes
from shardq.dequantize.stacks import result_dtype, whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardq.dequantize.base import Arrays
    from shardq.kernels import KernelSet


@dataclass(frozen=True, slots=True)
class GptqWords:
    """Reader of GPTQ modules; see the module."""

    def describe(self, module: Module) -> Description:
        """See Reader."""
        codes, scale, zeros, index = (module.refs.get(r) for r in ("codes", "scale", "zeros", "groups"))
        assert codes is not None
        assert scale is not None
        word = module.hints.checkpoint_format
        if word not in ZERO_ADDED:
            return Mismatch("refused", codes.name, f"is packed as {word}, which has no reader here")
        if codes.shape is None or len(codes.shape) != 2 or scale.shape is None or len(scale.shape) != 2:
            return Mismatch("shapes", codes.name, f"is {codes.shape} beside scales {scale.shape}: expected matrices")
        words, rows = codes.shape
        groups = scale.shape[0]
        bits = _bits(module)
        columns = words * WORD_BITS // bits if bits else 0
        if scale.shape[1] != rows or not 2 <= bits <= 8 or columns * bits != words * WORD_BITS:
            return Mismatch(
                "shapes", codes.name, f"is {list(codes.shape)} beside scales {list(scale.shape)}: odd width"
            )
        said = [g for b, g in module.hints.widths(module.name.removesuffix(".weight")) if b == bits]
        group = block_size(columns, groups, *said)
        if group is None:
            return Mismatch("shapes", scale.name, f"has {groups} groups of {columns} columns: expected equal ones")
        parts = [
            Part("codes", codes.name, codes.shard, "I32", codes.begin, words, rows, 1),
            Part("scale", scale.name, scale.shard, scale.dtype or "", scale.begin, groups, rows, 1),
        ]
        if zeros is not None:
            width = -(-rows * bits // WORD_BITS)
            if zeros.shape != (groups, width):
                return Mismatch("shapes", zeros.name, f"is {zeros.shape}: expected {[groups, width]}")
            parts.append(Part("zeros", zeros.name, zeros.shard, "I32", zeros.begin, groups, width, 1, bits, WORD_BITS))
        if index is not None and index.shape != (0,):
            if index.shape != (columns,):
                return Mismatch("shapes", index.name, f"is {index.shape}: expected {[columns]}")
            parts.append(whole("groups", index, index.begin, (columns,)))
        added = ZERO_ADDED[word]
        dtype = result_dtype(scale, module.hints)
        block = (1, group)
        return (
            Encoded(module.name, module.kind, None, rows, columns, dtype, tuple(parts), f"int{bits}", block, added),
        )

    def decode(
        self, e: Encoded, parts: "Arrays", row: int, end_row: int, out: "NDArray[Any]", kernels: "KernelSet"
    ) -> None:
        """See Reader."""
        decode_integers(e, self.codes(e, parts, row, end_row, kernels), parts.get("groups"), out, kernels)

    def codes(self, e: Encoded, parts: "Arrays", row: int, end_row: int, kernels: "KernelSet") -> Coded:
        """See Reader."""
        import numpy as np

        from shardq.dequantize.values import scale_values, stream_codes, turned_words, unpacked

        bits = int(e.element.removeprefix("int"))
        codes = unpacked(turned_words(parts["codes"], kernels), bits, e.columns, kernels)
        scale = e.part("scale")
        assert scale is not None
        scales = np.ascontiguousarray(scale_values(parts["scale"], scale.dtype).T)
        zeros = None
        if "zeros" in parts:
            first_bit = row * bits - row * bits // WORD_BITS * WORD_BITS
            stored = stream_codes(parts["zeros"].view(np.uint32), bits, first_bit, end_row - row)
            mask = np.uint8((1 << bits) - 1)
            zeros = np.ascontiguousarray(((stored + np.uint8(e.zero_added)) & mask).T)
        return integer_codes(e, codes, scales, zeros)


def _bits(module: Module) -> int:
    """By zero points and scales, by the length of g_idx, else as the configuration says."""
    codes, scale, zeros, index = (module.refs.get(r) for r in ("codes", "scale", "zeros", "groups"))
    assert codes is not None
    assert codes.shape is not None
    assert scale is not None
    assert scale.shape is not None
    if index is not None and index.shape and index.shape[0]:
        return codes.shape[0] * WORD_BITS // index.shape[0]
    if zeros is not None and zeros.shape is not None and len(zeros.shape) == 2:
        return zeros.shape[1] * WORD_BITS // scale.shape[1]
    widths = module.hints.widths(module.name.removesuffix(".weight"))
    return widths[0][0] if widths else 0
