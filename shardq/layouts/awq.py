"""AWQ layout, version "gemm", for vLLM, SGLang and transformers with GPTQModel (vLLM 0.32, GPTQModel 7.7.0).

qweight int32 [columns, rows/8] holds the codes of eight rows of the weight in a word, in the order of NIBBLES; qzeros
int32 [G, rows/8] the zero points alike, as they are; scales fp16 [G, rows]. Four bits only. One configuration has one
group size, and says that there are zero points even where all of them are 8: without qzeros transformers computes
nonsense.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from shardq.layouts.base import LayoutDefaults, ModuleChoice, OutSpec, Refusal
from shardq.layouts.kept_names import is_head, kept_names
from shardq.schemes import WHOLE_ROW, Scheme

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shardq.kernels import KernelSet
    from shardq.layouts.base import Arrays
    from shardq.quantizers.quantized import Quantized

QUANT_METHOD: Final = "awq"
BITS: Final = 4
LANES: Final = 8  # codes of a word
NIBBLES: Final = (0, 2, 4, 6, 1, 3, 5, 7)  # row of the eight that each nibble of a word holds, the lowest first
GROUPS: Final = (WHOLE_ROW, 32, 64, 128)  # vLLM's kernels take no others


class Awq(LayoutDefaults):
    """quant_method awq. Members as in Layout."""

    name = "awq"
    aliases = ("auto_awq", "autoawq")
    summary = "AWQ (gemm): qweight, qzeros, scales, 4 bits"
    loaders = "vLLM and SGLang, GPTQModel, and transformers with it (dense models, head not quantized)"
    slab_rows = LANES
    halves_experts = True  # as gptq.py has it, for the same reader

    def settle(self, scheme: Scheme) -> Scheme:
        """See Layout."""
        return replace(scheme, numbers="auto_round", scale="fp16") if scheme.is_adjustable else scheme

    def refuse(self, scheme: Scheme, default: Scheme, rows: int, columns: int) -> Refusal | None:
        """See Layout."""
        if scheme.element != f"int{BITS}" or scheme.activation or scheme.group_rows != 1:
            return Refusal(f"holds {BITS}-bit integers beside 16-bit activations, not {scheme.name}", ragged=False)
        if scheme != default:
            return Refusal(f"has one scheme for all modules: {default.name}, not {scheme.name} too", ragged=False)
        if rows % LANES:
            return Refusal(f"needs rows to be multiples of {LANES}", ragged=False)
        if columns % scheme.group_columns(columns) or scheme.group_size > columns:
            return Refusal(f"group size {scheme.group_size} does not divide {columns} columns", ragged=True)
        if scheme.group_size not in GROUPS:
            sizes = ", ".join(map(str, GROUPS))
            return Refusal(f"has no reader for group size {scheme.group_size}: expected one of {sizes}", ragged=False)
        return None

    def outputs(self, scheme: Scheme, dtype: str, rows: int, columns: int) -> tuple[OutSpec, ...]:
        """See Layout."""
        del dtype  # scales are fp16 whatever the weight is
        groups = scheme.groups(columns)
        return (
            OutSpec("qweight", "I32", (columns, rows // LANES), slab_axis=1, per_rows=(1, LANES)),
            OutSpec("qzeros", "I32", (groups, rows // LANES), slab_axis=1, per_rows=(1, LANES)),
            OutSpec("scales", "F16", (groups, rows), slab_axis=1),
        )

    def pack(self, part: "Quantized", row: int, out: "Arrays", scheme: Scheme, kernels: "KernelSet") -> None:
        """See Layout. The rows of `part` are a multiple of 8."""
        import numpy as np

        del scheme
        assert part.zeros is not None
        for codes, name in ((part.codes, "qweight"), (part.zeros, "qzeros")):
            kernels.transpose_u32(_words(codes), out[name].view(np.uint32), row // LANES)
        kernels.narrow_columns(part.scales, out["scales"].view(np.uint16), row)

    def unpack(self, arrays: "Arrays", scheme: Scheme, kernels: "KernelSet") -> "Quantized":
        """See Layout."""
        import numpy as np

        from shardq.quantizers.quantized import Quantized

        del scheme, kernels
        codes, zeros = (_codes(arrays[name].view(np.uint32)) for name in ("qweight", "qzeros"))
        return Quantized(codes, np.ascontiguousarray(arrays["scales"].T.astype(np.float32)), zeros)

    def config_block(self, default: Scheme, choices: Sequence[ModuleChoice], version: str) -> dict[str, Any]:
        """See Layout. `meta` is for people and for shardq: readers take zero points as they are. Raises LayoutRefuses
        where the name of a kept module is part of the name of a quantized one."""
        return {
            "quant_method": QUANT_METHOD,
            "bits": BITS,
            "group_size": default.group_size,
            "zero_point": True,
            "version": "gemm",
            "lm_head": any(c.scheme is not None and is_head(c.module) for c in choices),
            "modules_to_not_convert": kept_names(choices, self.name, anywhere=True),
            "meta": {"quantizer": [f"shardq:{version}"], "sym": default.symmetric},
        }

    def scheme_of(self, config: Mapping[str, Any], module: str) -> Scheme | None:
        """See Layout."""
        if is_head(module) and not config.get("lm_head"):
            return None
        if any(entry in module for entry in config.get("modules_to_not_convert") or ()):
            return None
        symmetric = bool((config.get("meta") or {}).get("sym"))  # in files of others zero points may be anything
        return self.settle(Scheme(f"int{config['bits']}", config["group_size"], symmetric))


def _words(codes: "NDArray[np.uint8]") -> "NDArray[np.uint32]":
    """Codes [rows, n] to words [rows/8, n]."""
    import numpy as np

    rows, count = codes.shape
    eights = codes.reshape(rows // LANES, LANES, count)
    octets = np.empty((rows // LANES, count, 4), np.uint8)  # of a word, the lowest first
    for i, (low, high) in enumerate(zip(NIBBLES[::2], NIBBLES[1::2], strict=True)):
        octets[..., i] = eights[:, low] | (eights[:, high] << 4)
    return octets.view("<u4")[..., 0]


def _codes(words: "NDArray[np.uint32]") -> "NDArray[np.uint8]":
    """The inverse of _words, for its transpose: words [n, rows/8] to codes [rows, n]."""
    import numpy as np

    count, eighths = words.shape
    codes = np.empty((eighths, LANES, count), np.uint8)
    for nibble, lane in enumerate(NIBBLES):
        codes[:, lane] = ((words >> np.uint32(4 * nibble)) & np.uint32(15)).T
    return codes.reshape(eighths * LANES, count)


LAYOUTS: Final = (Awq(),)
