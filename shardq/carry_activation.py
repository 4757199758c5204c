"""What a source's configuration says a server should do to activations, as schemes know it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shardq.formats import ELEMENTS
from shardq.layouts.auto_round import DATA_TYPES
from shardq.schemes import ACTIVATIONS, WHOLE_ROW

if TYPE_CHECKING:
    from shardq.dequantize.base import Encoded
    from shardq.dequantize.hints import Hints


def declared_activation(e: "Encoded", hints: "Hints") -> str:
    """Key of ACTIVATIONS, or empty: 16 bits, nothing said, groups that disagree, and what only calibration gives."""
    block = hints.block
    if isinstance(groups := block.get("config_groups"), Mapping):
        bits, floating = ELEMENTS[e.element].bits, not ELEMENTS[e.element].is_integer
        found = {_of_group(g.get("input_activations")) for g in groups.values() if _is_of(g, bits, floating)}
        return found.pop() if len(found) == 1 else ""
    if hints.method == "mxfp8":
        return "mxfp8"
    if hints.method == "fp8":
        dynamic = block.get("activation_scheme") == "dynamic" and e.element == "e4m3fn"
        return ("fp8-g128" if hints.weight_block else "fp8") if dynamic else ""
    types = (block.get("data_type"), block.get("act_data_type"))
    if block.get("act_dynamic") is not True:
        return ""
    plain = (ACTIVATIONS[a] for a, known in DATA_TYPES.items() if known == types)
    return next((a.name for a in plain if a.bits == block.get("act_bits") and not a.calibrated), "")


def _is_of(group: Any, bits: int, floating: bool) -> bool:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    wanted = (bits, "float" if floating else "int")
    return isinstance(weights, Mapping) and (weights.get("num_bits"), weights.get("type", "int")) == wanted


def _of_group(said: Any) -> str:
    if not isinstance(said, Mapping) or said.get("dynamic") is not True:
        return ""
    size = WHOLE_ROW if said.get("strategy") == "token" else said.get("group_size")
    wanted = (said.get("num_bits"), said.get("type", "int") == "float", size)
    plain = (a for a in ACTIVATIONS.values() if not a.calibrated and not a.exponent)
    return next((a.name for a in plain if (a.bits, a.floating, a.group_size) == wanted), "")
