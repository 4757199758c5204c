"""One GGUF model of a source that may hold several: which one is meant, its tensors, and their numbers by ranges."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from shardq.errors import BadOption, CheckpointIncomplete
from shardq.files.gguf import drop_ones
from shardq.files.gguf_read import GgufTensor
from shardq.gguf.headers import ARCHITECTURE, GgufModel, check_parts, find_models, read_gguf_headers, said_value
from shardq.gguf_decoding import decode_numbers
from shardq.kernels import KernelSet
from shardq.scored import pieces
from shardq.source_rows import Span
from shardq.sources.base import Source


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor and the file that holds it."""

    file: str
    tensor: GgufTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """In GGUF's order, the row length first, without ones at the end: some writers leave them out."""
        return drop_ones(self.tensor.shape)

    @property
    def columns(self) -> int:
        """Numbers of a row."""
        return self.shape[0]

    @property
    def rows(self) -> int:
        """Rows of all its slices."""
        return prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return (self.tensor.end - self.tensor.begin) // self.rows if self.rows else 0


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model whose headers are read and go together."""

    source: Source
    name: str  # as `shardq inspect` calls it
    architecture: str | None
    tensors: Mapping[str, PlacedTensor]  # by name, in the order of the files

    def rows(self, name: str, spans: Sequence[Span], kernels: KernelSet) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Rows of a tensor in fp32, window by window, with the number of the first; `spans` say which. Its type is
        decoded here, see gguf_decoding. Raises what reading raises."""
        for row, end_row in (piece for span in spans for piece in pieces(*span, self.tensors[name].columns)):
            yield row, self.read_rows(name, row, end_row, kernels)

    def read_rows(self, name: str, row: int, end_row: int, kernels: KernelSet) -> NDArray[np.float32]:
        """Some rows of a tensor, as `rows` has them, all at once."""
        t = self.tensors[name]
        begin, size = t.tensor.begin, t.row_bytes
        data = np.frombuffer(self.source.read(t.file, begin + row * size, begin + end_row * size), np.uint8)
        return decode_numbers(data, t.tensor.type, t.columns, kernels)


def open_model(source: Source, wanted: str | None, option: str) -> OpenedModel:
    """The model that `wanted` names, see choose_model. Reads its headers. Raises BadOption, CheckpointIncomplete for
    parts that are missing or do not go together, CorruptShard, UnknownDtype, SourceUnreadable, HubAccess, HubTransfer.
    """
    model = choose_model(source, wanted, option)
    headers = read_gguf_headers(source, model.files)
    for problem in check_parts(model, headers):
        raise CheckpointIncomplete(f"{source.label}: {problem}")
    said = said_value(headers[model.files[0].name], ARCHITECTURE)
    tensors = {t.name: PlacedTensor(file, t) for file, header in headers.items() for t in header.tensors}
    return OpenedModel(source, model.name, said if isinstance(said, str) else None, tensors)


def choose_model(source: Source, wanted: str | None, option: str) -> GgufModel:
    """The only GGUF model of a source, or the one that `wanted` names: its name, one of its files, or what is in the
    name of no other, whatever its case ("Q4_K_M"). `option` is where a user chooses. Raises BadOption, with all names.
    """
    models = find_models(source.files())
    if not models:
        raise BadOption(f"{source.label} holds no GGUF files: leave {option} out")
    if wanted is None:
        fitting = list(models)
    else:
        fitting = [m for m in models if wanted in (m.name, *(f.name for f in m.files))]
        fitting = fitting or [m for m in models if wanted.lower() in m.name.lower()]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(m.name for m in fitting or models)
    if wanted is None:
        raise BadOption(f"{source.label} holds {len(models)} GGUF models: choose one of them with {option}: {names}")
    found = f"fits {len(fitting)}" if fitting else "fits none"
    raise BadOption(f"{option} {wanted!r} {found} of the GGUF models of {source.label}: expected one of {names}")
