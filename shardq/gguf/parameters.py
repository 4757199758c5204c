"""A config.json as llama.cpp's converter sees it: with transformers' defaults, the text model's keys on top, one rope.

Source: llama.cpp as in llama-cpp-python 0.3.36 (`ModelBase.load_hparams`, `TextModel.__init__`), and the config classes
of transformers 5.23.0 (`RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`, `standardize_rope_params`).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from shardq.errors import UnsupportedSource
from shardq.gguf.config_defaults import CONFIG_TYPES, FULL_EVERY, ConfigType

THETA: Final = ("global_rope_theta", "rope_global_theta", "rope_theta_global", "rope_theta", "rotary_emb_base")
LOCAL_THETA: Final = (
    "local_rope_theta", "rope_local_theta", "rope_theta_local", "swa_rope_theta", "rope_local_base_freq",
)  # fmt: skip
PARTIAL: Final = ("partial_rotary_factor", "rope_pct", "rope_percent")
BLOCKS: Final = ("n_layers", "num_hidden_layers", "n_layer", "num_layers")
WITH_TEXT: Final = ("gemma3", "qwen3_5", "qwen3_5_moe")  # model types around a text model, of those in architectures.py
NEVER_NULL: Final = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "num_experts", "num_local_experts",
    "n_routed_experts", "n_shared_experts", "moe_intermediate_size", "shared_expert_intermediate_size", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "routed_scaling_factor", "linear_conv_kernel_dim",
    "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads",
)  # fmt: skip
MAX_BLOCKS: Final = 1 << 12  # ours, and far above all models, as is the next: what memory is spent on
MAX_TOKENS: Final = 1 << 24
LAYER_TYPES: Final = ("full_attention", "linear_attention")
STRETCHED: Final = ("llama3", "yarn", "longrope")  # rope types that know the context of pretraining


@dataclass(frozen=True, slots=True)
class Parameters:
    """The numbers of a model; `rope` is flat, or has `full_attention` and `sliding_attention`."""

    values: Mapping[str, Any]
    rope: Mapping[str, Any]
    token_rows: int | None = None  # rows of the embedding that are tokens, where an architecture cuts the others off

    def find(self, *keys: str) -> Any:
        """The value of the first key that is there, which may be null; None where none is."""
        return next((self.values[k] for k in keys if k in self.values), None)

    def need(self, *keys: str) -> Any:
        """The same, for what GGUF cannot be without. Raises UnsupportedSource."""
        found = self.find(*keys)
        if found is None:
            raise UnsupportedSource(f"config.json has no {' or '.join(keys)}, which GGUF metadata needs")
        return found

    def count(self, *keys: str) -> int:
        """The same, for a whole number. Raises UnsupportedSource."""
        found = self.need(*keys)
        if isinstance(found, bool) or not isinstance(found, int):
            raise UnsupportedSource(f"config.json: {keys[0]} is {str(found)[:80]!a}, expected a whole number")
        return found

    @property
    def blocks(self) -> int:
        """Transformer blocks, those for predicting further tokens not counted. Raises UnsupportedSource."""
        return self._limited(MAX_BLOCKS, *BLOCKS)

    def further_blocks(self, key: str) -> int:
        """Blocks behind those, of a key that may be missing or null. Raises UnsupportedSource."""
        return self._limited(MAX_BLOCKS, key) if self.find(key) is not None else 0

    @property
    def tokens(self) -> int:
        """Size of the vocabulary. Raises UnsupportedSource."""
        return self._limited(MAX_TOKENS, "vocab_size")

    def _limited(self, most: int, *keys: str) -> int:
        found = self.count(*keys)
        if not 0 <= found <= most:
            raise UnsupportedSource(f"config.json: {keys[0]} is {found}, expected a number from 0 to {most}")
        return found

    @property
    def full_rope(self) -> Mapping[str, Any]:
        """Rope of the layers that see everything."""
        found: Mapping[str, Any] = self.rope.get("full_attention", self.rope)
        return found


def read_parameters(config: Mapping[str, Any]) -> Parameters:
    """The parameters of a config.json. Raises UnsupportedSource."""
    values = _completed(config)
    text = config.get("text_config")
    if isinstance(text, Mapping):
        values = {**values, **(_completed(text) if config.get("model_type") in WITH_TEXT else text)}
    rope = copy.deepcopy(dict(values.get("rope_parameters", values.get("rope_scaling")) or {}))
    found = Parameters(values, rope)
    if "full_attention" in rope or "sliding_attention" in rope:
        return found
    if (local := found.find(*LOCAL_THETA)) is not None:
        rope["sliding_attention"] = {"rope_theta": local}
    for key, value in (
        ("rope_theta", found.find(*THETA)),
        ("rope_type", rope.get("type")),
        ("partial_rotary_factor", found.find(*PARTIAL)),
        ("original_max_position_embeddings", found.find("original_max_position_embeddings")),
    ):
        if value is not None:
            rope.setdefault(key, value)
    return found


def _completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with its type's defaults; as it is where the type has no row. Raises UnsupportedSource."""
    kind = CONFIG_TYPES.get(str(config.get("model_type")))
    if kind is None:
        return dict(config)
    given = {kind.aliases.get(key, key): value for key, value in config.items()}
    values = {**kind.defaults, **given}
    for key in NEVER_NULL:
        derived = (key == "num_key_value_heads" and kind.takes_heads) or (key == "head_dim" and kind.takes_head_dim)
        if key in kind.defaults and values[key] is None and not derived:
            raise UnsupportedSource(f"config.json: {key} is null, expected a value, or no such key")
    if kind.takes_heads and values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if kind.takes_head_dim and values.get("head_dim") is None:
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    if kind.head_dim_key:
        values["head_dim"] = values[kind.head_dim_key]
    if kind.linear and values.get("layer_types") is None:
        every, count = values.pop("full_attention_interval", FULL_EVERY), Parameters(values, {}).blocks
        values["layer_types"] = [LAYER_TYPES[bool((i + 1) % every)] for i in range(count)]
    values["rope_parameters"] = _rope(values, kind)
    for key in ("rope_scaling", "rope_theta", "partial_rotary_factor"):
        values.pop(key, None)  # they are in the rope parameters now
    return values


