"""AutoRound's own layout, as auto-round 0.16.1 writes it (vLLM 0.32, SGLang 0.5.23, transformers 5.23 with auto-round).

Its configuration names one packing for all modules:

- `auto_round:auto_gptq`: integers, zero - 1 stored. What model-free mode writes for symmetric ones, and the only one of
  the family that vLLM reads. Readers of it cannot say 0, so asymmetric integers have
- `auto_round`: integers, zero stored. Also MXINT4, which has other tensors.
- `auto_round:llm_compressor`: MXFP4 and MXFP8, whose tensors are those of compressed-tensors, with scales by the floor
  rule; another with its name behind it for NVFP4_E5M3. Activations are declared, and auto-round's readers want them.
  NVFP4 has tensors and arithmetic of compressed-tensors: auto-round multiplies by reciprocals where that divides.
- `auto_round:fp8_static`: FP8_STATIC; see auto_round_fp8.py.

- `auto_round:gptqmodel`: integers of either kind, zero stored, and g_idx.
- `auto_round:auto_awq`: 4-bit integers of either kind in the words of awq.py; what auto-round's whole-model flow takes
  for asymmetric ones, and the only way in which vLLM reads those.

`auto_round` takes the packing that auto-round takes for a scheme; the other names stand for one each.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from shardq.layouts.auto_round_fp8 import ACTIVATION as FP8_STATIC
from shardq.layouts.auto_round_fp8 import Fp8Packing, settle_fp8
from shardq.layouts.awq import BITS as AWQ_BITS
from shardq.layouts.awq import Awq
from shardq.layouts.base import LayoutDefaults, ModuleChoice, OutSpec, Refusal
from shardq.layouts.input_scales import input_outputs, pack_input, unpack_input
from shardq.layouts.qweight import LANES, QweightTensors, settle_integers
from shardq.layouts.small_floats import float_outputs, pack_floats, unpack_floats
from shardq.schemes import ACTIVATIONS, ALL_TOKENS, PRESETS, WIDTHS, Scheme

if TYPE_CHECKING:
    from shardq.kernels import KernelSet
    from shardq.layouts.base import Arrays
    from shardq.quantizers.quantized import Quantized

QUANT_METHOD: Final = "auto-round"
FORMAT_VERSION: Final = "0.16.1"  # the release of auto-round whose layout this is; loaders compare it
KEPT: Final[Mapping[str, Any]] = {"bits": 16, "data_type": "float"}
FP8_FIELDS: Final[Mapping[str, Any]] = {"fmt": "e4m3", "activation_scheme": "static"}  # beside those of any scheme
# data_type and act_data_type of schemes, by their activations.
DATA_TYPES: Final[Mapping[str, tuple[str, str]]] = {
    "mxfp4": ("mx_fp", "mx_fp"),
    "mxfp8": ("mx_fp", "mx_fp"),
    "mxfp4-rceil": ("mx_fp", "mx_fp_rceil"),
    "mxfp8-rceil": ("mx_fp", "mx_fp_rceil"),
    "mxint4": ("mx_int", "mx_int"),
    "nvfp4-e5m3": ("nvfp4_v2", "nvfp4_v2"),
    "nvfp4": ("nv_fp", "nv_fp4_with_static_gs"),
    FP8_STATIC: ("fp", "fp"),
}


class Packing(Protocol):
    """The tensors behind one `packing_format`; methods as in Layout."""

    @property
    def word(self) -> str:
        """The packing_format."""

    def takes(self, scheme: Scheme) -> bool:
        """True for schemes that this packing is for; their shapes may still be refused."""

    def refuse(self, scheme: Scheme, rows: int, columns: int) -> Refusal | None:
        """Why it cannot hold a [rows, columns] weight under `scheme`, or None."""

    def outputs(self, scheme: Scheme, rows: int, columns: int) -> tuple[OutSpec, ...]:
        """See Layout."""

    def pack(self, part: "Quantized", row: int, out: "Arrays", scheme: Scheme, kernels: "KernelSet") -> None:
        """See Layout."""

    def unpack(self, arrays: "Arrays", scheme: Scheme, kernels: "KernelSet") -> "Quantized":
        """See Layout."""


@dataclass(frozen=True, slots=True)
class IntPacking(QweightTensors):
    """Weight-only integers."""

    word: str = ""

    def takes(self, scheme: Scheme) -> bool:
        """See Packing."""
        return scheme.is_adjustable and scheme.symmetric in self.symmetries


@dataclass(frozen=True, slots=True)
class FloatPacking:
    """Small floats beside activations of the same kind."""

    word: str
    activations: tuple[str, ...]

    def takes(self, scheme: Scheme) -> bool:
        """See Packing."""
        return scheme.activation in self.activations and scheme.element == ACTIVATIONS[scheme.activation].element

    def refuse(self, scheme: Scheme, rows: int, columns: int) -> Refusal | None:
        """See Packing."""
        del rows
        if columns % scheme.group_size:
            return Refusal(f"group size {scheme.group_size} does not divide {columns} columns", ragged=False)
        return None

    def outputs(self, scheme: Scheme, rows: int, columns: int) -> tuple[OutSpec, ...]:
        """See Packing."""
        return *float_outputs(scheme, rows, columns), *input_outputs(scheme, "F32")

    def pack(self, part: "Quantized", row: int, out: "Arrays", scheme: Scheme, kernels: "KernelSet") -> None:
        """See Packing."""
        pack_floats(part, row, out, scheme, kernels)
        pack_input(part, out)

    def unpack(self, arrays: "Arrays", scheme: Scheme, kernels: "KernelSet") -> "Quantized":
        """See Packing."""
        return replace(unpack_floats(arrays, scheme, kernels), input_scale=unpack_input(arrays))


@dataclass(frozen=True, slots=True)
class AwqPacking:
    """4-bit integers as the layout awq has them."""

    word: str = "auto_round:auto_awq"

    def takes(self, scheme: Scheme) -> bool:
        """See Packing."""
        return scheme.is_adjustable and scheme.bits == AWQ_BITS

    def refuse(self, scheme: Scheme, rows: int, columns: int) -> Refusal | None:
        """See Packing."""
        return Awq().refuse(scheme, scheme, rows, columns)

    def outputs(self, scheme: Scheme, rows: int, columns: int) -> tuple[OutSpec, ...]:
        """See Packing."""
        return Awq().outputs(scheme, "", rows, columns)

    def pack(self, part: "Quantized", row: int, out: "Arrays", scheme: Scheme, kernels: "KernelSet") -> None:
        """See Packing."""
        Awq().pack(part, row, out, scheme, kernels)

    def unpack(self, arrays: "Arrays", scheme: Scheme, kernels: "KernelSet") -> "Quantized":
        """See Packing."""
        return Awq().unpack(arrays, scheme, kernels)


V1: Final = IntPacking(WIDTHS, (True,), 1, word="auto_round:auto_gptq")
ZERO: Final = IntPacking(WIDTHS, (False,), 0, word="auto_round")
ZERO_OF_ALL: Final = IntPacking(WIDTHS, (True, False), 0, g_idx=True, word="auto_round:gptqmodel")
MX: Final = FloatPacking("auto_round:llm_compressor", ("mxfp4", "mxfp8", "mxfp4-rceil", "mxfp8-rceil"))
NVFP4: Final = FloatPacking("auto_round:llm_compressor", ("nvfp4",))
MX_INT: Final = FloatPacking("auto_round", ("mxint4",))
NV: Final = FloatPacking("auto_round:llm_compressor_nvfp4_e5m3", ("nvfp4-e5m3",))
AWQ: Final = AwqPacking()
FP8: Final = Fp8Packing()
OWN_CHOICE: Final[tuple[Packing, ...]] = (V1, ZERO, MX, MX_INT, NVFP4, NV, FP8)


class AutoRound(LayoutDefaults):
    """quant_method auto-round. Members as in Layout."""

    summary = "AutoRound: qweight, qzeros, scales; MX, NVFP4 and FP8_STATIC"
    loaders = "transformers with auto-round; vLLM and SGLang (symmetric integers), vLLM (MXFP4, MXFP8)"
    slab_rows = LANES

    def __init__(
        self,
        name: str = "auto_round",
        aliases: tuple[str, ...] = ("auto-round", "autoround"),
        packings: tuple[Packing, ...] = OWN_CHOICE,
    ) -> None:
        """`packings`: the first that takes a scheme is its."""
        self.name, self.aliases, self._packings = name, aliases, packings

    def settle(self, scheme: Scheme) -> Scheme:
        """See Layout."""
        if scheme.activation not in DATA_TYPES:
            return settle_integers(scheme)
        if scheme.activation == FP8_STATIC:
            return settle_fp8(scheme)
        if scheme.calibrated:
            return replace(scheme, numbers="compressed_tensors", exponent="")
        return replace(scheme, numbers="auto_round", exponent="floor" if scheme.scale == "e8m0" else "")

    def refuse(self, scheme: Scheme, default: Scheme, rows: int, columns: int) -> Refusal | None:
        """See Layout."""
        packing = self._packing(scheme)
        if packing is None:
            words = ", ".join(dict.fromkeys(p.word for p in self._packings))
            return Refusal(f"has no packing for {scheme.element} ({scheme.name}): its packings are {words}", False)
        if scheme.symmetric != default.symmetric:
            return Refusal("cannot mix symmetric and asymmetric modules", ragged=False)
        if self._packing(default) is not packing:
            return Refusal(f"cannot mix {scheme.name} and {default.name}: they differ in their packing", ragged=False)
        return packing.refuse(scheme, rows, columns)

    def outputs(self, scheme: Scheme, dtype: str, rows: int, columns: int) -> tuple[OutSpec, ...]:
        """See Layout."""
        del dtype
        return self._chosen(scheme).outputs(scheme, rows, columns)

    def pack(self, part: "Quantized", row: int, out: "Arrays", scheme: Scheme, kernels: "KernelSet") -> None:
        """See Layout."""
        self._chosen(scheme).pack(part, row, out, scheme, kernels)

    def unpack(self, arrays: "Arrays", scheme: Scheme, kernels: "KernelSet") -> "Quantized":
        """See Layout."""
        return self._chosen(scheme).unpack(arrays, scheme, kernels)

    def config_block(self, default: Scheme, choices: Sequence[ModuleChoice], version: str) -> dict[str, Any]:
        """See Layout. Every kept matrix is named in extra_config, in full: vLLM matches names there, not patterns."""
        blocks = dict.fromkeys(p for c in choices if c.scheme if (p := _block_prefix(c.module)))
        extra = {c.module: _fields(c.scheme, default) for c in choices if c.scheme != default}
        extra |= {c.module: _fields(c.scheme, default) for c in choices if c.scheme and c.role == "head"}
        block: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "packing_format": self._chosen(default).word,
            **_fields(default, default),
            "iters": 0,
            "model_free": True,
            "autoround_version": FORMAT_VERSION,
            "quantizer": f"shardq:{version}",
            **(FP8_FIELDS if default.activation == FP8_STATIC else {}),
        }
        if blocks:
            block["block_name_to_quantize"] = ",".join(blocks)
        return {**block, "extra_config": extra} if extra else block

    def scheme_of(self, config: Mapping[str, Any], module: str) -> Scheme | None:
        """See Layout."""
        merged = {**config, **config.get("extra_config", {}).get(module, {})}
        if merged["bits"] >= 16:
            return None
        for scheme in (self.settle(p.scheme) for p in PRESETS.values() if p.scheme.activation in DATA_TYPES):
            fields = _fields(scheme, scheme)
            if fields == {k: merged.get(k) for k in fields}:
                return scheme
        return Scheme(f"int{merged['bits']}", merged["group_size"], bool(merged["sym"]))

    def config_files(self, block: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """See Layout."""
        return {"quantization_config.json": block}

    def _packing(self, scheme: Scheme) -> Packing | None:
        return next((p for p in self._packings if p.takes(scheme)), None)

    def _chosen(self, scheme: Scheme) -> Packing:
        packing = self._packing(scheme)
        assert packing is not None, f"{self.name} was not asked whether it refuses {scheme.name}"
        return packing


def _fields(scheme: Scheme | None, default: Scheme) -> dict[str, Any]:
    """What the configuration says of a module, or of all; None: kept in source precision."""
    if scheme is None:
        return {**KEPT, "act_bits": 16, "act_data_type": "float"} if default.activation else dict(KEPT)
    data_type, act_data_type = DATA_TYPES.get(scheme.activation, ("int", ""))
    fields = {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "data_type": data_type,
    }
    if not scheme.activation:
        return fields
    a = ACTIVATIONS[scheme.activation]
    return {
        **fields,
        "act_bits": a.bits,
        "act_data_type": act_data_type,
        "act_dynamic": a.group_size != ALL_TOKENS,
        "act_group_size": a.group_size,
        "act_sym": True,
    }


def _block_prefix(module: str) -> str:
    """What stands before the first number in a module's name: `model.layers` for `model.layers.0.mlp.up_proj`."""
    found = re.search(r"\.\d+(\.|$)", module)
    return module[: found.start()] if found else ""


LAYOUTS: Final = (
    AutoRound(),
    AutoRound("auto_round:auto_gptq", (), (V1,)),
    AutoRound("auto_round:gptqmodel", (), (ZERO_OF_ALL,)),
    AutoRound("auto_round:auto_awq", (), (AWQ,)),
    AutoRound("auto_round:llm_compressor", (), (MX, NVFP4)),
)
