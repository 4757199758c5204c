"""Reads quantized sources: finds encoded weights by headers, and turns rows of them into fp32.

A kind is a `[[source]]` row of families.toml (how its tensors are told) and a line in `kinds.KINDS` (who reads them);
one that stores numbers in a way that no reader here knows brings a file. `finding.find_encoded` is for planning and
needs no numpy, and without encoded weights no reader; `decoding.decode_rows` is for workers.
"""
