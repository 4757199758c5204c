"""What is in the GGUF files of a repo or folder, ours or those of others. Headers only."""

from collections import Counter
from dataclasses import dataclass
from math import prod

from shardq.files.gguf_read import GgufTensor
from shardq.gguf.file_types import name_file_type
from shardq.gguf.headers import (
    ARCHITECTURE,
    FILE_TYPE,
    NAME,
    GgufModel,
    Headers,
    check_parts,
    find_models,
    read_gguf_headers,
    said_value,
    show,
)
from shardq.sources.base import Source


@dataclass(frozen=True, slots=True)
class TypeCount:
    """All tensors of one type."""

    type: str  # of ggml
    tensors: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class InspectedModel:
    """One model, in one file or in parts."""

    name: str  # of its file, or what the names of its parts begin with
    title: str | None  # what it calls itself
    architecture: str | None
    file_type: str | None  # by the names of llama-quantize, or a number that has none here
    files: int  # that are there
    parts: int  # that there should be
    tensors: int
    size_bytes: int  # of the tensors
    parameters: int  # numbers that the tensors hold
    types: tuple[TypeCount, ...]  # the one with the most bytes first

    @property
    def bits_per_weight(self) -> float:
        """All bits of the tensors over all numbers; 0 for none."""
        return 8 * self.size_bytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True, slots=True)
class GgufInspection:
    """The models of a source, in figures."""

    label: str
    commit: str | None
    models: tuple[InspectedModel, ...]
    warnings: tuple[str, ...]


def inspect_gguf(source: Source) -> GgufInspection:
    """Describe the GGUF files that a source holds, at any depth. Raises CorruptShard, UnknownDtype, SourceUnreadable,
    HubAccess, HubTransfer."""
    models = find_models(source.files())
    headers = read_gguf_headers(source, [f for m in models for f in m.files])
    warnings = [f"{problem}." for m in models for problem in check_parts(m, {f.name: headers[f.name] for f in m.files})]
    return GgufInspection(source.label, source.commit, tuple(_inspect(m, headers) for m in models), tuple(warnings))


def _inspect(model: GgufModel, headers: Headers) -> InspectedModel:
    own = [headers[f.name] for f in model.files]
    tensors = [t for h in own for t in h.tensors]
    number = said_value(own[0], FILE_TYPE)
    return InspectedModel(
        name=model.name,
        title=_text(said_value(own[0], NAME)),
        architecture=_text(said_value(own[0], ARCHITECTURE)),
        file_type=None if number is None else name_file_type(number) or show(number),
        files=len(own),
        parts=max(1, model.count),
        tensors=len(tensors),
        size_bytes=sum(t.end - t.begin for t in tensors),
        parameters=sum(prod(t.shape) for t in tensors),
        types=_count(tensors),
    )


def _count(tensors: list[GgufTensor]) -> tuple[TypeCount, ...]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for t in tensors:
        counts[t.type] += 1
        sizes[t.type] += t.end - t.begin
    return tuple(TypeCount(kind, counts[kind], size) for kind, size in sizes.most_common())


def _text(value: object) -> str | None:
    """A string of a file, fit to be printed on one line."""
    return "".join(c if c.isprintable() else "?" for c in value[:80]) if isinstance(value, str) else None
