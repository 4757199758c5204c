"""GPTQ layout, for vLLM, SGLang, GPTQModel and transformers (GPTQModel 7.7.0, vLLM 0.32, transformers 5.23).

Version 1 (`checkpoint_format: gptq`, zero - 1 stored) for symmetric schemes, which every reader knows; version 2
(zero stored) for asymmetric ones, where version 1 cannot say 0, and for all in `gptq_v2`. g_idx and qzeros are always
written: without them transformers fails or silently computes nonsense. 5, 6 and 7 bits have a packing that GPTQModel
alone reads (`gptq_p`).
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from shardq.fused import fused_groups, fused_names
from shardq.layouts.base import LayoutDefaults, ModuleChoice, OutSpec, Refusal
from shardq.layouts.qweight import LANES, QweightTensors, settle_integers
from shardq.layouts.templates import module_regexes
from shardq.schemes import Scheme

if TYPE_CHECKING:
    from shardq.kernels import KernelSet
    from shardq.layouts.base import Arrays
    from shardq.quantizers.quantized import Quantized

QUANT_METHOD: Final = "gptq"
WIDTHS: Final = (2, 3, 4, 8)
# What `checkpoint_format` says, and the tensors.
VERSION_1: Final = ("gptq", QweightTensors(WIDTHS, (True,), subtracted=1, g_idx=True))
VERSION_2: Final = ("gptq_v2", QweightTensors(WIDTHS, (True, False), subtracted=0, g_idx=True))


class Gptq(LayoutDefaults):
    """quant_method gptq. Members as in Layout."""

    summary = "GPTQ: qweight, qzeros, scales, g_idx"
    loaders = (
        "vLLM and SGLang (4 and 8 bits, symmetric), GPTQModel, and transformers with it where all matrices of the "
        "blocks have one scheme"
    )
    slab_rows = LANES
    halves_experts = True  # GPTQModel 7.7.0 with Defuser 0.0.28, by `torch.chunk`: loading, and in what it writes

    def __init__(
        self,
        name: str = "gptq",
        aliases: tuple[str, ...] = ("auto_gptq",),
        symmetric: tuple[str, QweightTensors] = VERSION_1,
    ) -> None:
        """`symmetric`: the version for symmetric schemes."""
        self.name, self.aliases, self._symmetric = name, aliases, symmetric

    def _version(self, scheme: Scheme) -> tuple[str, QweightTensors]:
        return self._symmetric if scheme.symmetric else VERSION_2

    def settle(self, scheme: Scheme) -> Scheme:
        """See Layout."""
        return settle_integers(scheme)

    def refuse(self, scheme: Scheme, default: Scheme, rows: int, columns: int) -> Refusal | None:
        """See Layout."""
        if scheme.symmetric != default.symmetric:
            return Refusal("cannot mix symmetric and asymmetric modules", ragged=False)
        return self._version(scheme)[1].refuse(scheme, rows, columns)

    def outputs(self, scheme: Scheme, dtype: str, rows: int, columns: int) -> tuple[OutSpec, ...]:
        """See Layout."""
        del dtype
        return self._version(scheme)[1].outputs(scheme, rows, columns)

    def pack(self, part: "Quantized", row: int, out: "Arrays", scheme: Scheme, kernels: "KernelSet") -> None:
        """See Layout."""
        self._version(scheme)[1].pack(part, row, out, scheme, kernels)

    def unpack(self, arrays: "Arrays", scheme: Scheme, kernels: "KernelSet") -> "Quantized":
        """See Layout."""
        return self._version(scheme)[1].unpack(arrays, scheme, kernels)

    def config_block(self, default: Scheme, choices: Sequence[ModuleChoice], version: str) -> dict[str, Any]:
        """See Layout. Kept modules and exceptions go into `dynamic` as anchored regular expressions."""
        block: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "bits": default.bits,
            "group_size": default.group_size,
            "desc_act": False,
            "sym": default.symmetric,
            "lm_head": any(c.scheme and _is_lm_head(c.module) for c in choices),
            "true_sequential": True,
            "damp_percent": 0.01,
            "checkpoint_format": self._version(default)[0],
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"shardq:{version}"]},
        }
        dynamic = _dynamic(default, choices)
        return {**block, "dynamic": dynamic} if dynamic else block

    def scheme_of(self, config: Mapping[str, Any], module: str) -> Scheme | None:
        """See Layout."""
        bits, group_size = config["bits"], config["group_size"]
        if _is_lm_head(module) and not config.get("lm_head"):
            return None
        for rule, values in (config.get("dynamic") or {}).items():
            if re.match(rule[2:], module):
                if rule.startswith("-:"):
                    return None
                bits, group_size = values.get("bits", bits), values.get("group_size", group_size)
                break
        return Scheme(f"int{bits}", group_size, bool(config["sym"]))

    def config_files(self, block: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """See Layout. Older readers look for quantize_config.json only."""
        return {"quantize_config.json": block}


def _is_lm_head(module: str) -> bool:
    """True for the module that the key `lm_head` speaks of; a head with another name needs a rule of its own."""
    return module.rpartition(".")[2] == "lm_head"


def _dynamic(default: Scheme, choices: Sequence[ModuleChoice]) -> dict[str, dict[str, int]]:
    """Readers take the first rule whose regular expression matches from the start of the module's name. vLLM asks with
    the name of the matrix that it makes of a fused group (`get_dynamic_override`), so these are named, too."""
    schemes = {c.module: c.scheme for c in choices}
    for group in dict.fromkeys(fused_groups(schemes, None).values()):
        if len(found := {schemes[m] for m in group}) == 1:
            schemes |= dict.fromkeys(fused_names(group), found.pop())
    groups: dict[Scheme | None, list[str]] = {}
    for module, scheme in schemes.items():
        if scheme != default and not (scheme is None and _is_lm_head(module)):  # `lm_head` says that already
            groups.setdefault(scheme, []).append(module)
    everything = list(schemes)
    rules: dict[str, dict[str, int]] = {}
    for scheme, modules in groups.items():
        values = {} if scheme is None else {"bits": scheme.bits, "group_size": scheme.group_size}
        sign = "-" if scheme is None else "+"
        rules |= {f"{sign}:{regex}": dict(values) for regex in module_regexes(modules, everything)}
    return rules


LAYOUTS: Final = (Gptq(), Gptq("gptq_v2", ("gptqmodel",), VERSION_2))
