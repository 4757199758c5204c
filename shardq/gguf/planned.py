"""What a plan knows of a GGUF output that other outputs do not have."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the output."""

    name: str
    type: str  # key of ggml.GGML
    shape: tuple[int, ...]  # GGUF's order: the row length first
    size_bytes: int
    file: str
    weights: tuple[str, ...]  # of the source, that it is made of
    weighed: bool  # some of its errors are weighed by importance


@dataclass(frozen=True, slots=True)
class PlannedGguf:
    """All tensors, in the order of the files."""

    tensors: tuple[PlannedTensor, ...]
    outputs: Mapping[str, tuple[str, ...]]  # weight of the source -> what it becomes
    files: Mapping[str, str]  # weight of the source -> the file of the first of them
    notes: tuple[str, ...]  # what is odd about the importance
