"""The tests that rows of table/ name: what of a checkpoint they hit, as evidence for a message.

Each takes what is served and the tensor parallel size and gives one text for each place; none means that it holds.
"""

from collections.abc import Callable, Mapping
from typing import Final

from shardq.fused import fused_names, model_types
from shardq.serving import parallel
from shardq.serving.believed import ct_patterns, gptq_rule, names_target
from shardq.serving.served import WHOLE_ROW, WHOLE_TENSOR, Module, Served, Stored

Condition = Callable[[Served, int], list[str]]

READ_PACKINGS: Final = ("auto_round:auto_gptq", "auto_round:auto_awq", "auto_round:fp8", "auto_round:llm_compressor")
WHOLE_FP8: Final = ("fp8", WHOLE_TENSOR)  # kind, and columns of a scale
BODY: Final = ("linear", "small", "nontext", "outside_block")  # roles that every server builds by the configuration


def split_groups(served: Served, tp: int) -> list[str]:
    """Fused groups whose members are not stored alike."""
    del tp
    return [_told(group) for group in served.groups if len({m.stored for m in group}) > 1]


def differing_experts(served: Served, tp: int) -> list[str]:
    """Layers whose routed experts are not all stored alike."""
    del tp
    layers: dict[str, set[str]] = {}
    for m in served.modules.values():
        if ".experts." in m.name:
            layers.setdefault(m.name.partition(".experts.")[0], set()).add(m.stored.name if m.stored else "plain")
    return [f"{layer}.experts: {', '.join(sorted(kinds))}" for layer, kinds in layers.items() if len(kinds) > 1]


def unignored_linears(served: Served, tp: int) -> list[str]:
    """Plain matrices that the configuration says are quantized."""
    del tp
    return [m.name for m in _unignored(served) if m.role in BODY]


def unignored_mtp(served: Served, tp: int) -> list[str]:
    """The same of prediction layers."""
    del tp
    return [m.name for m in _unignored(served) if m.role == "mtp"]


def unignored_routers(served: Served, tp: int) -> list[str]:
    """The same of routers."""
    del tp
    return [m.name for m in _unignored(served) if m.role == "router"]


def ignored_but_quantized(served: Served, tp: int) -> list[str]:
    """Quantized weights that the configuration says are plain."""
    del tp
    return [m.name for m in served.quantized if m.believed == "plain"]


def mixed_schemes(served: Served, tp: int) -> list[str]:
    """Schemes, where there are several."""
    del tp
    names = sorted({m.stored.name for m in served.quantized if m.stored})
    return names if len(names) > 1 else []


def mixed_with_asymmetric(served: Served, tp: int) -> list[str]:
    """Schemes, where there are several and one is asymmetric."""
    return mixed_schemes(served, tp) if any(m.stored and not m.stored.symmetric for m in served.quantized) else []


def gptq_exceptions(served: Served, tp: int) -> list[str]:
    """Matrices of the blocks that a `dynamic` rule sets apart."""
    del tp
    found = (m for m in served.modules.values() if m.role == "linear" and gptq_rule(served.block, m.name))
    return [m.name for m in found]


def gptq_rules_miss_fused(served: Served, tp: int) -> list[str]:
    """Fused groups under a `dynamic` rule that changes bits or groups, and whose own name no rule matches."""
    del tp
    found = []
    for group in served.groups:
        rule = gptq_rule(served.block, group[0].name)
        if rule is None or rule.startswith("-:") or group[0].expert:
            continue
        names = fused_names([m.name for m in group])
        rules = served.block["dynamic"]
        said = [rules.get(gptq_rule(served.block, n) or "") for n in names]
        if names and rules[rule] not in said:
            found.append(f"{names[0]} (rule {rule})")
    return found


def anchored_patterns(served: Served, tp: int) -> list[str]:
    """Regular expressions that name a prefix, in a model whose names servers change."""
    del tp
    if not any(key in served.config for key in ("text_config", "vision_config", "audio_config", "thinker_config")):
        return []
    return [f"re:{p}" for p in ct_patterns(served.block) if not p.lstrip("^(").startswith((".*", "?:.*"))]


