"""One GGUF model in several files: which tensors go where, and what the parts are called.

llama.cpp has two tools that split, and they differ. Source: llama.cpp as in llama-cpp-python 0.3.36 (ggml 0.25.3),
tools/gguf-split/gguf-split.cpp, `llama_split_path`; gguf 0.19.0, `GGUFWriter`, which is what its converter writes with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from shardq.errors import LayoutRefuses
from shardq.files.gguf import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    GgufSpec,
    KeyValue,
    align,
    drop_ones,
    plan_gguf,
    spec_bytes,
)
from shardq.files.safetensors import FilePlan

NUMBER: Final = "split.no"  # from 0; in names from 1
COUNT: Final = "split.count"
TENSORS: Final = "split.tensors.count"  # of all parts
MAX_PARTS: Final = 0xFFFF  # the two are u16


@dataclass(frozen=True, slots=True)
class SplitTool:
    """How one of llama.cpp's tools splits."""

    name: str
    keys: tuple[str, ...]  # in the order in which it writes them, behind all others
    counts_padding: bool  # the limit is on tensors with the zeros behind them, else on their bytes alone
    numbers_one: bool  # a single part has a number in its name and the keys, too
    takes_large_first: bool  # a first tensor above the limit is a part; else an error
    drops_ones: bool  # of shapes: the tool is written in C and writes as `drop_ones` has it


# gguf-split sets the number of parts twice, and setting a key again moves it behind the others.
GGUF_SPLIT: Final = SplitTool("gguf-split", (NUMBER, TENSORS, COUNT), True, True, False, True)
CONVERTER: Final = SplitTool("convert_hf_to_gguf", (NUMBER, COUNT, TENSORS), False, False, True, False)


def split_tensors(
    tensors: Sequence[GgufSpec], max_bytes: int, tool: SplitTool = GGUF_SPLIT, empty_first: bool = False
) -> tuple[tuple[GgufSpec, ...], ...]:
    """The tensors of each part, in order: a part ends before the tensor that would take it above `max_bytes`.

    Only tensors count, not headers, so files are a little larger than the limit; a tensor above it is a part by itself.
    The tools' options: `--split-max-size` (M and G are powers of 1000), and with `empty_first` gguf-split's
    `--no-tensor-first-split`, the converter's `--no-tensor-first-split`: metadata alone in the first part.
    Raises LayoutRefuses where the tool gives up: gguf-split for a first tensor above the limit.
    """
    if max_bytes < 1:
        raise ValueError(f"a part of at most {max_bytes} bytes")
    parts: list[list[GgufSpec]] = [[], []] if empty_first else [[]]
    size_bytes = 0
    for spec in tensors:
        own = spec_bytes(spec)
        if tool.counts_padding:
            own = align(own, DEFAULT_ALIGNMENT)
        if size_bytes + own > max_bytes and not parts[-1] and not tool.takes_large_first:
            raise LayoutRefuses(
                f"tensor {spec.name!a} is the first and has {own} bytes: {tool.name} cannot split into parts of "
                f"{max_bytes}; allow larger ones"
            )
        if size_bytes + own > max_bytes and parts[-1]:
            parts.append([])
            size_bytes = 0
        parts[-1].append(spec)
        size_bytes += own
    if len(parts) > MAX_PARTS:
        raise LayoutRefuses(
            f"parts of {max_bytes} bytes would be {len(parts)} files, at most {MAX_PARTS} can be numbered; "
            "allow larger ones"
        )
    return tuple(tuple(part) for part in parts)


def part_name(prefix: str, index: int, count: int) -> str:
    """The name of part `index` (from 0) of `count`, by which loaders find the other parts."""
    return f"{prefix}-{index + 1:05d}-of-{count:05d}.gguf"


def plan_parts(
    pairs: Sequence[KeyValue],
    tensors: Sequence[GgufSpec],
    prefix: str,
    max_bytes: int,
    tool: SplitTool = GGUF_SPLIT,
    empty_first: bool = False,
) -> Mapping[str, FilePlan]:
    """The plan of each part by its name, in order; the files are `tool`'s, to the byte.

    All pairs are in the first part; the others have those of the split alone, and so cannot say that they are aligned
    otherwise than to 32, which is refused (both tools write parts that no loader reads then). Arguments as in
    `split_tensors`, errors as there and in `plan_gguf`.
    """
    for pair in pairs:
        if pair.key in tool.keys:
            raise ValueError(f"{pair.key} is for the split to say")
        if pair.key == ALIGNMENT_KEY and pair.value != DEFAULT_ALIGNMENT:
            raise LayoutRefuses(
                f"{ALIGNMENT_KEY} {pair.value!a}: parts of a split are read with {DEFAULT_ALIGNMENT}; "
                "leave it out, or write one file"
            )
    if tool.drops_ones:
        tensors = [replace(spec, shape=drop_ones(spec.shape)) for spec in tensors]
    parts = split_tensors(tensors, max_bytes, tool, empty_first)
    if len(parts) == 1 and not tool.numbers_one:
        return {f"{prefix}.gguf": plan_gguf(pairs, parts[0])}
    plans = {}
    for index, part in enumerate(parts):
        said = {
            NUMBER: KeyValue(NUMBER, "u16", index),
            COUNT: KeyValue(COUNT, "u16", len(parts)),
            TENSORS: KeyValue(TENSORS, "i32", len(tensors)),
        }
        own = [*(pairs if index == 0 else ()), *(said[key] for key in tool.keys)]
        plans[part_name(prefix, index, len(parts))] = plan_gguf(own, part)
    return plans
