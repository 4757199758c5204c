"""bitsandbytes 4 bit (NF4, FP4): two codes in a byte, the even one in the high nibble, of a matrix without lines.

w = map[code] * absmax, rounded once; one absmax for `blocksize` elements in the order of memory, whatever the rows.
With double quantization an absmax is itself a code: (nested_map[code] * nested_absmax) + nested_offset, two roundings.
Shape, block sizes, offset and type are JSON in a tensor of bytes, which is asked for; codes may be declared as any
dtype.

Source: bitsandbytes 0.50.2 `QuantState.from_dict`, `dequantize_4bit`, `dequantize_blockwise` (fp32, CPU).
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from shardq.dequantize.base import Coded, Description, Encoded, Mismatch, Module, Part, Wanted
from shardq.dequantize.stacks import whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardq.dequantize.base import Arrays
    from shardq.kernels import KernelSet

LEVELS: Final = 16
DTYPES: Final = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class Bnb4:
    """Reader of bitsandbytes' 4-bit modules; see the module."""

    def describe(self, module: Module) -> Description:
        """See Reader."""
        codes, scale = module.refs["codes"], module.refs["scale"]
        state = module.refs.get("state")
        levels = module.refs.get("map")
        if state is None or levels is None or levels.shape != (LEVELS,):
            return Mismatch("unpaired", codes.name, "has no quant_state or no quant_map beside it")
        if state.name not in module.peeked:
            return Wanted(state)
        said = _state(module.peeked[state.name])
        shape, size = said.get("shape"), said.get("blocksize")
        if not isinstance(shape, list) or len(shape) != 2 or not isinstance(size, int) or size < 2 or size % 2:
            return Mismatch("shapes", state.name, "does not say the shape of a matrix and a block size")
        rows, columns = (int(n) for n in shape)
        count = rows * columns
        blocks = -(-count // size)
        if codes.size_bytes != -(-count // 2) or scale.numel != blocks or count == 0:
            return Mismatch("shapes", codes.name, f"has {codes.size_bytes} bytes, {scale.numel} scales for {shape}")
        parts = [
            Part("codes", codes.name, codes.shard, "U8", codes.begin, codes.size_bytes, 1, 0, columns, 2),
            Part("scale", scale.name, scale.shard, scale.dtype or "", scale.begin, blocks, 1, 0, columns, size),
            whole("map", levels, levels.begin, (LEVELS,)),
        ]
        outer, outer_map = module.refs.get("outer_scale"), module.refs.get("outer_map")
        if scale.dtype == "U8":
            far = said.get("nested_blocksize")
            if outer is None or outer_map is None or not isinstance(far, int) or outer.numel != -(-blocks // far):
                return Mismatch("unpaired", scale.name, "is quantized, but its own scales are missing or do not fit")
            dtype = outer.dtype or ""
            parts += [
                Part(
                    "outer_scale", outer.name, outer.shard, dtype, outer.begin, outer.numel, 1, 0, columns, size * far
                ),
                whole("outer_map", outer_map, outer_map.begin, (256,)),
            ]
        return (
            Encoded(
                module.name,
                module.kind,
                None,
                rows,
                columns,
                DTYPES.get(str(said.get("dtype")), "BF16"),
                tuple(parts),
                str(said.get("quant_type")),
                (1, size),
                offset=float(said.get("nested_offset") or 0.0),
            ),
        )

    def decode(
        self, e: Encoded, parts: "Arrays", row: int, end_row: int, out: "NDArray[Any]", kernels: "KernelSet"
    ) -> None:
        """See Reader."""
        import numpy as np

        del kernels
        size = e.block[1]
        first, behind = row * e.columns, end_row * e.columns
        octets = np.arange(256)
        pairs = np.stack([parts["map"][octets >> 4, 0], parts["map"][octets & 15, 0]], axis=1)
        both, stored, flat = pairs.view(np.uint64)[:, 0], parts["codes"][:, 0], out.reshape(-1)  # two values at once
        if first % 2 == behind % 2 == 0:
            both.take(stored, out=flat.view(np.uint64), mode="clip")
        else:
            flat[:] = both.take(stored).view(np.float32)[first % 2 : first % 2 + behind - first]
        scales = self._scales(e, parts, first // size, -(-behind // size))
        lead = min(-first % size, behind - first)  # of the block that rows before begin
        flat[:lead] *= scales[0]
        scales = scales[1:] if lead else scales
        full = (behind - first - lead) // size
        body = flat[lead : lead + full * size].reshape(-1, size)
        np.multiply(body, scales[:full, None], out=body)
        if lead + full * size < flat.size:
            flat[lead + full * size :] *= scales[full]

    def codes(self, e: Encoded, parts: "Arrays", row: int, end_row: int, kernels: "KernelSet") -> Coded | None:
        """See Reader."""
        del e, parts, row, end_row, kernels
        return None  # no layout has its levels

    def _scales(self, e: Encoded, parts: "Arrays", first: int, behind: int) -> "NDArray[Any]":
        """fp32 scales of blocks `first` to `behind`, which is what the window has."""
        import numpy as np

        from shardq.dequantize.values import scale_values

        stored, scale, outer = parts["scale"][:, 0], e.part("scale"), e.part("outer_scale")
        assert scale is not None
        if outer is None:
            return scale_values(stored, scale.dtype)
        far = outer.per_rows // e.block[1]
        index = np.arange(first, behind) // far - first // far
        steps = scale_values(parts["outer_scale"][:, 0], outer.dtype)[index]
        inner: NDArray[Any] = parts["outer_map"][stored, 0] * steps + np.float32(e.offset)
        return inner


def _state(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