def untargeted_head(served: Served, tp: int) -> list[str]:
    """Quantized heads that no target names."""
    del tp
    heads = (m for m in served.quantized if m.role == "head")
    return [m.name for m in heads if not names_target(served.block, m.name)]


def tied_head_quantized(served: Served, tp: int) -> list[str]:
    """Quantized heads of a model whose head is the embedding."""
    del tp
    return [m.name for m in served.quantized if m.role == "head"] if served.tied else []


def tied_head_written(served: Served, tp: int) -> list[str]:
    """Plain heads of a model whose head is the embedding."""
    del tp
    return [m.name for m in served.modules.values() if m.role == "head" and not m.stored] if served.tied else []


def tied_embedding_quantized(served: Served, tp: int) -> list[str]:
    """Quantized embeddings of a model whose head is the embedding."""
    del tp
    return [m.name for m in served.quantized if m.role == "embedding"] if served.tied else []


def missing_input_scales(served: Served, tp: int) -> list[str]:
    """Modules with static activations that have no scale for them."""
    del tp
    found = (m for m in served.quantized if m.stored and m.stored.activation == "static")
    names = ("input_scale", "input_global_scale", "activation_scale")
    return [m.name for m in found if not any(f"{m.name}.{n}" in served.tensors for n in names)]


def missing_input_global_scales(served: Served, tp: int) -> list[str]:
    """fp4 modules with quantized activations that have no input_global_scale."""
    del tp
    found = (m for m in served.quantized if m.stored and m.stored.kind == "fp4" and m.stored.activation)
    return [m.name for m in found if f"{m.name}.input_global_scale" not in served.tensors]


def static_experts(served: Served, tp: int) -> list[str]:
    """Experts whose activations have scales in the checkpoint."""
    del tp
    return [m.name for m in served.quantized if m.expert and m.stored and m.stored.activation == "static"]


def static_experts_in_rows(served: Served, tp: int) -> list[str]:
    """Those of them that are no fp8 with one scale for all."""
    whole = {m.name for m in served.quantized if m.stored and (m.stored.kind, m.stored.group_columns) == WHOLE_FP8}
    return [name for name in static_experts(served, tp) if name not in whole]


def missing_g_idx(served: Served, tp: int) -> list[str]:
    """qweight without g_idx."""
    del tp
    return [m.name for m in _packed(served, "qweight") if f"{m.name}.g_idx" not in served.tensors]


def present_g_idx(served: Served, tp: int) -> list[str]:
    """qweight with g_idx."""
    del tp
    return [m.name for m in _packed(served, "qweight") if f"{m.name}.g_idx" in served.tensors]


def missing_qzeros(served: Served, tp: int) -> list[str]:
    """qweight without qzeros."""
    del tp
    return [m.name for m in _packed(served, "qweight") if f"{m.name}.qzeros" not in served.tensors]


def symmetric_zero_points(served: Served, tp: int) -> list[str]:
    """Modules that are declared symmetric and yet have a zero point tensor."""
    del tp
    groups = served.block.get("config_groups")
    tables = groups.values() if isinstance(groups, dict) else ()
    weights = [g.get("weights") for g in tables if isinstance(g, dict)]
    if not weights or any(not isinstance(w, dict) or w.get("symmetric") is not True for w in weights):
        return []
    return [n for n in served.tensors if n.endswith(".weight_zero_point")]


def activation_order(served: Served, tp: int) -> list[str]:
    """desc_act with groups."""
    del tp
    order = served.block.get("desc_act") is True and served.block.get("group_size") != -1
    return ["desc_act"] if order else []


def nested_block(served: Served, tp: int) -> list[str]:
    """A quantization_config that is not at the top."""
    del tp
    top = any(isinstance(served.config.get(k), dict) for k in ("quantization_config", "quantization"))
    return [] if top or not served.block else ["quantization_config below text_config or the like"]


def not_bfloat16(served: Served, tp: int) -> list[str]:
    """A model that is not computed in bfloat16."""
    del tp
    dtype = served.config.get("dtype", served.config.get("torch_dtype"))
    return [] if dtype in (None, "bfloat16") else [f"dtype {dtype}"]


