"""GPTQ layout, for vLLM, SGLang, GPTQModel and transformers (GPTQModel 7.7.0, vLLM 0.32, transformers 5.23).

Version 1 (`checkpoint_format: gptq`, zero - 1 stored) for symmetric schemes, which every reader knows; version 2
(zero stored) for asymmetric ones, where version 1 cannot say 0. g_idx and qzeros are always written: without them
transformers fails or silently computes nonsense.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from shardq.layouts.base import ModuleChoice
from shardq.layouts.qweight import QweightLayout
from shardq.layouts.templates import module_regexes
from shardq.schemes import Scheme

QUANT_METHOD: Final = "gptq"


class Gptq(QweightLayout):
    """quant_method gptq."""

    name = "gptq"
    aliases = ("auto_gptq",)
    summary = "GPTQ: qweight, qzeros, scales, g_idx"
    loaders = (
        "vLLM and SGLang (4 and 8 bits, symmetric), GPTQModel, and transformers with it where all matrices of the "
        "blocks have one scheme"
    )
    g_idx = True

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
            "checkpoint_format": "gptq" if default.symmetric else "gptq_v2",
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
    """Readers take the first rule whose regular expression matches from the start of the module's name."""
    groups: dict[Scheme | None, list[str]] = {}
    for c in choices:
        if c.scheme != default and not (c.scheme is None and _is_lm_head(c.module)):  # `lm_head` says that already
            groups.setdefault(c.scheme, []).append(c.module)
    everything = [c.module for c in choices]
    rules: dict[str, dict[str, int]] = {}
    for scheme, modules in groups.items():
        values = {} if scheme is None else {"bits": scheme.bits, "group_size": scheme.group_size}
        sign = "-" if scheme is None else "+"
        rules |= {f"{sign}:{regex}": dict(values) for regex in module_regexes(modules, everything)}
    return rules
