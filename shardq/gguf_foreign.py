"""Check GGUF files that others made: no ledger, so what headers tell is all there is, and with `deep` the numbers."""

from collections.abc import Iterator

from shardq.errors import CorruptShard, SourceUnreadable, UnknownDtype
from shardq.files.gguf_read import GgufHeader
from shardq.gguf.headers import (
    ARCHITECTURE,
    GgufModel,
    check_parts,
    find_models,
    holds_gguf,
    read_gguf_header,
    said_value,
)
from shardq.ledger import LEDGER
from shardq.serving.served import GGUF, Served
from shardq.sources.base import Source
from shardq.staging import PROVENANCE
from shardq.verified import Verification


def is_foreign_gguf(source: Source) -> bool:
    """True for a source of GGUF files without records of shardq."""
    return not {PROVENANCE, LEDGER} & {f.name for f in source.files()} and holds_gguf(source.files())


def verify_foreign_gguf(source: Source, where: str, deep: bool) -> Verification:
    """What headers tell of each model: types that are known, sizes, places inside the file, parts that go together.
    `deep`: also that all numbers are finite, for which everything is read. Problems come back. Raises HubAccess and
    HubTransfer."""
    problems: list[str] = []
    notes: list[str] = []
    files = tensors = 0
    for model in find_models(source.files()):
        headers, odd = _read_headers(source, model)
        problems += odd
        files, tensors = files + len(headers), tensors + sum(len(h.tensors) for h in headers.values())
        if odd:
            continue
        problems += (*check_parts(model, headers), *_check_first(model, headers))
        if deep:
            from shardq.gguf_values import check_values, undecoded  # brings numpy
            from shardq.kernels import load

            for name, header in headers.items():
                problems += check_values(source, name, header, load())
                if types := sorted(undecoded(header)):
                    notes.append(f"{name} has tensors in {', '.join(types)}, which were not decoded.")
    served = Served({}, {}, GGUF, {}, {})
    return Verification(
        where, source.commit, files, tensors, deep, 0, tuple(problems), served, tuple(notes), foreign=True
    )


def _read_headers(source: Source, model: GgufModel) -> tuple[dict[str, GgufHeader], list[str]]:
    """The headers of a model's files, and what is wrong with those that cannot be read."""
    headers: dict[str, GgufHeader] = {}
    problems: list[str] = []
    for file in model.files:
        try:
            headers[file.name] = read_gguf_header(source, file)
        except (CorruptShard, UnknownDtype, SourceUnreadable) as e:
            problems.append(str(e))
    return headers, problems


def _check_first(model: GgufModel, headers: dict[str, GgufHeader]) -> Iterator[str]:
    """The first part says what the model is."""
    name = model.names[0]
    if name in headers and not isinstance(said_value(headers[name], ARCHITECTURE), str):
        yield f"{name} does not say its {ARCHITECTURE}: no loader takes it"
