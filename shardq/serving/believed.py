"""What a quantization_config says of a module, by quantization method: as the engines' own readers match names.

Sources: compressed-tensors 0.20 (`match_named_modules`), vLLM 0.32 (`is_layer_skipped`, `get_dynamic_override`,
`AWQConfig.is_layer_skipped`, `INCConfig.get_layer_config`), mlx-lm 0.32.2 (`load_model`).
"""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
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


@dataclass(frozen=True)
class Said:
    """A quantization_config, taken apart once: it is asked about every module, and may name as many."""

    block: Mapping[str, Any]
    method: str  # as method_of has it

    @cached_property
    def ignored(self) -> frozenset[str]:
        """Full names that it says are plain."""
        keys = {"compressed-tensors": ("ignore",), "fp8": ("ignored_layers", "modules_to_not_convert")}.get(
            self.method, ("modules_to_not_convert",)
        )
        return frozenset(n for key in keys for n in _strings(self.block.get(key)) if not n.startswith("re:"))

    @cached_property
    def ignored_patterns(self) -> tuple[re.Pattern[str], ...]:
        """The same of compressed-tensors as expressions, to match."""
        return tuple(_compiled(p) for p in _regexes(self.block.get("ignore")))

    @cached_property
    def extra(self) -> Mapping[str, Any]:
        """What auto-round says of single modules."""
        return _table(self.block.get("extra_config"))

    @cached_property
    def extra_patterns(self) -> tuple[tuple[re.Pattern[str], Any], ...]:
        """Those of them that name several, to search."""
        return tuple((_compiled(k), v) for k, v in self.extra.items() if set("*+?^$|[(\\") & set(k))

    @cached_property
    def targets(self) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        """Targets of compressed-tensors in their order, with the group of each."""
        return tuple((t, group) for group in ct_groups(self.block) for t in _strings(group.get("targets")))

    @cached_property
    def target_names(self) -> Mapping[str, int]:
        """Where each of them stands first."""
        return {t: n for n, (t, _) in reversed(tuple(enumerate(self.targets)))}

    @cached_property
    def target_patterns(self) -> tuple[tuple[re.Pattern[str], int], ...]:
        """Those that are expressions, to match, and where they stand."""
        return tuple((_compiled(t[3:]), n) for n, (t, _) in enumerate(self.targets) if t.startswith("re:"))


def believe(said: Said, module: str) -> Belief:
    """What a configuration says of a module."""
    match said.method:
        case "compressed-tensors":
            if module in said.ignored or any(p.match(module) for p in said.ignored_patterns):
                return "plain"
            return "quantized" if _ct_group(said, module) else "plain"
        case "fp8" | "mxfp8":
            return "plain" if module in said.ignored else "quantized"
        case "awq":
            if not said.ignored:
                return "unsaid"
            return "plain" if any(part in module for part in said.ignored) else "quantized"
        case "gptq":
            rule = gptq_rule(said.block, module)
            return "plain" if rule is not None and rule.startswith("-:") else "unsaid"
        case "auto-round":
            bits = group_of(said, module).get("bits")
            if isinstance(bits, int) and bits >= 16:
                return "plain"
            blocks = said.block.get("block_name_to_quantize")
            prefixes = blocks.split(",") if isinstance(blocks, str) else _strings(blocks)
            inside = not prefixes or any(module.startswith(p.strip()) for p in prefixes)
            return "quantized" if module in said.extra or inside else "plain"
        case _:
            return "unsaid"


def group_of(said: Said, module: str) -> Mapping[str, Any]:
    """Keys of the configuration that describe a module's weight; for compressed-tensors also `input_activations`."""
    block = said.block
    match said.method:
        case "compressed-tensors":
            group = _ct_group(said, module)
            return (
                {**_table(group.get("weights")), "input_activations": group.get("input_activations")} if group else {}
            )
        case "gptq":
            rule = gptq_rule(block, module)
            return {**block, **_table(_table(block.get("dynamic")).get(rule or ""))}
        case "auto-round":
            own = said.extra.get(module)
            if own is None:
                own = next((v for p, v in said.extra_patterns if p.search(module)), None)
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


def _ct_group(said: Said, module: str) -> Mapping[str, Any] | None:
    """Names win over the class, as vLLM matches."""
    found = next(_ct_places(said, module), said.target_names.get("Linear"))
    return None if found is None else said.targets[found][1]


def _ct_places(said: Said, module: str) -> Iterator[int]:
    """Where the first target stands that names a module, by itself or by an expression."""
    named = said.target_names.get(module, len(said.targets))
    yield from (n for p, n in said.target_patterns if n < named and p.match(module))
    if named < len(said.targets):
        yield named


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
