"""Small whole models: pieces of a checkpoint beside what they are in its twin, the same model without quantization.

A tensor's numbers depend on its name alone, so that models which store the same weights in two ways have equal twins.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final

import numpy as np
from encoded_codes import Encode, plain
from encoded_kinds import ROWS, Kind
from encoded_numbers import Stored, draw_singles, store_as
from numpy.random import Generator

HIDDEN, HEADS, KEYS, INNER, VOCABULARY, LAYERS = 256, 384, 192, 128, 96, 2  # outputs of q, and of k and v
HEAD: Final = 64


@dataclass(frozen=True)
class Piece:
    """Some tensors of a source, and what is in their place in the twin, F32 where they are encoded; nothing, if they
    are numbers that an unquantized model does not have."""

    source: Mapping[str, Stored]
    twin: Mapping[str, Stored]
    encoded: bool = False  # the twin's F32 stands for any type


@dataclass(frozen=True)
class Case:
    """A checkpoint that can be written."""

    id: str
    kinds: frozenset[str]  # of shardq.dequantize.KINDS; empty where only experts are stacked
    config: Mapping[str, Any]
    pieces: Callable[[], Iterator[Piece]]
    dtype: str = "BF16"  # what readers make of encoded weights, and the type of the others
    side_files: Mapping[str, Any] = field(default_factory=dict)  # of the source alone: name -> JSON


def rng_of(name: str) -> Generator:
    """The numbers of a tensor."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def keep(name: str, *shape: int, dtype: str = "BF16", around: float = 0.0) -> Piece:
    """A tensor that both have."""
    values = around + rng_of(name).standard_normal(shape) * 0.02
    stored = {name: store_as(values.astype(np.float32), dtype)}
    return Piece(stored, stored)


def gain(name: str, size: int, dtype: str = "BF16") -> Piece:
    """The weight of a norm."""
    return keep(f"{name}.weight", size, dtype=dtype, around=1.0)


def lone(name: str) -> Piece:
    """A number that the twin does not have."""
    return Piece({name: draw_singles(rng_of(name), ()).stored}, {})


def linear(module: str, rows: int, columns: int, encode: Encode = plain) -> Piece:
    """A Linear weight."""
    made = encode(rng_of(module), rows, columns)
    stored = {module + suffix: t for suffix, t in made.parts.items()}
    return Piece(stored, {f"{module}.weight": made.twin}, made.encoded)


def linears(prefix: str, shapes: Mapping[str, tuple[int, int]], encode: Encode = plain) -> Iterator[Piece]:
    """Some of them."""
    return (linear(f"{prefix}.{name}", *shape, encode) for name, shape in shapes.items())


def mlp(prefix: str, hidden: int, inner: int, encode: Encode = plain) -> Iterator[Piece]:
    """gate, up and down."""
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return linears(prefix, shapes, encode)


def attention(prefix: str, hidden: int, encode: Encode = plain) -> Iterator[Piece]:
    """q, k, v and o."""
    shapes = {"q_proj": (HEADS, hidden), "k_proj": (KEYS, hidden), "v_proj": (KEYS, hidden), "o_proj": (hidden, HEADS)}
    return linears(prefix, shapes, encode)


def ends(hidden: int, prefix: str = "model", dtype: str = "BF16") -> Iterator[Piece]:
    """What stands before and behind the layers."""
    yield keep(f"{prefix}.embed_tokens.weight", VOCABULARY, hidden, dtype=dtype)
    yield gain(f"{prefix}.norm", hidden, dtype)
    yield keep("lm_head.weight", VOCABULARY, hidden, dtype=dtype)


def norms(layer: str, hidden: int, dtype: str = "BF16") -> Iterator[Piece]:
    """Those of a layer."""
    yield gain(f"{layer}.input_layernorm", hidden, dtype)
    yield gain(f"{layer}.post_attention_layernorm", hidden, dtype)


def settings(architecture: str, model_type: str, hidden: int, inner: int, **more: Any) -> dict[str, Any]:
    """What every config.json says."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS // HEAD,
        "num_key_value_heads": KEYS // HEAD,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **more,
    }


# --- a dense model of each kind ------------------------------------------------------------------------------------


def dense(kind: Kind) -> Iterator[Piece]:
    """A Llama: 192 rows of keys are a block of 128 and a half."""
    for layer in (f"model.layers.{n}" for n in range(LAYERS)):
        yield from attention(f"{layer}.self_attn", HIDDEN, kind.encode)
        yield from mlp(f"{layer}.mlp", HIDDEN, INNER, kind.encode)
        yield from norms(layer, HIDDEN, kind.dtype)
        yield from (lone(f"{layer}.{name}") for name in kind.loose)
    yield from ends(HIDDEN, dtype=kind.dtype)


def dense_case(kind: Kind) -> Case:
    """The whole of it."""
    said = {**kind.config, "torch_dtype": {"BF16": "bfloat16", "F16": "float16"}[kind.dtype]}
    config = settings("LlamaForCausalLM", "llama", HIDDEN, INNER, **said)
    return Case(kind.id, frozenset({kind.kind}), config, lambda: dense(kind), kind.dtype, kind.side_files)


DENSE: Final = tuple(dense_case(kind) for kind in ROWS)


def build(case: Case) -> tuple[Piece, ...]:
    """All pieces of a case; none has a name that another has."""
    made = tuple(case.pieces())
    for names in (chain.from_iterable(p.source for p in made), chain.from_iterable(p.twin for p in made)):
        listed = list(names)
        assert len(set(listed)) == len(listed), case.id
    return made
