"""What a quantization_config says of a module, by quantization method: as the engines' own readers match names.

Sources: compressed-tensors 0.20 (`match_named_modules`), vLLM 0.32 (`is_layer_skipped`, `get_dynamic_override`,
`AWQConfig.is_layer_skipped`, `INCConfig.get_layer_config`), mlx-lm 0.32.2 (`load_model`).
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, Final, Literal

Belief = Literal["quantized", "plain", "unsaid"]  # unsaid: the readers look at the tensors

METHODS: Final[Mapping[str, str]] = {  # as written -> as named here
    "compressed-tensors": "compressed-tensors",
    "compressed_tensors": "compressed-tensors",
    "auto-round": "auto-round",
    "auto_round": "auto-round",
    "intel/auto-round": "auto-round",
    "gptq": "gptq",
    "gptq_marlin": "gptq",
    "awq": "awq",
    "awq_marlin": "awq",
    "fp8": "fp8",
    "mxfp8": "mxfp8",
    "mxfp4": "mxfp4",
    "modelopt": "modelopt",
    "modelopt_fp4": "modelopt",
    "bitsandbytes": "bitsandbytes",
}


def method_of(config: Mapping[str, Any], block: Mapping[str, Any]) -> str:
    """The method of a configuration; MLX names none and has `quantization`. An unknown one as it is written."""
    named = block.get("quant_method")
    if isinstance(named, str) and named:
        return METHODS.get(named.lower(), named.lower())
    if isinstance(config.get("quantization"), dict) or ("bits" in block and "group_size" in block):
        return "mlx"
    return ""


def ignored_names(block: Mapping[str, Any], method: str) -> frozenset[str]:
    """Full names that the configuration says are plain."""
    keys = {"compressed-tensors": ("ignore",), "fp8": ("ignored_layers", "modules_to_not_convert")}.get(
        method, ("modules_to_not_convert",)
    )
    return frozenset(
        n for key in keys for n in _strings(block.get(key)) if not n.startswith("re:")
    )  # fmt: skip


def believe(block: Mapping[str, Any], method: str, module: str, ignore: frozenset[str]) -> Belief:
    """What the configuration says of a module. `ignore` is `ignored_names` of the block."""
    match method:
        case "compressed-tensors":
            if module in ignore or any(_compiled(p).match(module) for p in _regexes(block.get("ignore"))):
                return "plain"
            return "quantized" if _ct_group(block, module) else "plain"
        case "fp8" | "mxfp8":
            return "plain" if module in ignore else "quantized"
        case "awq":
            if not ignore:
                return "unsaid"
            return "plain" if any(part in module for part in ignore) else "quantized"
        case "gptq":
            rule = gptq_rule(block, module)
            return "plain" if rule is not None and rule.startswith("-:") else "unsaid"
        case "auto-round":
            bits = group_of(block, method, module).get("bits")
            if isinstance(bits, int) and bits >= 16:
                return "plain"
            blocks = block.get("block_name_to_quantize")
            prefixes = blocks.split(",") if isinstance(blocks, str) else _strings(blocks)
            named = module in _table(block.get("extra_config"))
            inside = not prefixes or any(module.startswith(p.strip()) for p in prefixes)
            return "quantized" if named or inside else "plain"
        case _:
            return "unsaid"


def group_of(block: Mapping[str, Any], method: str, module: str) -> Mapping[str, Any]:
    """Keys of the configuration that describe a module's weight; for compressed-tensors also `input_activations`."""
    match method:
        case "compressed-tensors":
            group = _ct_group(block, module)
            return (
                {**_table(group.get("weights")), "input_activations": group.get("input_activations")} if group else {}
            )
        case "gptq":
            rule = gptq_rule(block, module)
            return {**block, **_table(_table(block.get("dynamic")).get(rule or ""))}
        case "auto-round":
            extra = _table(block.get("extra_config"))
            own = extra.get(module)
            if own is None:
                found = (v for k, v in extra.items() if set("*+?^$|[(\\") & set(k) and _compiled(k).search(module))
                own = next(found, None)
            return {**block, **_table(own)}
        case "mlx":
            return {**block, **_table(block.get(module))}
        case _:
            return block


def gptq_rule(block: Mapping[str, Any], module: str) -> str | None:
    """The first rule of `dynamic` that matches from the start of the name."""
    for rule in _table(block.get("dynamic")):
        if _compiled(rule.removeprefix("-:").removeprefix("+:")).match(module):
            return rule
    return None


def ct_groups(block: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The groups of a compressed-tensors configuration, with their formats filled in."""
    groups = (g for g in _table(block.get("config_groups")).values() if isinstance(g, dict))
    return tuple({**g, "format": g.get("format") or block.get("format")} for g in groups)


def _ct_group(block: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """Names win over the class, as vLLM matches."""
    by_class: Mapping[str, Any] | None = None
    for group in ct_groups(block):
        for target in _strings(group.get("targets")):
            if target == module or (target.startswith("re:") and _compiled(target[3:]).match(module)):
                return group
            if target == "Linear" and by_class is None:
                by_class = group
    return by_class


def ct_patterns(block: Mapping[str, Any]) -> tuple[str, ...]:
    """Every regular expression of a compressed-tensors configuration, without its `re:`."""
    targets = (p for g in ct_groups(block) for p in _regexes(g.get("targets")))
    return (*_regexes(block.get("ignore")), *targets)


def names_target(block: Mapping[str, Any], module: str) -> bool:
    """A compressed-tensors target hits this module by name, not only by its class."""
    targets = [t for g in ct_groups(block) for t in _strings(g.get("targets"))]
    return module in targets or any(_compiled(t[3:]).match(module) for t in targets if t.startswith("re:"))


def _regexes(value: object) -> list[str]:
    return [t[3:] for t in _strings(value) if t.startswith("re:")]


def _strings(value: object) -> list[str]:
    return [v for v in value if isinstance(v, str)] if isinstance(value, list | tuple) else []


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    """A pattern of a foreign configuration; one that is no expression matches nothing."""
    try:
        return re.compile(pattern)
    except re.error:
        return re.compile(r"(?!)")
