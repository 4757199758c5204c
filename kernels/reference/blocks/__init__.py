"""ggml's block formats in numpy: the formulas of contract_blocks.py, over all blocks of a matrix at once."""

from shardq.kernels.reference.blocks.decoding import dequantized
from shardq.kernels.reference.blocks.formats import Made, quantized

__all__ = ["Made", "dequantized", "quantized"]
