"""Four- and six-bit floats with a scale for some columns of a row, a power of two or an e4m3 number, of all kinds.

Codes of a row are one bit stream, least significant bit first: the even column in the low nibble. w = value * s,
rounded once; a byte b of a scale is 2^(b - 127) (OCP MX 1.0) or an e4m3 number, which has a number for the whole
matrix above it: `weight_scale_2` and `scale2` multiply the scales, `weight_global_scale` divides them, rounded
to fp32 before the codes are multiplied. MXINT4 of auto-round has the tensors of MXFP4, and only the configuration
tells that its codes are a sign and quarters.

Sources: transformers 5.23 `convert_moe_packed_tensors` (gpt-oss), DeepSeek-V4's published inference code (I8 bytes that
hold two codes), the compressors of compressed-tensors 0.20, the quantized tensors of Model-Optimizer.
"""

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Final

from shardq.dequantize.base import Coded, Description, Encoded, Mismatch, Module, Part
from shardq.dequantize.stacks import own_shape, result_dtype, slices, whole

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shardq.dequantize.base import Arrays
    from shardq.kernels import KernelSet

MX_INT: Final = "mx_int"  # auto-round's word for MXINT4, whose tensors are those of MXFP4
BITS: Final = {"e2m1": 4, "e0m3": 4, "e2m3": 6}
POWERS: Final = ("U8", "F8_E8M0")  # dtypes of scales
NUMBERS: Final = ("F8_E4M3",)


@dataclass(frozen=True, slots=True)
class Nibbles:
    """Reader of packed small floats; see the module."""

    group: int  # columns that share a scale
    scales: tuple[str, ...]  # their dtypes: bytes mean different numbers in different kinds
    element: str = "e2m1"
    blocks: bool = False  # codes are [..., groups, bytes of a group]

    def describe(self, module: Module) -> Description:
        """See Reader."""
        codes, scale = module.refs["codes"], module.refs["scale"]
        assert codes.shape is not None
        shape = codes.shape
        if self.blocks:
            if len(shape) < 3 or shape[-1] * 8 != self.group * BITS[self.element]:
                return Mismatch("shapes", codes.name, f"is {list(shape)}: expected {self.group} columns in a block")
            shape = (*shape[:-2], shape[-2] * shape[-1])
        if codes.dtype == "F4":  # a header counts elements
            shape = (*shape[:-1], shape[-1] // 2)
        if len(shape) not in (2, 3) or 0 in shape:
            return Mismatch("shapes", codes.name, f"is {list(shape)}: expected a matrix or a stack of them")
        rows, line_bytes = shape[-2:]
        count = shape[0] if len(shape) == 3 else None
        columns = line_bytes * 8 // BITS[self.element]
        grid = (rows, -(-columns // self.group))
        if own_shape(scale, count) != grid or scale.dtype not in self.scales:
            found = f"{scale.dtype} {scale.shape}"
            return Mismatch("shapes", scale.name, f"is {found}: expected one for {self.group} columns, {grid}")
        side = [role for role in ("factor", "divisor") if role in module.refs]
        for role in side:
            if prod(own_shape(module.refs[role], count)) != 1:
                return Mismatch("shapes", module.refs[role].name, "is not one number for each matrix")
        dtype, element = result_dtype(scale, module.hints), self.element
        if module.hints.data_type(module.name.removesuffix(".weight")) == MX_INT:
            element = "e0m3"
        made = []
        for index, begins in slices([codes, scale, *(module.refs[r] for r in side)], count):
            parts = [
                Part("codes", codes.name, codes.shard, "U8", begins[0], rows, line_bytes, 0),
                Part("scale", scale.name, scale.shard, scale.dtype or "", begins[1], *grid, 0),
                *(whole(r, module.refs[r], at, (1,)) for r, at in zip(side, begins[2:], strict=True)),
            ]
            block = (1, self.group)
            made.append(Encoded(module.name, module.kind, index, rows, columns, dtype, tuple(parts), element, block))
        return tuple(made)

    def decode(
        self, e: Encoded, parts: "Arrays", row: int, end_row: int, out: "NDArray[Any]", kernels: "KernelSet"
    ) -> None:
        """See Reader."""
        from shardq.dequantize.values import unpacked

        del row, end_row

        codes = unpacked(parts["codes"], BITS[e.element], e.columns, kernels)
        kernels.decode_scaled(codes, e.element, _scales(e, parts), e.block[1], out)

    def codes(self, e: Encoded, parts: "Arrays", row: int, end_row: int, kernels: "KernelSet") -> Coded | None:
        """See Reader. A divisor stays the global scale; a factor is multiplied into the scales."""
        import numpy as np

        from shardq.dequantize.values import scale_values, unpacked
        from shardq.quantizers.quantized import Quantized

        del row, end_row
        codes = unpacked(parts["codes"], BITS[e.element], e.columns, kernels)
        scale = e.part("scale")
        assert scale is not None
        divisor = float(parts["divisor"][0, 0]) if "divisor" in parts else None
        plain = np.ascontiguousarray(scale_values(parts["scale"], scale.dtype))
        scales = plain if "factor" not in parts else _scales(e, parts)
        return Coded(e.element, e.block[1], Quantized(codes, scales, None, global_scale=divisor))


def _scales(e: Encoded, parts: "Arrays") -> "NDArray[np.float32]":
    """fp32 scales [rows, groups], what stands above them included."""
    import numpy as np

    from shardq.dequantize.values import scale_values

    scale = e.part("scale")
    assert scale is not None
    values = scale_values(parts["scale"], scale.dtype)
    with np.errstate(all="ignore"):
        for role, apply in (("factor", np.multiply), ("divisor", np.divide)):
            if (above := e.part(role)) is not None:
                values = apply(values, scale_values(parts[role], above.dtype)[0, 0], dtype=np.float32)
    return np.ascontiguousarray(values)