def _rope(values: Mapping[str, Any], kind: ConfigType) -> dict[str, Any]:
    if kind.by_layer:
        return _ropes_by_layer(values)
    rope = copy.deepcopy(dict(values.get("rope_scaling") or values.get("rope_parameters") or kind.rope))
    rope.setdefault("rope_theta", values.get("rope_theta", kind.rope_theta))
    partial = values.get("partial_rotary_factor", kind.partial_rotary)
    if partial is not None:
        rope.setdefault("partial_rotary_factor", partial)
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope["rope_type"] in STRETCHED:
        if "original_max_position_embeddings" in values:
            rope["original_max_position_embeddings"] = values["original_max_position_embeddings"]
        rope.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    rope["rope_type"] = kind.renames.get(rope["rope_type"], rope["rope_type"])
    return rope


def _ropes_by_layer(values: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 3's: a stretched one for layers that see everything, a plain one for those with a window."""
    rope = copy.deepcopy(dict(values.get("rope_parameters") or {}))
    for layers, key, theta in (
        ("full_attention", "rope_theta", 1000000.0),
        ("sliding_attention", "rope_local_base_freq", 10000.0),
    ):
        own = dict(rope.get(layers) or {"rope_type": "default"})
        if layers == "full_attention":
            own |= values.get("rope_scaling") or {}
        own.setdefault("rope_theta", values.get(key, theta))
        own.setdefault("rope_type", own.get("type", "default"))
        rope[layers] = own
    return rope
