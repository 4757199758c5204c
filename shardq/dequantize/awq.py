"""AWQ, version gemm: qweight [columns, rows / 8], qzeros [groups, rows / 8], scales [groups, rows]; 4 bits.

A word holds the codes of eight rows, at PLACES. w = scale * (code - zero), rounded once; the zero point
is stored as it is. Versions gemv and marlin have other shapes and are refused.

Source: AutoAWQ's `dequantize_gemm`, as compressed-tensors 0.20 (`AutoAWQConverter`) and GPTQModel 7.7 have it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from shardq.dequantize.base import Coded, Description, Encoded, Mismatch, Module, Part
from shardq.dequantize.hints import block_size
from shardq.dequantize.integers import decode_integers, integer_codes
from shardq.dequantize.stacks import result_dtype

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shardq.dequantize.base import Arrays
    from shardq.kernels import KernelSet

BITS: Final = 4
LANES: Final = 8  # codes of a word
PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble of a word, the lowest first, that has each of the eight rows


@dataclass(frozen=True, slots=True)
class AwqWords:
    """Reader of AWQ modules; see the module."""

    def describe(self, module: Module) -> Description:
        """See Reader."""
        codes, scale, zeros = (module.refs.get(r) for r in ("codes", "scale", "zeros"))
        assert codes is not None
        assert scale is not None
        if codes.shape is None or len(codes.shape) != 2 or scale.shape is None or len(scale.shape) != 2:
            return Mismatch("shapes", codes.name, f"is {codes.shape} beside scales {scale.shape}: expected matrices")
        version = str(module.hints.block.get("version", "gemm")).lower()
        columns, words = codes.shape
        groups, rows = scale.shape
        if version != "gemm" or rows != words * LANES:
            return Mismatch("refused", codes.name, f"is AWQ {version} {list(codes.shape)}: expected gemm, 4 bits")
        if zeros is not None and zeros.shape != (groups, words):
            return Mismatch("shapes", zeros.name, f"is {zeros.shape}: expected {[groups, words]}")
        said = [g for b, g in module.hints.widths(module.name.removesuffix(".weight")) if b == BITS]
        group = block_size(columns, groups, *said)
        if group is None:
            return Mismatch("shapes", scale.name, f"has {groups} groups of {columns} columns: expected equal ones")
        parts = [
            Part("codes", codes.name, codes.shard, "I32", codes.begin, columns, words, 1, per_rows=LANES),
            Part("scale", scale.name, scale.shard, scale.dtype or "", scale.begin, groups, rows, 1),
        ]
        if zeros is not None:
            parts.append(Part("zeros", zeros.name, zeros.shard, "I32", zeros.begin, groups, words, 1, per_rows=LANES))
        dtype = result_dtype(scale, module.hints)
        return (Encoded(module.name, module.kind, None, rows, columns, dtype, tuple(parts), "int4", (1, group)),)

    def decode(
        self, e: Encoded, parts: "Arrays", row: int, end_row: int, out: "NDArray[Any]", kernels: "KernelSet"
    ) -> None:
        """See Reader."""
        decode_integers(e, self.codes(e, parts, row, end_row, kernels), None, out, kernels)

    def codes(self, e: Encoded, parts: "Arrays", row: int, end_row: int, kernels: "KernelSet") -> Coded:
        """See Reader."""
        import numpy as np

        from shardq.dequantize.values import scale_values

        scale = e.part("scale")
        assert scale is not None
        scales = np.ascontiguousarray(scale_values(parts["scale"], scale.dtype).T)
        mine = slice(row % LANES, row % LANES + end_row - row)
        codes = _rows_of(parts["codes"], kernels)[mine]
        zeros = _rows_of(parts["zeros"], kernels)[mine] if "zeros" in parts else None
        return integer_codes(e, codes, scales, zeros)


def _rows_of(words: "NDArray[Any]", kernels: "KernelSet") -> "NDArray[np.uint8]":
    """Codes [rows, n] of words [n, rows / 8]."""
    import numpy as np

    from shardq.dequantize.values import turned_words

    turned = turned_words(words, kernels)
    count, columns = turned.shape
    codes = np.empty((count * LANES, columns), np.uint8)
    kernels.split_words(turned, BITS, codes)
    by_row = codes.reshape(count, LANES, columns)[:, PLACES]
    return by_row.reshape(-1, columns)
