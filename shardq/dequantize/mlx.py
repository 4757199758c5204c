"""MLX: weight U32 [rows, columns * bits / 32], a bit stream for each row; scales and biases [rows, groups].

affine: w = (scale * code) + bias, two roundings in fp32. Modes with float elements: w = value * scale, the scale an
exponent or an e4m3 number in a byte; no biases. Stacks [experts, rows, ...] are read slice by slice. Bits and group
size of affine modules are in the configuration, for a module or for all; shapes only give their product.

Source: mlx 0.32.4 `dequantize`, mlx-lm 0.32 for the configuration.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from shardq.dequantize.base import WORD_BITS, Coded, Description, Encoded, Mismatch, Module, Part
from shardq.dequantize.stacks import own_shape, result_dtype, slices

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardq.dequantize.base import Arrays
    from shardq.kernels import KernelSet

WIDTHS: Final = (2, 3, 4, 5, 6, 8)
GROUPS: Final = (32, 64, 128)
MODES: Final = {128: ("e2m1", 4, 32), 64: ("e2m1", 4, 16), 256: ("e4m3fn", 8, 32)}  # by bits of codes for a scale


@dataclass(frozen=True, slots=True)
class MlxWords:
    """Reader of MLX modules; see the module."""

    def describe(self, module: Module) -> Description:
        """See Reader."""
        codes, scale, biases = (module.refs.get(r) for r in ("codes", "scale", "biases"))
        assert codes is not None
        assert codes.shape is not None
        assert scale is not None
        if len(codes.shape) not in (2, 3) or 0 in codes.shape:
            return Mismatch("shapes", codes.name, f"is {list(codes.shape)}: expected a matrix or a stack of them")
        rows, words = codes.shape[-2:]
        count = codes.shape[0] if len(codes.shape) == 3 else None
        grid = own_shape(scale, count)
        if len(grid) != 2 or grid[0] != rows or (biases is not None and biases.shape != scale.shape):
            return Mismatch("shapes", scale.name, f"is {scale.shape}: expected scales of {rows} rows")
        groups = grid[1]
        if biases is not None:
            bits, group = _affine(words, groups, module)
            element = f"int{bits}"
        else:
            share = words * WORD_BITS // groups if scale.dtype == "U8" else 0
            element, bits, group = MODES.get(share, ("", 0, 0))
        if not bits or words * WORD_BITS != bits * group * groups:
            return Mismatch("shapes", codes.name, f"has {words} words and {groups} scales in a row: no width fits")
        refs = [codes, scale] if biases is None else [codes, scale, biases]
        dtype = result_dtype(scale, module.hints) if scale.dtype == "U8" else scale.dtype or ""
        made = []
        for index, begins in slices(refs, count):
            parts = [Part("codes", codes.name, codes.shard, "U32", begins[0], rows, words, 0)]
            for role, ref, begin in zip(("scale", "biases"), refs[1:], begins[1:], strict=False):
                parts.append(Part(role, ref.name, ref.shard, ref.dtype or "", begin, rows, groups, 0))
            columns = groups * group
            made.append(
                Encoded(module.name, module.kind, index, rows, columns, dtype, tuple(parts), element, (1, group))
            )
        return tuple(made)

    def decode(
        self, e: Encoded, parts: "Arrays", row: int, end_row: int, out: "NDArray[Any]", kernels: "KernelSet"
    ) -> None:
        """See Reader."""
        q = self.codes(e, parts, row, end_row, kernels)
        v = q.values
        if v.biases is None:
            kernels.decode_scaled(v.codes, e.element, v.scales, q.group, out)
        else:
            kernels.decode_affine(v.codes, v.scales, v.biases, q.group, "bias", out)

    def codes(self, e: Encoded, parts: "Arrays", row: int, end_row: int, kernels: "KernelSet") -> Coded:
        """See Reader."""
        import numpy as np

        from shardq.dequantize.values import byte_values, scale_values, unpacked
        from shardq.quantizers.quantized import Quantized

        del row, end_row
        scale, group = e.part("scale"), e.block[1]
        assert scale is not None
        bits = {"e2m1": 4, "e4m3fn": 8}.get(e.element) or int(e.element.removeprefix("int"))
        codes = unpacked(parts["codes"], bits, e.columns, kernels)
        if scale.dtype == "U8":
            kind = "e4m3fn" if group == 16 else "e8m0"
            return Coded(e.element, group, Quantized(codes, byte_values(kind)[parts["scale"]], None))
        scales, biases = (np.ascontiguousarray(scale_values(parts[r], scale.dtype)) for r in ("scale", "biases"))
        return Coded(e.element, group, Quantized(codes, scales, None, biases))


def _affine(words: int, groups: int, module: Module) -> tuple[int, int]:
    """Bits and group size: as said, where that fits; else with the same group size, else the only pair; (0, 0) if none
    fits."""
    share = words * WORD_BITS // groups if words * WORD_BITS % groups == 0 else 0
    said = module.hints.widths(module.name.removesuffix(".weight"))
    fitting = [(b, share // b) for b in WIDTHS if share and share % b == 0 and share // b in GROUPS]
    for b, g in said:
        if (b, g) in fitting:
            return b, g
    same = [(b, g) for b, g in fitting if any(g == group for _, group in said)]
    return same[0] if len(same) == 1 else fitting[0] if len(fitting) == 1 else (0, 0)
