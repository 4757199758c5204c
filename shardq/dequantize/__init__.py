"""Reads quantized sources: finds encoded weights by headers, and turns rows of them into fp32."""

from shardq.dequantize.base import Coded, Encoded, Part
from shardq.dequantize.finding import Found, Problem, find_encoded
from shardq.dequantize.kinds import KINDS

__all__ = ["KINDS", "Coded", "Encoded", "Found", "Part", "Problem", "find_encoded"]
