"""The packing `auto_round:fp8_static` of auto-round 0.16.1: FP8 with a scale for each row, and one for activations.

`weight` e4m3 [rows, columns]; `weight_scale` bf16 [rows]; `input_scale` bf16 [1]. auto-round's reader computes in bf16,
and its writer turns the whole model into that.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from shardq.layouts.base import OutSpec, Refusal
from shardq.layouts.input_scales import input_outputs, pack_input, unpack_input
from shardq.schemes import WHOLE_ROW, Scheme

if TYPE_CHECKING:
    from shardq.kernels import KernelSet
    from shardq.layouts.base import Arrays
    from shardq.quantizers.quantized import Quantized

ELEMENT: Final = "e4m3fn"
ACTIVATION: Final = "fp8-static"
SCALE: Final = ("bf16", "BF16")  # format, and type in the file


@dataclass(frozen=True, slots=True)
class Fp8Packing:
    """Members as in Packing."""

    word: str = "auto_round:fp8_static"

    def takes(self, scheme: Scheme) -> bool:
        """See Packing."""
        form = (scheme.element, scheme.group_size, scheme.group_rows, scheme.reach, scheme.activation)
        return form == (ELEMENT, WHOLE_ROW, 1, "group", ACTIVATION)

    def refuse(self, scheme: Scheme, rows: int, columns: int) -> Refusal | None:
        """See Packing."""
        del scheme, rows, columns
        return None

    def outputs(self, scheme: Scheme, rows: int, columns: int) -> tuple[OutSpec, ...]:
        """See Packing."""
        return (
            OutSpec("weight", "F8_E4M3", (rows, columns), slab_axis=0),
            OutSpec("weight_scale", SCALE[1], (rows,), slab_axis=0),
            *input_outputs(scheme, SCALE[1]),
        )

    def pack(self, part: "Quantized", row: int, out: "Arrays", scheme: Scheme, kernels: "KernelSet") -> None:
        """See Packing."""
        from shardq.layouts.stored import store

        del scheme, kernels
        lines = slice(row, row + len(part.codes))
        out["weight"][lines] = part.codes
        out["weight_scale"][lines] = store(part.scales[:, 0], out["weight_scale"].dtype)
        pack_input(part, out)

    def unpack(self, arrays: "Arrays", scheme: Scheme, kernels: "KernelSet") -> "Quantized":
        """See Packing."""
        from shardq.layouts.stored import load
        from shardq.quantizers.quantized import Quantized

        del scheme, kernels
        scales = load(arrays["weight_scale"])[:, None]
        return Quantized(arrays["weight"], scales, None, input_scale=unpack_input(arrays))


def settle_fp8(scheme: Scheme) -> Scheme:
    """See Layout.settle. Codes are the nearest to weight over the scale as it is stored; auto-round takes them with a
    scale in fp32 and rounds it later."""
    return replace(scheme, numbers="compressed_tensors", scale=SCALE[0])
