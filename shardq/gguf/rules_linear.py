"""Rules of Qwen 3 Next and Qwen 3.5: layers of linear attention (gated delta nets), and layers that predict further
tokens.

Source: llama.cpp as in llama-cpp-python 0.3.36, `Qwen3NextModel`, `_LinearAttentionVReorderBase` and `_QwenMtpMixin`.
"""

import re
from dataclasses import dataclass, replace
from typing import Final

from shardq.errors import UnsupportedSource
from shardq.gguf.parameters import Parameters
from shardq.gguf.rules import Piece, whole
from shardq.gguf.tensors import Part, SourceTensor
from shardq.regrouping import Regrouping

FURTHER_LAYER: Final = re.compile(r"(?:model\.)?mtp\.layers\.(\d+)\.(.+)")
FURTHER_END: Final = re.compile(r"(?:model\.)?mtp\.(fc|pre_fc_norm_embedding|pre_fc_norm_hidden|norm)\.(\w+)")
FURTHER_ENDS: Final = {
    "fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm", "norm": "shared_head.norm",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Heads:
    """Of linear attention; several values share a key."""

    keys: int
    values: int
    key_rows: int  # of one
    value_rows: int

    @property
    def before_values(self) -> int:
        """Rows of queries and keys."""
        return 2 * self.keys * self.key_rows

    def order(self, rows: int) -> Regrouping:
        """Values of a head of keys, one after the other, become the first of every head, the second of every head, and
        so on: that is how ggml repeats keys. `rows` are those of a value."""
        return Regrouping(1, self.keys, self.values // self.keys, rows)


def further_name(name: str, parameters: Parameters) -> str:
    """A plain name; that of a layer that predicts further tokens as one behind the last."""
    if layer := FURTHER_LAYER.fullmatch(name):
        return f"model.layers.{parameters.blocks + int(layer[1])}.{layer[2]}"
    if end := FURTHER_END.fullmatch(name):
        return f"model.layers.{parameters.blocks}.{FURTHER_ENDS[end[1]]}.{end[2]}"
    return name


def linear_state(name: str, source: SourceTensor, _: Parameters) -> tuple[Piece, ...] | None:
    """Decays as what the state is multiplied by, a kernel without its axis of one, and norms, which multiply by one
    more than their weight, but that of linear attention, which does not."""
    if name.endswith(".A_log"):
        return (replace(whole(name, source), negative_exp=True),)
    if name.endswith(".dt_bias"):
        return (whole(f"{name.removesuffix('.dt_bias')}.dt_proj.bias", source),)
    if "conv1d" in name:
        return (_squeezed(name, source),)
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return (replace(whole(name, source), added=1.0),)
    return None


def tiled_values(name: str, source: SourceTensor, parameters: Parameters) -> tuple[Piece, ...] | None:
    """Qwen 3.5: heads of values in the order that ggml repeats keys in, where there are more of them than of keys."""
    heads = _heads(parameters) if "linear_attn." in name else None
    if heads is None or heads.keys == heads.values:
        return linear_state(name, source, parameters)
    (piece,) = linear_state(name, source, parameters) or (whole(name, source),)
    if ".out_proj." in name:
        order = heads.order(heads.value_rows)
        return (replace(piece, parts=tuple(replace(part, column_order=order) for part in piece.parts)),)
    for inner, before, rows in (
        (".in_proj_qkv.", heads.before_values, heads.value_rows),
        (".conv1d", heads.before_values, heads.value_rows),
        (".in_proj_z.", 0, heads.value_rows),
        (".in_proj_a.", 0, 1),
        (".in_proj_b.", 0, 1),
        (".A_log", 0, 1),
        (".dt_bias", 0, 1),
    ):
        if inner in name:
            return (_tiled(piece, source, before, heads.order(rows)),)
    return (piece,)


def grouped_projections(name: str, source: SourceTensor, parameters: Parameters) -> tuple[Piece, ...] | None:
    """Qwen 3 Next: `in_proj_qkvz`, [heads of keys, (query, key, its values, their gates)], as heads of queries, then of
    keys, then of values; and all gates."""
    if "in_proj_qkvz.weight" not in name:
        return linear_state(name, source, parameters)
    heads = _heads(parameters)
    if heads is None:
        raise UnsupportedSource(f"tensor {source.name}: config.json has no heads of linear attention")
    each = heads.values // heads.keys * heads.value_rows
    step = 2 * (heads.key_rows + each)
    if len(source.shape) != 2 or source.shape[0] != heads.keys * step:
        raise UnsupportedSource(
            f"tensor {source.name} has shape {list(source.shape)}, expected {heads.keys} heads of {step} rows"
        )
    columns, parts, at = source.shape[1], [], 0
    for rows in (heads.key_rows, heads.key_rows, each, each):
        starts = range(at, heads.keys * step, step)
        parts.append(tuple(Part(source.name, range(start, start + rows)) for start in starts))
        at += rows
    queries, keys, values, gates = parts
    mixed = heads.before_values + heads.keys * each
    return (
        Piece(name.replace("in_proj_qkvz", "in_proj_qkv"), (mixed, columns), (*queries, *keys, *values)),
        Piece(name.replace("in_proj_qkvz", "in_proj_z"), (heads.keys * each, columns), gates),
    )


def _heads(parameters: Parameters) -> _Heads | None:
    """None where there is no linear attention. Raises UnsupportedSource."""
    if not (parameters.find("linear_num_key_heads") and parameters.find("linear_num_value_heads")):
        return None
    keys, values = parameters.count("linear_num_key_heads"), parameters.count("linear_num_value_heads")
    key_rows, value_rows = parameters.count("linear_key_head_dim"), parameters.count("linear_value_head_dim")
    if min(keys, values, key_rows, value_rows) < 1 or values % keys:
        raise UnsupportedSource(
            f"config.json: {values} heads of {value_rows} for values and {keys} of {key_rows} for keys of linear "
            "attention, expected a multiple of them"
        )
    return _Heads(keys, values, key_rows, value_rows)


def _squeezed(name: str, source: SourceTensor) -> Piece:
    """A kernel [channels, 1, taps] as [channels, taps]; its part are elements where it is no matrix."""
    shape = tuple(size for size in source.shape if size != 1)
    if len(shape) != 2:
        raise UnsupportedSource(f"tensor {source.name} has shape {list(source.shape)}, expected [channels, 1, taps]")
    rows = shape[0] if len(source.shape) == 2 else shape[0] * shape[1]
    return Piece(name, shape, (Part(source.name, range(rows)),))


def _tiled(piece: Piece, source: SourceTensor, before: int, order: Regrouping) -> Piece:
    """`piece`, which has one part, with what is behind `before` rows in another order. Raises UnsupportedSource."""
    (part,) = piece.parts
    each = len(part.rows) // piece.shape[0]  # elements of a row, of what is no matrix
    order = replace(order, inner=order.inner * each)
    if before * each + order.size != len(part.rows):
        raise UnsupportedSource(
            f"tensor {source.name} has shape {list(source.shape)}: expected {before + order.size // each} rows, as "
            "config.json has heads of linear attention"
        )
    first, rest = part.rows[: before * each], part.rows[before * each :]
    parts = (replace(part, rows=first), replace(part, rows=rest, order=order))
    return replace(piece, parts=parts if before else parts[1:])
