"""config.json of an output: the source's own bytes, and what the layout adds."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Final

from shardq.config_json import drop_keys, set_in, set_key
from shardq.untied import TEXT, TIED, is_tied

if TYPE_CHECKING:
    from shardq.plans import Plan

# Blocks that say how a source is quantized, which stand at the top or in a part of it.
QUANTIZATION_KEYS: Final = ("quantization_config", "compression_config", "quantization", "expert_dtype")
# DeepSeek-V4's own word for its experts, which vLLM takes for fp4 where it is missing; other layouts have a method of
# their own there.
EXPERTS: Final = ("expert_dtype", {"fp8": "fp8"})


def final_config(plan: "Plan", block: Mapping[str, Any]) -> str:
    """The text, with the `block` of Layout.config_block; a checkpoint without config.json gets one that holds only
    that. What a source says of codes that it has no more is left out. Raises SourceUnreadable for no JSON object."""
    text = (plan.checkpoint.config_bytes or b"{\n}\n").decode()
    if plan.weights.were_encoded:
        text = drop_keys(text, QUANTIZATION_KEYS)
    for key, value in _added(plan, block).items():
        text = set_key(text, key, value)
    if _unties(plan):
        text = set_in(set_key(text, TIED, False), TEXT, TIED, False)
    return text


def final_values(plan: "Plan", block: Mapping[str, Any]) -> dict[str, Any]:
    """The same, parsed."""
    config = plan.checkpoint.config or {}
    kept = _without(config, QUANTIZATION_KEYS) if plan.weights.were_encoded else config
    return {**(_untied(kept) if _unties(plan) else kept), **_added(plan, block)}


def _added(plan: "Plan", block: Mapping[str, Any]) -> dict[str, Any]:
    key, words = EXPERTS
    named = key in (plan.checkpoint.config or {}) and plan.layout.name in words
    return {**({key: words[plan.layout.name]} if named else {}), **plan.layout.config_keys(block)}


def _unties(plan: "Plan") -> bool:
    """A quantized head is no longer the embedding, and a config that says nothing may mean that it is."""
    return plan.recipe.quant_lm_head and is_tied(plan.checkpoint.config)


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    text = config.get(TEXT)
    return {**config, TIED: False} | ({TEXT: {**text, TIED: False}} if isinstance(text, Mapping) else {})


def _without(config: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """What `drop_keys` leaves."""
    return {k: _without(v, keys) if isinstance(v, Mapping) else v for k, v in config.items() if k not in keys}
