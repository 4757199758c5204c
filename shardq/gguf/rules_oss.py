"""Rules of gpt-oss: stacks in which gate and up rows alternate, in MXFP4 or transposed in BF16, and biases likewise.

Source: llama.cpp as in llama-cpp-python 0.3.36, `GptOssModel`.
"""

from typing import Final

from shardq.errors import UnsupportedSource
from shardq.gguf.parameters import Parameters
from shardq.gguf.rules import Piece, sliced
from shardq.gguf.tensors import Part, SourceTensor

BLOCK: Final = 32  # weights of MXFP4 that share a scale


def sinks(name: str, source: SourceTensor, _: Parameters) -> tuple[Piece, ...] | None:
    """Sinks are a parameter without a suffix."""
    if not name.endswith("sinks"):
        return None
    return (Piece(f"{name}.weight", source.shape, (Part(source.name, range(source.shape[0])),)),)


def oss_experts(name: str, source: SourceTensor, _: Parameters) -> tuple[Piece, ...] | None:
    """What a tensor of experts becomes; scales go with their blocks. Raises UnsupportedSource."""
    stem, projection = name.rsplit(".", 1) if "." in name else ("", name)
    for kind, axes in (("_scales", 3), ("_blocks", 4), ("_bias", 2), ("", 3)):
        base = projection.removesuffix(kind) if projection.endswith(kind) else ""
        if base not in ("gate_up_proj", "down_proj"):
            continue
        if len(source.shape) != axes:
            raise UnsupportedSource(f"tensor {source.name} has shape {list(source.shape)}, expected {axes} axes")
        if kind == "_scales":
            return ()
        lines = source.shape[2] if kind == "" else source.shape[1]
        halves = {"down_proj": range(lines)}
        if base == "gate_up_proj":
            halves = {"gate_proj": range(0, lines, 2), "up_proj": range(1, lines, 2)}
        return tuple(_piece(f"{stem}.{name}", source, kind, taken) for name, taken in halves.items())
    return None


def _piece(name: str, source: SourceTensor, kind: str, lines: range) -> Piece:
    """One projection of all experts: `lines` of its outputs."""
    count = source.shape[0]
    if kind == "_bias":
        return Piece(f"{name}.bias", (count, len(lines)), sliced(source, lines))
    if kind == "_blocks":
        scales = source.name.removesuffix("_blocks") + "_scales"
        parts = tuple(Part(source.name, lines, number, scales=scales) for number in range(count))
        return Piece(f"{name}.weight", (count, len(lines), source.shape[2] * BLOCK), parts, type="MXFP4")
    rows = source.shape[1]
    return Piece(f"{name}.weight", (count, len(lines), rows), sliced(source, range(rows), lines, turned=True))
