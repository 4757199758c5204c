"""Quantized weights as plain ones, for research: each is what a reader of the codes would compute, rounded once more to
the type that the weight has in the source. Any loader takes the result for an unquantized checkpoint.

Codes cannot be told from such values, so `unpack` gives the values themselves, each a group of its own. What was done
stands in config.json under a key that no loader knows.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from shardq.layouts.auto_round import AutoRound
from shardq.layouts.base import LayoutDefaults, ModuleChoice, OutSpec, Refusal
from shardq.layouts.compressed_tensors import CompressedTensors
from shardq.layouts.templates import module_regexes
from shardq.schemes import Scheme, parse_name

if TYPE_CHECKING:
    from shardq.kernels import KernelSet
    from shardq.layouts.base import Arrays
    from shardq.quantizers.quantized import Quantized

METHOD: Final = "fake"
SQUARE: Final = (4096, 4096)  # a shape that fits every group
VALUES: Final = Scheme("e4m3fn", 1, symmetric=True, scale="fp32", numbers="compressed_tensors")
ONE: Final = 0x38  # the code of 1.0 in e4m3; that of 0 is 0


class Fake(LayoutDefaults):
    """Quantized and dequantized. Members as in Layout."""

    name = METHOD
    aliases = ("qdq",)
    summary = "weights quantized and dequantized again, for research"
    loaders = "whatever loads the source: to a loader nothing is quantized"
    slab_rows = 1
    fuses = False
    config_key = "shardq_fake"

    def settle(self, scheme: Scheme) -> Scheme:
        """See Layout. The numbers are those of the layout that a scheme gets when no other is named; what a server does
        to activations changes no weight."""
        other = CompressedTensors().settle(replace(scheme, activation=""))
        held = not scheme.is_adjustable and CompressedTensors().refuse(other, other, *SQUARE) is None
        return replace((CompressedTensors() if held else AutoRound()).settle(scheme), activation=scheme.activation)

    def refuse(self, scheme: Scheme, default: Scheme, rows: int, columns: int) -> Refusal | None:
        """See Layout. A last group may be short, and a group wider than the row is the row."""
        del scheme, default, rows, columns
        return None

    def outputs(self, scheme: Scheme, dtype: str, rows: int, columns: int) -> tuple[OutSpec, ...]:
        """See Layout."""
        del scheme
        return (OutSpec("weight", dtype, (rows, columns), slab_axis=0),)

    def pack(self, part: "Quantized", row: int, out: "Arrays", scheme: Scheme, kernels: "KernelSet") -> None:
        """See Layout. What is beyond the type, as 6 * 2^14 in fp16, becomes its largest value."""
        from shardq.layouts.stored import store
        from shardq.quantizers.decode import decode_rows

        weight = out["weight"]
        weight[row : row + len(part.codes)] = store(decode_rows(part, scheme, kernels), weight.dtype)

    def unpack(self, arrays: "Arrays", scheme: Scheme, kernels: "KernelSet") -> "Quantized":
        """See Layout. A weight is its scale, with the code of 1; a zero has the code of 0, and its sign in a scale of
        1."""
        import numpy as np

        from shardq.layouts.stored import load
        from shardq.quantizers.quantized import Quantized

        del scheme, kernels
        values = load(arrays["weight"])
        there = values != 0
        codes = np.where(there, np.uint8(ONE), np.uint8(0))
        return Quantized(codes, np.where(there, values, np.copysign(np.float32(1), values)), None)

    def unpacks_to(self, scheme: Scheme) -> Scheme:
        """See Layout."""
        del scheme
        return VALUES

    def config_block(self, default: Scheme, choices: Sequence[ModuleChoice], version: str) -> dict[str, Any]:
        """See Layout. Exceptions by anchored regular expressions; null is source precision."""
        others: dict[Scheme | None, list[str]] = {}
        for c in choices:
            if c.scheme != default:
                others.setdefault(c.scheme, []).append(c.module)
        everything = [c.module for c in choices]
        exceptions = {
            regex: scheme and scheme.name
            for scheme, modules in others.items()
            for regex in module_regexes(modules, everything)
        }
        return {"method": METHOD, "scheme": default.name, "exceptions": exceptions, "quantizer": f"shardq:{version}"}

    def scheme_of(self, config: Mapping[str, Any], module: str) -> Scheme | None:
        """See Layout."""
        name = config["scheme"]
        for regex, other in config["exceptions"].items():
            if re.match(regex, module):
                name = other
                break
        return name and self.settle(parse_name(name))


LAYOUTS: Final = (Fake(),)
