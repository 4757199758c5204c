"""Rules of DeepSeek's attention over latent vectors, and of what its files have beside the model.

Source: llama.cpp as in llama-cpp-python 0.3.36, `DeepseekV2Model.modify_tensors`.
"""

import re
from typing import Final

from shardq.errors import UnsupportedSource
from shardq.gguf.parameters import Parameters
from shardq.gguf.rules import Piece
from shardq.gguf.tensors import Part, SourceTensor

LAYER: Final = re.compile(r"model.layers.(\d+)")


def absorbed_keys(name: str, source: SourceTensor, parameters: Parameters) -> tuple[Piece, ...] | None:
    """`kv_b_proj`, [heads of (keys then values), latent], as [head, latent, key] and [head, value, latent]."""
    if not name.endswith("kv_b_proj.weight"):
        return None
    heads = parameters.count("num_key_value_heads")
    keys, values = parameters.count("qk_nope_head_dim"), parameters.count("v_head_dim")
    step = keys + values
    if len(source.shape) != 2 or source.shape[0] != heads * step:
        raise UnsupportedSource(
            f"tensor {source.name} has shape {list(source.shape)}, expected {heads} heads of {keys} + {values} rows"
        )
    latent, starts = source.shape[1], range(0, heads * step, step)
    key_parts = tuple(Part(source.name, range(start, start + keys), turned=True) for start in starts)
    value_parts = tuple(Part(source.name, range(start + keys, start + step)) for start in starts)
    return (
        Piece(name.replace("kv_b_proj", "k_b_proj"), (heads, latent, keys), key_parts),
        Piece(name.replace("kv_b_proj", "v_b_proj"), (heads, values, latent), value_parts),
    )


def without_tied_head(name: str, _: SourceTensor, parameters: Parameters) -> tuple[Piece, ...] | None:
    """A copy of the embedding is left out."""
    tied = parameters.find("tie_word_embeddings") and name in ("lm_head.weight", "model.lm_head.weight")
    return () if tied else None


def without_further_layers(name: str, _: SourceTensor, parameters: Parameters) -> tuple[Piece, ...] | None:
    """Layers that predict further tokens are left out; llama.cpp does not run DeepSeek's."""
    layer = LAYER.match(name)
    return () if layer and int(layer[1]) >= parameters.blocks else None
