"""The architectures that shardq writes as GGUF: one row for each, nothing by default.

Source: llama.cpp as in llama-cpp-python 0.3.36, the classes that convert_hf_to_gguf.py registers for the same names.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from shardq.errors import UnsupportedSource
from shardq.gguf.common_pairs import add_common
from shardq.gguf.computed import llama3_factors, long_factors, no_tensors
from shardq.gguf.family_pairs import (
    add_deepseek2,
    add_gemma2,
    add_gemma3,
    add_glm4_moe,
    add_gpt_oss,
    add_llama,
    add_minimax_m2,
    add_phi3,
    add_phi3_stretch,
    add_qwen35,
    add_qwen_moe,
    add_qwen_next,
)
from shardq.gguf.names import block_of
from shardq.gguf.pairs import Pairs
from shardq.gguf.parameters import MAX_BLOCKS, Parameters
from shardq.gguf.rules import Rule, halved_stack, known_tokens, norm_plus_one, rotary, without_head
from shardq.gguf.rules_latent import absorbed_keys, without_further_layers, without_tied_head
from shardq.gguf.rules_linear import further_name, grouped_projections, tiled_values
from shardq.gguf.rules_oss import oss_experts, sinks
from shardq.gguf.tensors import OutputTensor

# Which tokenizer files count, and what is added to their vocabulary: see vocabulary.py.
Vocabulary = Literal["llama", "bpe", "either", "gemma2", "gemma3", "phi3", "glm"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """One of GGUF's architectures, as one or several classes of transformers have it."""

    name: str  # `general.architecture`
    classes: tuple[str, ...]  # `architectures` in config.json
    vocabulary: Vocabulary
    add_pairs: Callable[[Pairs, Parameters, int, int], None]  # to pairs, of blocks, for a file type
    rules: tuple[Rule, ...] = ()  # the first that concerns a tensor has it; else it goes over as it is
    add_first: Callable[[Pairs, Parameters], None] | None = None  # what the converter writes before everything else
    computed: Callable[[Parameters], tuple[OutputTensor, ...]] = no_tensors
    expert_order: tuple[str, ...] = ()  # projections of single experts, in the order of their stacks
    expert_base: str = "model.layers.{block}.mlp.experts"
    experts_key: tuple[str, ...] = ("num_local_experts", "num_experts")
    further_key: str = ""  # how many blocks behind the last one predict further tokens, where they are kept
    further_name: Callable[[str, Parameters], str] | None = None  # of a plain name, where such blocks have other names

    def blocks(self, parameters: Parameters, names: Iterable[str]) -> int:
        """Blocks of the file. Of those that predict further tokens its tensors tell, of which these are the plain names
        or GGUF's, where their names are other ones and the config does not."""
        further = parameters.further_blocks(self.further_key) if self.further_key else 0
        if not further and self.further_name:
            behind = max((block for name in names if (block := block_of(name)) is not None), default=0) + 1
            further = min(max(0, behind - parameters.blocks), MAX_BLOCKS)
        return parameters.blocks + further

    def experts(self, parameters: Parameters) -> int:
        """Experts of a layer. Raises UnsupportedSource."""
        return parameters.count(*self.experts_key)


QWEN_EXPERTS: Final = ("down_proj", "gate_proj", "up_proj")
QWEN_FURTHER: Final = "mtp_num_hidden_layers"

ARCHITECTURES: Final[tuple[Architecture, ...]] = (
    Architecture(
        "llama",
        ("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"),
        "llama",
        add_llama,
        (rotary,),
        computed=llama3_factors,
        expert_order=("w1", "w2", "w3"),
        expert_base="layers.{block}.feed_forward.experts",
    ),
    Architecture("qwen2", ("Qwen2ForCausalLM",), "either", add_common),
    Architecture("qwen3", ("Qwen3ForCausalLM",), "either", add_common),
    Architecture("qwen2moe", ("Qwen2MoeForCausalLM",), "bpe", add_qwen_moe, (halved_stack,), expert_order=QWEN_EXPERTS),
    Architecture("qwen3moe", ("Qwen3MoeForCausalLM",), "bpe", add_qwen_moe, (halved_stack,), expert_order=QWEN_EXPERTS),
    Architecture(
        "qwen3next",
        ("Qwen3NextForCausalLM",),
        "bpe",
        add_qwen_next,
        (grouped_projections, halved_stack),
        expert_order=QWEN_EXPERTS,
        further_key=QWEN_FURTHER,
        further_name=further_name,
    ),
    Architecture(
        "qwen35",
        ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
        "bpe",
        add_qwen35,
        (tiled_values,),
        further_key=QWEN_FURTHER,
        further_name=further_name,
    ),
    Architecture(
        "qwen35moe",
        ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
        "bpe",
        add_qwen35,
        (tiled_values, halved_stack),
        expert_order=QWEN_EXPERTS,
        further_key=QWEN_FURTHER,
        further_name=further_name,
    ),
    Architecture("gemma2", ("Gemma2ForCausalLM",), "gemma2", add_gemma2, (norm_plus_one, without_head)),
    Architecture(
        "gemma3",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        "gemma3",
        add_gemma3,
        (known_tokens, norm_plus_one),
    ),
    Architecture("phi3", ("Phi3ForCausalLM",), "phi3", add_phi3, add_first=add_phi3_stretch, computed=long_factors),
    Architecture(
        "deepseek2",
        ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
        "bpe",
        add_deepseek2,
        (without_tied_head, without_further_layers, absorbed_keys),
        expert_order=QWEN_EXPERTS,
        experts_key=("n_routed_experts",),
    ),
    Architecture(
        "glm4moe",
        ("Glm4MoeForCausalLM",),
        "glm",
        add_glm4_moe,
        expert_order=QWEN_EXPERTS,
        experts_key=("n_routed_experts",),
        further_key="num_nextn_predict_layers",
    ),
    Architecture(
        "minimax-m2",
        ("MiniMaxM2ForCausalLM",),
        "bpe",
        add_minimax_m2,
        expert_order=("w1", "w2", "w3"),
        expert_base="model.layers.{block}.block_sparse_moe.experts",
    ),
    Architecture("gpt-oss", ("GptOssForCausalLM",), "bpe", add_gpt_oss, (sinks, oss_experts)),
)
BY_CLASS: Final = {name: arch for arch in ARCHITECTURES for name in arch.classes}


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """The row for a config.json. Raises UnsupportedSource, with the names that are known."""
    text = config.get("text_config")
    inner = text.get("architectures") if isinstance(text, Mapping) else None
    names = inner or config.get("architectures") or ()
    name = str(names[0]) if names else ""
    if name not in BY_CLASS:
        found = f"architecture {name[:80]!a}" if name else "no architectures"
        raise UnsupportedSource(f"config.json names {found}; GGUF is written for {', '.join(sorted(BY_CLASS))}")
    return BY_CLASS[name]
