"""Tensors of a GGUF file that no source tensor stands for: numbers that follow from the config."""

import math
from typing import Final

import numpy as np

from shardq.errors import UnsupportedSource
from shardq.gguf.family_pairs import head_dimension, rotary_dimensions
from shardq.gguf.parameters import Parameters
from shardq.gguf.tensors import OutputTensor

FACTORS: Final = "rope_freqs.weight"


def no_tensors(_: Parameters) -> tuple[OutputTensor, ...]:
    """None."""
    return ()


def long_factors(parameters: Parameters) -> tuple[OutputTensor, ...]:
    """What Phi 3 divides the frequencies of its rope by in long and in short texts: lists of its config.

    Source: llama.cpp as in llama-cpp-python 0.3.36, `Phi3MiniModel.generate_extra_tensors`. Raises UnsupportedSource.
    """
    if not parameters.rope.get("long_factor"):
        return ()
    found = []
    count = rotary_dimensions(parameters) // 2
    for name in ("long", "short"):
        values = parameters.rope.get(f"{name}_factor") or ()
        if len(values) != count:
            raise UnsupportedSource(f"config.json: rope has {len(values)} factors for {name} texts, expected {count}")
        found.append(OutputTensor(f"rope_factors_{name}.weight", (count,), "F32", (), values=tuple(map(float, values))))
    return tuple(found)


def llama3_factors(parameters: Parameters) -> tuple[OutputTensor, ...]:
    """What Llama 3 divides the frequencies of its rope by: 1 for short waves, `factor` for long, smooth between.

    Each step is rounded to fp32 as torch's scalar code does, where a number over a tensor is its inverse, multiplied;
    torch's vector code may take a power that is not rounded to the nearest, and be off in the last digit of one factor
    (base 500000 and 96 dimensions, of those tried). Source: llama.cpp as in llama-cpp-python 0.3.36,
    `LlamaModel.generate_extra_tensors`.
    """
    rope = parameters.full_rope
    if str(rope.get("rope_type", "")).lower() != "llama3":
        return ()
    size = head_dimension(parameters)
    base, factor = float(rope.get("rope_theta", 10000.0)), float(rope.get("factor", 8.0))
    low, high = float(rope.get("low_freq_factor", 1.0)), float(rope.get("high_freq_factor", 4.0))
    context = float(rope.get("original_max_position_embeddings", 8192))
    one = np.float32(1)
    values = []
    for exponent in np.arange(0, size, 2, dtype=np.float32) / np.float32(size):
        frequency = one / np.float32(base ** float(exponent))
        wave = one / frequency * np.float32(2 * math.pi)
        if wave < context / high:
            values.append(1.0)
        elif wave > context / low:
            values.append(factor)
        else:
            smooth = (one / wave * np.float32(context) - np.float32(low)) / np.float32(high - low)
            values.append(float(one / ((one - smooth) / np.float32(factor) + smooth)))
    return (OutputTensor(FACTORS, (len(values),), "F32", (), values=tuple(values)),)
