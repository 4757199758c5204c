"""The tensors of a GGUF file as small values that say which rows of which source tensors they are made of.

Nothing is read or moved here. All shapes are torch's, rows before columns; GGUF writes them the other way round.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from shardq.files.gguf import GgufSpec
from shardq.regrouping import Regrouping


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor of the checkpoint: a weight as it is once decoded, or codes that go over as they are."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix of an output, or its only vector, as rows of one source tensor.

    It is `source[slice]` (all of the source where there is no slice), of that `rows` in order, of these `columns`,
    transposed where `turned`; of a vector, or of what has more axes and no slices, `rows` are elements. `order` and
    `column_order` say in which order they are then. With `scales` the source is MXFP4 blocks [..., rows, blocks,
    16 bytes], and `scales` their scales.
    """

    source: str
    rows: range  # of the source, or of its slice
    slice: int | None = None  # index on the first axis of a stack
    columns: range | None = None  # None: all
    turned: bool = False
    order: Regrouping | None = None  # of the rows
    column_order: Regrouping | None = None
    scales: str | None = None


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the file: `values`, or its parts behind each other, as rows or as the slices of its first axis."""

    name: str
    shape: tuple[int, ...]
    type: Literal["F32", "MXFP4"] | None  # None: what the file type says
    parts: tuple[Part, ...]
    added: float = 0.0  # to each element, in fp32
    negative_exp: bool = False  # of each element x of a vector -exp(x), in fp32
    values: tuple[float, ...] = ()  # fp32

    @property
    def slices(self) -> int:
        """Matrices, each of which has an importance of its own."""
        return self.shape[0] if len(self.shape) > 2 else 1


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
