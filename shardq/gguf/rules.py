"""What becomes of single source tensors: which rows go where, by name, shape and parameters."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from shardq.errors import UnsupportedSource
from shardq.gguf.parameters import Parameters
from shardq.gguf.tensors import Part, SourceTensor
from shardq.regrouping import Regrouping


@dataclass(frozen=True, slots=True)
class Piece:
    """What one or several source tensors become, under a name that the map of names has."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    added: float = 0.0
    negative_exp: bool = False
    type: Literal["F32", "MXFP4"] | None = None


# Of a source tensor under its plain name: its pieces; None where the rule does not concern it.
Rule = Callable[[str, SourceTensor, Parameters], tuple[Piece, ...] | None]


def whole(name: str, source: SourceTensor) -> Piece:
    """A tensor as it is: one part, or one for each slice of a stack. Raises UnsupportedSource."""
    if not 1 <= len(source.shape) <= 3:
        raise UnsupportedSource(f"tensor {source.name} has shape {list(source.shape)}, expected 1 to 3 axes")
    if len(source.shape) == 3:
        return Piece(name, source.shape, sliced(source, range(source.shape[1])))
    return Piece(name, source.shape, (Part(source.name, range(source.shape[0])),))


def sliced(source: SourceTensor, rows: range, columns: range | None = None, turned: bool = False) -> tuple[Part, ...]:
    """The same part of each slice of a stack."""
    return tuple(Part(source.name, rows, number, columns=columns, turned=turned) for number in range(source.shape[0]))


def rotary(name: str, source: SourceTensor, parameters: Parameters) -> tuple[Piece, ...] | None:
    """Queries and keys for llama.cpp's kind of rope.

    There neighbours rotate against each other, in Hugging Face's the two halves of a head. Source: llama.cpp as in
    llama-cpp-python 0.3.36, `LlamaModel.permute`.
    """
    if name.endswith(("q_proj.weight", "q_proj.bias")):
        heads = parameters.count("n_heads", "num_attention_heads")
    elif name.endswith(("k_proj.weight", "k_proj.bias")):
        heads = parameters.find("n_kv_heads", "num_key_value_heads") or parameters.count(
            "n_heads", "num_attention_heads"
        )
    else:
        return None
    piece = whole(name, source)
    if len(piece.parts) != 1 or source.shape[0] % (2 * heads):
        raise UnsupportedSource(
            f"tensor {source.name} has shape {list(source.shape)}: {heads} heads need a multiple of {2 * heads} rows"
        )
    order = Regrouping(heads, 2, source.shape[0] // heads // 2)
    return (replace(piece, parts=(replace(piece.parts[0], order=order),)),)


def norm_plus_one(name: str, source: SourceTensor, _: Parameters) -> tuple[Piece, ...] | None:
    """Gemma's norms, which multiply by one more than their weight."""
    return (replace(whole(name, source), added=1.0),) if name.endswith("norm.weight") else None


def without_head(name: str, _: SourceTensor, __: Parameters) -> tuple[Piece, ...] | None:
    """Gemma's head is its embedding; a copy of it is left out."""
    return () if name == "lm_head.weight" else None


def known_tokens(name: str, source: SourceTensor, parameters: Parameters) -> tuple[Piece, ...] | None:
    """Gemma 3's embedding without the rows behind the vocabulary."""
    if "embed_tokens.weight" not in name or parameters.token_rows is None:
        return None
    rows = min(parameters.token_rows, source.shape[0])
    return (Piece(name, (rows, *source.shape[1:]), (Part(source.name, range(rows)),)),)


def halved_stack(name: str, source: SourceTensor, _: Parameters) -> tuple[Piece, ...] | None:
    """Stacks of all experts: `gate_up_proj` [experts, gate rows then up rows, columns], and `down_proj`."""
    stem = name.removesuffix(".weight")
    if stem.endswith("mlp.experts.down_proj"):
        return (whole(f"{stem}.weight", source),)
    if not stem.endswith("mlp.experts.gate_up_proj"):
        return None
    if len(source.shape) != 3 or source.shape[1] % 2:
        raise UnsupportedSource(f"tensor {source.name} has shape {list(source.shape)}, expected gate and up rows")
    count, rows, columns = source.shape
    half = rows // 2
    base = stem.removesuffix(".gate_up_proj")
    return tuple(
        Piece(f"{base}.{projection}.weight", (count, half, columns), sliced(source, lines))
        for projection, lines in (("gate_proj", range(half)), ("up_proj", range(half, rows)))
    )
