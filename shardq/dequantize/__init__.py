"""Reads quantized sources: finds encoded weights by headers, and turns rows of them into fp32.

A kind is a `[[source]]` row of families.toml (how its tensors are told) and a line in `kinds.KINDS` (who reads them);
one that stores numbers in a way that no reader here knows brings a file. `find_encoded` is for planning and needs no
numpy; `decoding.decode_rows` is for workers.
"""

from shardq.dequantize.base import Coded, Encoded, Part
from shardq.dequantize.finding import Found, Problem, find_encoded
from shardq.dequantize.kinds import KINDS

__all__ = ["KINDS", "Coded", "Encoded", "Found", "Part", "Problem", "find_encoded"]
