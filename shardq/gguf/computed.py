"""Tensors of a GGUF file that no source tensor stands for: numbers that follow from the config."""

import math
from typing import Final

import numpy as np

from shardq.gguf.parameters import Parameters
from shardq.gguf.tensors import OutputTensor

FACTORS: Final = "rope_freqs.weight"


def no_tensors(_: Parameters) -> tuple[OutputTensor, ...]:
    """None."""
    return ()


def llama3_factors(parameters: Parameters) -> tuple[OutputTensor, ...]:
    """What Llama 3 divides the frequencies of its rope by: 1 for short waves, `factor` for long, smooth between.

    In fp32 as torch has it. Source: llama.cpp as in llama-cpp-python 0.3.36, `LlamaModel.generate_extra_tensors`.
    """
    rope = parameters.full_rope
    if str(rope.get("rope_type", "")).lower() != "llama3":
        return ()
    size = parameters.find("head_dim") or parameters.count("hidden_size") // parameters.count("num_attention_heads")
    one = np.float32(1)
    base = np.float32(rope.get("rope_theta", 10000.0))
    frequencies = one / base ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    factor = float(rope.get("factor", 8.0))
    low, high = float(rope.get("low_freq_factor", 1.0)), float(rope.get("high_freq_factor", 4.0))
    context = float(rope.get("original_max_position_embeddings", 8192))
    values = []
    for frequency in frequencies:
        wave = np.float32(2 * math.pi) / frequency
        if wave < context / high:
            values.append(1.0)
        elif wave > context / low:
            values.append(factor)
        else:
            smooth = (np.float32(context) / wave - np.float32(low)) / np.float32(high - low)
            values.append(float(one / ((one - smooth) / np.float32(factor) + smooth)))
    return (OutputTensor(FACTORS, (len(values),), "F32", (), values=tuple(values)),)
