"""Native FP8: blocks of 128 x 128 (quant_method fp8) and MXFP8 (quant_method mxfp8), for vLLM, SGLang and transformers
(vLLM 0.32, transformers 5.23).

`weight` is e4m3 [rows, columns]. `weight_scale_inv`, which in spite of its name is what a reader multiplies by, is fp32
[ceil(rows/128), ceil(columns/128)], or one byte of exponent [rows, columns/32]. Both methods tell a server to round
activations alike, token by token.

The codes of a block are the nearest to weight / scale, and scale is the largest magnitude / 448, which is how
compressed-tensors 0.20 computes it in fp32. transformers multiplies by 448 / magnitude and stores the reciprocal: its
scales differ in the last bit. In MXFP8 all is as transformers computes it for bf16 weights: the scale is the smallest
power of two under which nothing saturates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from shardq.layouts.base import LayoutDefaults, ModuleChoice, OutSpec, Refusal
from shardq.layouts.kept_names import kept_names
from shardq.schemes import PRESETS, Scheme

if TYPE_CHECKING:
    from shardq.kernels import KernelSet
    from shardq.layouts.base import Arrays
    from shardq.quantizers.quantized import Quantized

ELEMENT: Final = "e4m3fn"
PRESET_OF: Final[Mapping[str, str]] = {"fp8": "FP8_BLOCK", "mxfp8": "MXFP8"}  # quant_method -> preset


class Fp8(LayoutDefaults):
    """quant_method fp8 or mxfp8. Members as in Layout."""

    name = "fp8"
    aliases = ("mxfp8", "finegrained_fp8")
    summary = "native FP8 blocks, or MXFP8: weight, weight_scale_inv"
    loaders = (
        "vLLM, SGLang and transformers (without a GPU: only where blocks divide both sides); MXFP8: transformers, and "
        "vLLM for models that rename its scales (MiniMax-M3)"
    )
    slab_rows = 32

    def settle(self, scheme: Scheme) -> Scheme:
        """See Layout."""
        if scheme.element != ELEMENT:
            return scheme
        if scheme.scale != "e8m0":
            return replace(scheme, numbers="fp8", scale="fp32")
        exponent = "ceil" if scheme.exponent == "even" else scheme.exponent  # "even": what the schemes' names stand for
        return replace(scheme, numbers="fp8", exponent=exponent)

    def refuse(self, scheme: Scheme, default: Scheme, rows: int, columns: int) -> Refusal | None:
        """See Layout. Blocks may be cut by both edges of a weight, groups of MXFP8 may not."""
        del rows
        if _method(self.settle(scheme)) is None:
            return Refusal(f"holds {' and '.join(PRESET_OF.values())}, not {scheme.name}", ragged=False)
        if scheme != default:
            return Refusal(f"has one scheme for all modules: {default.name}, not {scheme.name} too", ragged=False)
        if scheme.group_rows == 1 and columns % scheme.group_size:
            return Refusal(f"group size {scheme.group_size} does not divide {columns} columns", ragged=False)
        return None

    def outputs(self, scheme: Scheme, dtype: str, rows: int, columns: int) -> tuple[OutSpec, ...]:
        """See Layout."""
        del dtype
        shape = (-(-rows // scheme.group_rows), scheme.groups(columns))
        kind = "U8" if scheme.scale == "e8m0" else "F32"
        return (
            OutSpec("weight", "F8_E4M3", (rows, columns), slab_axis=0),
            OutSpec("weight_scale_inv", kind, shape, slab_axis=0, per_rows=(1, scheme.group_rows)),
        )

    def pack(self, part: "Quantized", row: int, out: "Arrays", scheme: Scheme, kernels: "KernelSet") -> None:
        """See Layout."""
        from shardq.layouts.stored import store

        del kernels
        out["weight"][row : row + len(part.codes)] = part.codes
        scales, first = out["weight_scale_inv"], row // scheme.group_rows
        kept = part.scales[:: scheme.group_rows]
        scales[first : first + len(kept)] = store(kept, scales.dtype)

    def unpack(self, arrays: "Arrays", scheme: Scheme, kernels: "KernelSet") -> "Quantized":
        """See Layout."""
        import numpy as np

        from shardq.layouts.stored import load
        from shardq.quantizers.quantized import Quantized

        del kernels
        codes = arrays["weight"]
        scales = load(arrays["weight_scale_inv"]).repeat(scheme.group_rows, axis=0)[: len(codes)]
        return Quantized(codes, np.ascontiguousarray(scales), None)

    def config_block(self, default: Scheme, choices: Sequence[ModuleChoice], version: str) -> dict[str, Any]:
        """See Layout. The list of kept modules stands there under both names: vLLM reads the first for mxfp8. Raises
        LayoutRefuses where readers would take one of it for a quantized module."""
        method = _method(default)
        assert method is not None
        powers = default.scale == "e8m0"
        kept = kept_names(choices, self.name, anywhere=powers)
        return {
            "quant_method": method,
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [default.group_rows, default.group_size],
            **({"scale_fmt": "ue8m0"} if powers else {}),
            "ignored_layers": kept,
            "modules_to_not_convert": list(kept),
            "quantizer": f"shardq:{version}",
        }

    def scheme_of(self, config: Mapping[str, Any], module: str) -> Scheme | None:
        """See Layout."""
        kept = config.get("ignored_layers") or config.get("modules_to_not_convert") or ()
        return None if module in kept else self.settle(PRESETS[PRESET_OF[config["quant_method"]]].scheme)


def _method(scheme: Scheme) -> str | None:
    """The quant_method of a settled scheme; None for one that the layout does not hold."""
    layout = Fp8()
    for method, preset in PRESET_OF.items():
        if layout.settle(PRESETS[preset].scheme) == scheme:
            return method
    return None


LAYOUTS: Final = (Fp8(),)
