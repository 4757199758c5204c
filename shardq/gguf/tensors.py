"""The tensors of a GGUF file as small values that say which rows of which source tensors they are made of.

Nothing is read or moved here. All shapes are torch's, rows before columns; GGUF writes them the other way round.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from shardq.files.gguf import GgufSpec


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor of the checkpoint: a weight as it is once decoded, or codes that go over as they are."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix of an output, or its only vector, as rows of one source tensor.

    It is `source[slice]` (all of the source where there is no slice), of that `rows` in order, of these `columns`,
    transposed where `turned`; of a vector `rows` are its elements. With `rotary_heads` the rows are re-ordered first.
    With `scales` the source is MXFP4 blocks [..., rows, blocks, 16 bytes], and `scales` their scales.
    """

    source: str
    rows: range  # of the source, or of its slice
    slice: int | None = None  # index on the first axis of a stack
    columns: range | None = None  # None: all
    turned: bool = False
    rotary_heads: int = 0  # see `rotary_row`
    scales: str | None = None


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the file: `values`, or its one part, or its parts as the slices of its first axis."""

    name: str
    shape: tuple[int, ...]
    type: Literal["F32", "MXFP4"] | None  # None: what the file type says
    parts: tuple[Part, ...]
    added: float = 0.0  # to each element, in fp32
    values: tuple[float, ...] = ()  # fp32


def rotary_row(row: int, rows: int, heads: int) -> int:
    """Where llama.cpp's row `row` of queries or keys lies among the `rows` of Hugging Face's.

    There the two halves of a head rotate against each other, here neighbours do: row 2i+j of a head is row j*d/2+i of
    it, d its rows. Source: llama.cpp as in llama-cpp-python 0.3.36, `LlamaModel.permute`.
    """
    size = rows // heads
    head, inside = divmod(row, size)
    return head * size + inside % 2 * (size // 2) + inside // 2


def file_spec(tensor: OutputTensor, file_type: str) -> GgufSpec:
    """The tensor as a file declares it, where `file_type` (`BF16`) is stored for what nothing else fixes."""
    return GgufSpec(tensor.name, tensor.type or file_type, tuple(reversed(tensor.shape)))


def parameter_counts(tensors: Sequence[OutputTensor]) -> tuple[int, int, int, int]:
    """Weights in all; those that each token needs; those of one expert of each stack; experts.

    Source: gguf 0.19.0, `GGUFWriter.get_total_parameter_count`.
    """
    total = shared = experts = count = stacks = 0
    for tensor in tensors:
        size = prod(tensor.shape)
        total += size
        if "_exps." not in tensor.name or len(tensor.shape) < 3:
            shared += size
        else:
            own = tensor.shape[-2 if ".bias" in tensor.name else -3]
            experts += size // own
            count += own
            stacks += 1
    return total, shared, experts, count // stacks if stacks else 0
