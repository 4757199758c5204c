"""What mlx-lm 0.32.2 makes of a checkpoint's names (`sanitize` of its models), as far as it concerns quantized modules.

Its models keep the experts of a layer in one stack, and stack `.weight` only while they load: what is quantized has to
be written stacked. Some rename, split or rescale other weights by name, which codes do not survive; these must be kept
in source precision, and a family where that is every weight is refused, as is one that mlx-lm does not know.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shardq.errors import LayoutRefuses
from shardq.layouts.base import Place

READER: Final = "mlx-lm 0.32.2"
_EXPERT: Final = re.compile(r"^(.*?)([^.]+\.experts)\.(\d+)\.([^.]+)$")
_COUNTS: Final = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")  # keys of config.json


@dataclass(frozen=True, slots=True)
class Stacking:
    """Where the experts of a layer go: `<layer>.<source>.<number>.<projection>` -> `<layer>.<stack>.<new name>`."""

    source: str
    stack: str
    projections: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """Modules that must stay in source precision; `pattern` is searched in their names."""

    pattern: str
    reason: str
    when: str = ""  # key of config.json that must be true for it


@dataclass(frozen=True, slots=True)
class Family:
    """How mlx-lm loads some model types."""

    model_types: tuple[str, ...]
    stacking: Stacking | None = None  # None: no model of the family has experts with tensors of their own
    kept: tuple[Kept, ...] = ()
    refusal: str = ""  # why nothing of it can be quantized


_SAME: Final = (("gate_proj", "gate_proj"), ("up_proj", "up_proj"), ("down_proj", "down_proj"))
_NUMBERED: Final = (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
_SWITCH: Final = Stacking("mlp.experts", "mlp.switch_mlp", _SAME)
_EXPERTS: Final = Stacking("mlp.experts", "mlp.experts", _SAME)
_SPARSE: Final = Stacking("block_sparse_moe.experts", "block_sparse_moe.switch_mlp", _NUMBERED)
_SPARSE_TO_MLP: Final = Stacking("block_sparse_moe.experts", "mlp.switch_mlp", _NUMBERED)
_FEED_FORWARD: Final = Stacking("feed_forward.experts", "feed_forward.switch_mlp", _SAME)
_FEED_FORWARD_NUMBERED: Final = Stacking("feed_forward.experts", "feed_forward.switch_mlp", _NUMBERED)
_MIXER: Final = Stacking("mixer.experts", "mixer.switch_mlp", (("up_proj", "fc1"), ("down_proj", "fc2")))

_KV_B: Final = Kept(r"\.kv_b_proj$", "splits it and would quantize the halves a second time")
_ROUTER: Final = Kept(r"\.(gate|router)$", "renames its weight but not its scales")
_SCALED_HEAD: Final = Kept(r"^lm_head$", "normalizes its rows", when="norm_head")

FAMILIES: Final = (
    Family(  # no more than prefixes, drops and transposed convolutions; stacks that a checkpoint has stay as they are
        (
            "apertus", "cohere", "cohere2", "dbrx", "ernie4_5", "exaone", "exaone4", "falcon_mamba", "gear", "gemma",
            "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma4", "gemma4_text", "gemma4_unified", "glm", "glm4",
            "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "helium",
            "hunyuan_v1_dense", "internlm2", "internlm3", "iquestcoder", "iquestloopcoder", "lfm2", "lfm2-vl",
            "lille-130m", "llama", "llama4", "llama4_text", "llava", "mamba", "mamba2", "mimo", "minicpm3",
            "ministral3", "mistral", "mistral3", "muse_glimmer", "nanbeige", "nanochat", "nemotron", "nemotron-nas",
            "olmo", "olmo2", "olmo3", "olmo_hybrid", "openelm", "phi", "phi3", "phi3small", "pixtral", "plamo",
            "plamo2", "plamo3", "qwen", "qwen2", "qwen2_5_vl", "qwen2_vl", "qwen3", "qwen3_5", "qwen3_5_moe",
            "qwen3_vl", "qwen3_vl_moe", "recurrent_gemma", "seed_oss", "smollm3", "spark2_5", "stablelm",
            "starcoder2", "talkie", "telechat3", "xverse", "youtu_llm",
        )
    ),
    Family(
        (
            "deepseek", "deepseek_v2", "ernie4_5_moe", "exaone_moe", "glm4_moe", "hunyuan", "mellum", "mimo_v2_flash",
            "olmoe", "qwen2_moe", "qwen3_moe", "solar_open",
        ),
        _SWITCH,
    ),
    Family(("Klear", "afmoe", "dots1"), _EXPERTS),
    Family(("minimax", "minimax_m2", "minimax_m3_vl", "mixtral", "phimoe"), _SPARSE),
    Family(("jamba",), _FEED_FORWARD),
    Family(("nemotron_h",), _MIXER),
    Family(
        (
            "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "joyai_llm_flash", "kimi_k2", "kimi_k25",
            "longcat_flash", "mistral4",
        ),
        _SWITCH,
        (_KV_B,),
    ),
    Family(
        ("longcat_flash_ngram",),
        _SWITCH,
        (_KV_B, Kept(r"^model\.embed_tokens$", "renames its weight but not its scales")),
    ),
    Family(("bailing_moe", "bailing_moe_linear"), _SWITCH, (_ROUTER, _SCALED_HEAD)),
    Family(("bailing_hybrid", "bailing_moe_v3"), _SWITCH, (_ROUTER, _KV_B)),
    Family(("laguna",), _SWITCH, (_ROUTER,)),
    Family(
        ("kimi_linear",),
        _SPARSE_TO_MLP,
        (_ROUTER, _KV_B, Kept(r"\.block_sparse_moe\.shared_experts\.", "renames their weights but not their scales")),
    ),
    Family(
        ("lfm2_moe",),
        _FEED_FORWARD_NUMBERED,
        (Kept(r"\.feed_forward\.w[123]$", "renames their weights but not their scales"),),
    ),
    Family(("granitemoehybrid",), kept=(Kept(r"\.shared_mlp\.\w+_linear$", "splits and renames their weights only"),)),
    Family(("baichuan_m1",), kept=(Kept(r"^lm_head$", "normalizes its rows unless it is quantized"),)),
    Family(("minicpm",), kept=(Kept(r"^model\.embed_tokens$", "copies its weight into a head without scales"),)),
    Family(("falcon_h1",), refusal="multiplies weights by factors of the config"),
    Family(("qwen3_next",), refusal="adds 1 to the norms only of a checkpoint whose experts are not stacked"),
    Family(("step3p5",), refusal="adds 1 to the norms only of a checkpoint whose experts have their old names"),
    Family(("kimi_vl",), refusal="does not split kv_b_proj, without which its model does not load"),
    Family(("phi-msft", "phixtral"), refusal="stacks biases only together with plain weights"),
    Family(("bitnet",), refusal="knows ternary weights only"),
    Family(
        ("afm7", "deepseek_v41", "deepseek_v41_text", "kimi_k3", "muse_spark", "prism_hadamard_qwen35", "rwkv7"),
        refusal="rebuilds too much of it while it loads",
    ),
)  # fmt: skip
# Beginnings of module names, and what mlx-lm's models make of them: some of these may be right for a module.
_PREFIXES: Final = (
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "model."),
    ("language_model.", ""),
    ("gpt_neox.layers.", "model.h."),
    ("gpt_neox.", "model."),
    ("transformer.", "model."),
    ("", "model."),
    ("", "language_model."),
)


def find_places(modules: Sequence[str], config: Mapping[str, Any] | None) -> dict[str, Place]:
    """Expert module -> its slice of a stack, for those of the quantized `modules` that are experts.

    Raises LayoutRefuses where mlx-lm would not load the result, or would load it wrong.
    """
    family = _find_family(config)
    places: dict[str, Place] = {}
    for module in modules:
        for kept in family.kept:
            if re.search(kept.pattern, module) and (not kept.when or (config or {}).get(kept.when)):
                raise LayoutRefuses(
                    f"layout mlx cannot hold {module}: {READER} {kept.reason} when it loads; keep it with "
                    f"--ignore 're:.*{kept.pattern.lstrip('^')}'"
                )
        expert = _EXPERT.match(module)
        if expert is None:
            continue
        stacks = [] if family.stacking is None else list(_stack_names(module, family.stacking))
        if not stacks:
            raise LayoutRefuses(
                f"layout mlx cannot hold {module}: how {READER} stacks such experts is unknown; keep them with --ignore"
            )
        places[module] = Place(stacks[0], int(expert[3]), 0)
    return _count(places, family, config or {})


def module_paths(module: str) -> tuple[str, ...]:
    """Names that a module has in a configuration: its own, or those of the stacks that an expert may lie in."""
    stackings = {f.stacking: None for f in FAMILIES if f.stacking is not None}
    return tuple(dict.fromkeys(n for s in stackings for n in _stack_names(module, s))) or (module,)


def reader_paths(module: str) -> tuple[str, ...]:
    """`module_paths` and what mlx-lm's models may call the same modules."""
    own = module_paths(module)
    renamed = (new + p.removeprefix(old) for p in own for old, new in _PREFIXES if p.startswith(old))
    return tuple(dict.fromkeys((*own, *renamed)))


