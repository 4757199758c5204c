"""Codes of one byte with a grid of scales: FP8 of all kinds, MXFP8, and INT8.

w = code * scale, in fp32, rounded once: `weight_scale_inv` is the multiplier, whatever its name says. A grid has one
scale for a block of rows and columns; the last block of each may be short (DeepSeek's 576 rows in blocks of 128 have
5), so its size is found by ceil-division and never as rows // scales. Scales are F32, BF16, F16, or exponents in a
byte.

Sources: transformers 5.23 `Fp8Dequantize`, DeepSeek-V3 `weight_dequant`, compressed-tensors 0.20 `dequantize`
(float-quantized, mxfp8-quantized, int-quantized), bitsandbytes 0.50.2 `int8_vectorwise_dequant`: (code * SCB) / 127,
by multiplication.
"""

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Final

from shardq.dequantize.base import Coded, Description, Encoded, Mismatch, Module, Part
from shardq.dequantize.hints import block_size
from shardq.dequantize.stacks import own_shape, result_dtype, slices

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardq.dequantize.base import Arrays
    from shardq.kernels import KernelSet

ELEMENTS: Final = {
    "F8_E4M3": "e4m3fn",
    "F8_E5M2": "e5m2",
    "F8_E4M3FNUZ": "e4m3fnuz",
    "F8_E5M2FNUZ": "e5m2fnuz",
    "I8": "int8",
}
INT8_SIGN: Final = 0x80  # a two's complement byte with its sign flipped is the value plus 128
SCB_STEP: Final = 7.874015718698502e-3  # 1 / 127 as bitsandbytes has it


@dataclass(frozen=True, slots=True)
class ScaledBytes:
    """Reader of byte codes; see the module."""

    columns_per_scale: int = 0  # where the kind fixes it; 0: as the shapes say
    step: float = 0.0  # a last factor of all weights; 0: none

    def describe(self, module: Module) -> Description:
        """See Reader."""
        codes, scale = module.refs["codes"], module.refs["scale"]
        assert codes.shape is not None
        assert scale.shape is not None
        if len(codes.shape) not in (2, 3) or 0 in codes.shape:
            return Mismatch("shapes", codes.name, f"is {list(codes.shape)}: expected a matrix or a stack of them")
        rows, columns = codes.shape[-2:]
        count = codes.shape[0] if len(codes.shape) == 3 else None
        grid = _grid(own_shape(scale, count), rows)
        block = self._block(rows, columns, grid, module) if grid else None
        if grid is None or block is None:
            return Mismatch("shapes", scale.name, f"is {list(scale.shape)}, which is no grid over {list(codes.shape)}")
        if "zeros" in module.refs and module.refs["zeros"].shape != scale.shape:
            return Mismatch("shapes", module.refs["zeros"].name, f"has another shape than {scale.name}")
        side = [r for r in ("scale", "zeros") if r in module.refs]
        dtype, element = result_dtype(scale, module.hints), ELEMENTS[codes.dtype or ""]
        made = []
        for index, (begin, *begins) in slices([codes, *(module.refs[r] for r in side)], count):
            parts = [Part("codes", codes.name, codes.shard, codes.dtype or "", begin, rows, columns, 0)]
            for role, at in zip(side, begins, strict=True):
                ref = module.refs[role]
                parts.append(Part(role, ref.name, ref.shard, ref.dtype or "", at, *grid, 0, per_rows=block[0]))
            made.append(Encoded(module.name, module.kind, index, rows, columns, dtype, tuple(parts), element, block))
        return tuple(made)

    def _block(self, rows: int, columns: int, grid: tuple[int, int], module: Module) -> tuple[int, int] | None:
        declared = module.hints.weight_block or (0, 0)
        high = block_size(rows, grid[0], declared[0])
        wide = block_size(columns, grid[1], self.columns_per_scale or declared[1])
        if self.columns_per_scale and grid[1] != -(-columns // self.columns_per_scale):
            return None
        return None if high is None or wide is None else (high, wide)

    def decode(
        self, e: Encoded, parts: "Arrays", row: int, end_row: int, out: "NDArray[Any]", kernels: "KernelSet"
    ) -> None:
        """See Reader."""
        import numpy as np

        from shardq.dequantize.values import byte_values, turned_words

        codes = parts["codes"]
        scales, group = _spread(e, "scale", parts, row, end_row)
        stored = np.empty(codes.shape, np.float32) if e.transposed else out
        if e.element.endswith("fnuz"):
            wide = np.repeat(scales, group, axis=1)[:, : codes.shape[1]]
            np.multiply(byte_values(e.element)[codes], wide, out=stored)
        elif "zeros" in parts:
            zeros, _ = _spread(e, "zeros", parts, row, end_row)
            kernels.decode_affine(_offset(codes), scales, zeros + np.float32(INT8_SIGN), group, "zero", stored)
        else:
            levels = _offset(codes) if e.element == "int8" else codes
            kernels.decode_scaled(levels, e.element, scales, group, stored)
        if self.step:
            np.multiply(stored, np.float32(self.step), out=stored)
        if e.transposed:
            out[...] = turned_words(stored, kernels).view(np.float32)

    def codes(self, e: Encoded, parts: "Arrays", row: int, end_row: int, kernels: "KernelSet") -> Coded | None:
        """See Reader."""
        import numpy as np

        from shardq.quantizers.quantized import Quantized

        del kernels
        if e.transposed or e.element.endswith("fnuz") or self.step:
            return None
        scales, group = _spread(e, "scale", parts, row, end_row)
        if e.element != "int8":
            return Coded(e.element, group, Quantized(parts["codes"], scales, None))
        zeros = None
        if "zeros" in parts:
            zeros = (_spread(e, "zeros", parts, row, end_row)[0] + INT8_SIGN).astype(np.uint8)
        return Coded(e.element, group, Quantized(_offset(parts["codes"]), scales, zeros))


def _grid(shape: tuple[int, ...], rows: int) -> tuple[int, int] | None:
    """The rows and columns of a grid of scales."""
    if prod(shape) == 1:
        return 1, 1
    if len(shape) == 1:
        return (rows, 1) if shape[0] == rows else None
    return (shape[0], shape[1]) if len(shape) == 2 else None


def _offset(codes: "NDArray[Any]") -> "NDArray[Any]":
    import numpy as np

    return codes.view(np.uint8) ^ np.uint8(INT8_SIGN)


def _spread(e: Encoded, role: str, parts: "Arrays", row: int, end_row: int) -> "tuple[NDArray[Any], int]":
    """fp32 values of a grid with a line for each line of codes in the window, and the columns that share one."""
    import numpy as np

    from shardq.dequantize.values import grid_rows, scale_values

    part = e.part(role)
    assert part is not None
    stored = parts[role]
    values = stored.astype(np.float32) if part.dtype == "I8" else scale_values(stored, part.dtype)
    high, wide = e.block
    if not e.transposed:
        return grid_rows(values, high, row, end_row), wide
    lines = grid_rows(values, high, 0, e.columns)
    behind = row % wide
    if behind == 0:
        return np.ascontiguousarray(lines), wide
    return np.ascontiguousarray(np.repeat(lines, wide, axis=1)[:, behind : behind + end_row - row]), 1