def ragged_blocks(served: Served, tp: int) -> list[str]:
    """Block-scaled matrices with a side that the block does not divide."""
    del tp
    found = (m for m in served.quantized if m.stored and m.stored.group_rows > 1)
    return [
        _sized(m) for m in found if m.stored and (m.rows % m.stored.group_rows or m.columns % m.stored.group_columns)
    ]


def unusual_groups(served: Served, tp: int) -> list[str]:
    """Integer weights in groups that Marlin does not know."""
    del tp
    known = (WHOLE_ROW, 32, 64, 128)
    found = (m for m in served.quantized if m.stored and m.stored.kind == "int" and not m.stored.activation)
    return [f"{m.name} {m.stored.name}" for m in found if m.stored and m.stored.group_columns not in known]


def separate_experts(served: Served, tp: int) -> list[str]:
    """Experts that are quantized one by one."""
    del tp
    return [m.name for m in served.quantized if ".experts." in m.name and m.name.partition(".experts.")[2][0].isdigit()]


def ct_converted_experts(served: Served, tp: int) -> list[str]:
    """Experts in 8-bit numbers other than packed integers and fp8 with a scale for a row."""
    del tp
    experts = (m for m in served.quantized if m.expert and m.stored and m.stored.bits == 8)
    return [m.name for m in experts if m.stored and _converted(m.stored)]


def not_gpt_oss(served: Served, tp: int) -> list[str]:
    """The model types, where gpt_oss is not among them."""
    del tp
    types = model_types(served.config)
    return [] if "gpt_oss" in types else sorted(types) or ["no model_type"]


def gpt_oss(served: Served, tp: int) -> list[str]:
    """Its model type, of gpt-oss."""
    return [] if not_gpt_oss(served, tp) else ["model_type gpt_oss"]


def gpt_oss_experts(served: Served, tp: int) -> list[str]:
    """Experts of gpt-oss that are quantized one by one."""
    return [] if not_gpt_oss(served, tp) else separate_experts(served, tp)


def deepseek_experts(served: Served, tp: int) -> list[str]:
    """Experts of DeepSeek-V3 that are quantized one by one."""
    return separate_experts(served, tp) if "deepseek_v3" in model_types(served.config) else []


def auto_round_packing(served: Served, tp: int) -> list[str]:
    """A packing that engines do not read."""
    del tp
    packing = str(served.block.get("packing_format", "auto_round"))
    return [] if packing in READ_PACKINGS else [f"packing_format {packing}"]


CONDITIONS: Final[Mapping[str, Condition]] = {
    f.__name__: f
    for f in (
        split_groups, differing_experts, unignored_linears, unignored_mtp, unignored_routers, ignored_but_quantized,
        mixed_schemes, mixed_with_asymmetric, gptq_exceptions, gptq_rules_miss_fused, anchored_patterns,
        untargeted_head, tied_head_quantized, tied_head_written, tied_embedding_quantized, missing_input_scales,
        missing_input_global_scales, static_experts, static_experts_in_rows, missing_g_idx, present_g_idx,
        missing_qzeros, symmetric_zero_points,
        activation_order, nested_block, not_bfloat16, ragged_blocks, unusual_groups, separate_experts,
        ct_converted_experts, not_gpt_oss, gpt_oss, gpt_oss_experts, deepseek_experts, auto_round_packing,
        parallel.heads, parallel.rows, parallel.columns, parallel.groups,
        parallel.words, parallel.blocks,
    )
}  # fmt: skip


def _converted(stored: Stored) -> bool:
    match stored.kind:
        case "int":
            return bool(stored.activation)
        case "fp8":
            return stored.group_rows > 1
        case _:
            return True


def _unignored(served: Served) -> list[Module]:
    return [m for m in served.modules.values() if m.stored is None and m.believed == "quantized"]


def _packed(served: Served, leaf: str) -> list[Module]:
    return [m for m in served.quantized if f"{m.name}.{leaf}" in served.tensors]


def _told(group: tuple[Module, ...]) -> str:
    parent = group[0].name.rpartition(".")[0]
    return f"{parent}: " + ", ".join(f"{m.segment} {m.stored.name if m.stored else 'plain'}" for m in group)


def _sized(m: Module) -> str:
    return f"{m.name} [{m.rows}, {m.columns}]"