def _find_family(config: Mapping[str, Any] | None) -> Family:
    name = (config or {}).get("model_type")
    family = next((f for f in FAMILIES if name in f.model_types), None)
    if family is None:
        raise LayoutRefuses(
            f"layout mlx: model type {name!r} of config.json is none that {READER} is known to load; choose another "
            "--format"
        )
    if family.refusal:
        raise LayoutRefuses(f"layout mlx cannot hold {name} models: {READER} {family.refusal}; choose another --format")
    return family


def _stack_names(module: str, stacking: Stacking) -> Iterator[str]:
    expert = _EXPERT.match(module)
    if expert is not None and expert[2] == stacking.source:
        yield from (f"{expert[1]}{stacking.stack}.{new}" for old, new in stacking.projections if old == expert[4])


def _count(places: Mapping[str, Place], family: Family, config: Mapping[str, Any]) -> dict[str, Place]:
    """`places` with the sizes of their stacks, which must be whole, and whole layers."""
    found: dict[str, set[int]] = {}
    for place in places.values():
        found.setdefault(place.module, set()).add(place.index)
    wanted = next((c[k] for c in _tables(config) for k in _COUNTS if isinstance(c.get(k), int)), None)
    for stack, indices in found.items():
        size = wanted or max(indices) + 1
        if indices != set(range(size)):
            raise LayoutRefuses(
                f"layout mlx: {stack} needs all {size} experts, {len(indices)} are to be quantized; quantize or keep "
                "all experts of a layer alike"
            )
        layer = stack.rpartition(".")[0]
        missing = [
            n for _, n in (family.stacking.projections if family.stacking else ()) if f"{layer}.{n}" not in found
        ]
        if missing:
            raise LayoutRefuses(
                f"layout mlx: {stack} is to be quantized, but not {', '.join(missing)} beside it; quantize or keep all "
                "projections of a layer's experts alike"
            )
    return {m: Place(p.module, p.index, len(found[p.module])) for m, p in places.items()}


def _tables(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    yield from (v for v in config.values() if isinstance(v, Mapping))
