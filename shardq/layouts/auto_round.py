"""AutoRound's own layout, as auto-round 0.16.1 writes it in model-free mode.

Symmetric: packing `auto_round:auto_gptq` (zero - 1 stored), the only one that vLLM reads. Asymmetric: packing
`auto_round` (zero stored), because readers of the former cannot say 0. No g_idx.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from shardq.layouts.base import ModuleChoice
from shardq.layouts.qweight import QweightLayout
from shardq.schemes import Scheme

QUANT_METHOD: Final = "auto-round"
FORMAT_VERSION: Final = "0.16.1"  # the release of auto-round whose layout this is; loaders compare it
KEPT: Final[Mapping[str, Any]] = {"bits": 16, "data_type": "float"}


class AutoRound(QweightLayout):
    """quant_method auto-round."""

    name = "auto_round"
    aliases = ("auto-round", "autoround", "auto_round:auto_gptq")
    summary = "AutoRound: qweight, qzeros, scales"
    loaders = "transformers with auto-round, vLLM and SGLang (symmetric)"
    g_idx = False

    def config_block(self, default: Scheme, choices: Sequence[ModuleChoice], version: str) -> dict[str, Any]:
        """See Layout. Every kept matrix is named in extra_config, in full: vLLM matches names there, not patterns."""
        blocks = dict.fromkeys(p for c in choices if c.scheme if (p := _block_prefix(c.module)))
        extra = {c.module: _extra(c.scheme) for c in choices if c.scheme != default}
        extra |= {c.module: _extra(c.scheme) for c in choices if c.scheme and c.role == "head"}
        block: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "packing_format": "auto_round:auto_gptq" if default.symmetric else "auto_round",
            "bits": default.bits,
            "group_size": default.group_size,
            "sym": default.symmetric,
            "data_type": "int",
            "iters": 0,
            "model_free": True,
            "autoround_version": FORMAT_VERSION,
            "quantizer": f"shardq:{version}",
        }
        if blocks:
            block["block_name_to_quantize"] = ",".join(blocks)
        return {**block, "extra_config": extra} if extra else block

    def scheme_of(self, config: Mapping[str, Any], module: str) -> Scheme | None:
        """See Layout."""
        own = config.get("extra_config", {}).get(module, {})
        merged = {**config, **own}
        if merged["bits"] >= 16:
            return None
        return Scheme(f"int{merged['bits']}", merged["group_size"], bool(merged["sym"]))

    def config_files(self, block: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """See Layout."""
        return {"quantization_config.json": block}


def _extra(scheme: Scheme | None) -> dict[str, Any]:
    if scheme is None:
        return dict(KEPT)
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "data_type": "int",
    }


def _block_prefix(module: str) -> str:
    """What stands before the first number in a module's name: `model.layers` for `model.layers.0.mlp.up_proj`."""
    found = re.search(r"\.\d+(\.|$)", module)
    return module[: found.start()] if found else ""
