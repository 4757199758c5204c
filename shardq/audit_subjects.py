"""Which tensors an audit takes, and what is known of each of them from records and headers."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from shardq.checkpoint import TensorRef
from shardq.errors import UnknownScheme, VerifyFailed
from shardq.files.safetensors import Header, HeaderTensor
from shardq.formats import STORAGE, WEIGHT_DTYPES
from shardq.layouts.base import Layout, OutSpec, unit_rows
from shardq.outputs import Output, target_of
from shardq.reach import find_reaches
from shardq.schemes import Scheme, parse_name

BYTES: Final = "U8"  # a copy is a column of bytes, whatever it holds

Ledger = Mapping[str, Mapping[str, Any]]
Headers = Mapping[str, Header]  # file -> header


@dataclass(frozen=True, slots=True)
class Derived:
    """One tensor of the result."""

    name: str
    spec: OutSpec
    begin: int  # of its first byte in the result's file

    @property
    def line_bytes(self) -> int:
        """Bytes of one index of the first axis."""
        size = STORAGE[self.spec.dtype].bits // 8
        for d in self.spec.shape[1:]:
            size *= d
        return size

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.spec.shape[0] * self.line_bytes


@dataclass(frozen=True, slots=True)
class Subject:
    """One source tensor and what became of it. A copied tensor is one column of bytes."""

    name: str
    outcome: str  # as in the ledger
    role: str
    shard: str  # of the source
    file: str  # of the result
    dtype: str
    begin: int  # of its first byte in the source shard
    rows: int
    columns: int
    row_bytes: int  # of the source
    unit_rows: int  # rows are read in multiples of this
    scheme: Scheme | None  # None: copied
    outputs: tuple[Derived, ...]
    reach: tuple[TensorRef, ...] = ()  # of the source: whose largest magnitude the scales need, if not a group's

    @property
    def stores_scale(self) -> bool:
        """True if one of the outputs tells a scale that all rows share."""
        return any(d.spec.slab_axis is None and not d.spec.values for d in self.outputs)


class NoSubjectError(Exception):
    """A tensor whose records and headers contradict each other; the text says how."""


def choose_names(ledger: Ledger, count: int, seed: int) -> tuple[str, ...]:
    """`count` tensors of a ledger in its order, by a hash of seed and name: the same everywhere for the same seed.

    Each pair of outcome and role has at least one member, as long as `count` allows. All tensors if there are fewer;
    dropped ones have nothing to compare.
    """
    order = sorted(
        (n for n in ledger if ledger[n]["outcome"] != "dropped"), key=lambda name: draw(seed, "tensor", name)
    )
    firsts: dict[tuple[str, str], str] = {}
    for name in order:
        firsts.setdefault((ledger[name]["outcome"], ledger[name]["role"]), name)
    chosen = set(itertools.islice(firsts.values(), count))
    chosen.update(itertools.islice((name for name in order if name not in chosen), count - len(chosen)))
    return tuple(name for name in ledger if name in chosen)


def draw(seed: int, what: str, name: str) -> int:
    """64 bits that depend on all three and on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{what}/{name}".encode()).digest()[:8], "little")


def ledger_reaches(output: Output) -> dict[str, tuple[str, ...]]:
    """`find_reaches` of what a ledger says that was quantized. Raises VerifyFailed for a scheme that nobody knows."""
    schemes: dict[str, Scheme] = {}
    quantized: list[tuple[str, str, Scheme]] = []
    for name, entry in output.ledger["tensors"].items():
        if entry["outcome"] != "quantized":
            continue
        said = entry.get("scheme")
        if said not in schemes:
            try:
                schemes[said] = output.layout.settle(parse_name(str(said)))
            except UnknownScheme as e:
                raise VerifyFailed(f"{output.where} has a broken entry for {name}: {e}; quantize again") from e
        quantized.append((name.rpartition(".")[0], name, schemes[said]))
    return find_reaches(quantized, output.config)


def make_subject(name: str, reach: Iterable[str], output: Output, source: Headers, result: Headers) -> Subject:
    """Put together what is known of a tensor; `reach` as of `ledger_reaches`. Raises NoSubjectError."""
    entry = output.ledger["tensors"][name]
    there = _find_source(name, output, source)
    copied = entry["outcome"] == "copied"
    shape = (there.end - there.begin, 1) if copied else there.shape
    if not copied and (len(shape) != 2 or there.dtype not in WEIGHT_DTYPES):
        raise NoSubjectError(f"{name} is {there.dtype} {list(shape)}: the ledger says that it was quantized")
    rows, columns = shape
    scheme = None if copied else _scheme(name, output)
    header = result[entry["file"]]
    return Subject(
        name=name,
        outcome=entry["outcome"],
        role=entry["role"],
        shard=entry["shard"],
        file=entry["file"],
        dtype=there.dtype,
        begin=there.begin,
        rows=rows,
        columns=columns,
        row_bytes=(there.end - there.begin) // max(1, rows),
        unit_rows=unit_rows(output.layout, scheme) if scheme else 1,
        scheme=scheme,
        outputs=_derived(there, header, entry, scheme, output.layout),
        reach=tuple(_refer(n, output, source) for n in reach),
    )


def _refer(name: str, output: Output, source: Headers) -> TensorRef:
    """A quantized tensor in the source."""
    found, shard = _find_source(name, output, source), output.ledger["tensors"][name]["shard"]
    if len(found.shape) != 2 or 0 in found.shape or found.dtype not in WEIGHT_DTYPES:
        raise NoSubjectError(f"{name} is {found.dtype} {list(found.shape)}: the ledger says that it was quantized")
    return TensorRef(name, shard, found.dtype, found.shape, found.begin, found.end)


def _find_source(name: str, output: Output, source: Headers) -> HeaderTensor:
    entry = output.ledger["tensors"][name]
    there = _find(source[entry["shard"]], name, f"source shard {entry['shard']}")
    if (there.dtype, list(there.shape)) != (entry["dtype"], entry["shape"]):
        raise NoSubjectError(
            f"{name} is {there.dtype} {list(there.shape)} in source shard {entry['shard']}: the ledger says "
            f"{entry['dtype']} {entry['shape']}"
        )
    return there


def _scheme(name: str, output: Output) -> Scheme:
    """What a loader believes, which must be what the ledger says."""
    scheme, said = output.believed_scheme(name), output.ledger["tensors"][name]["scheme"]
    if scheme is None or scheme.name != said:
        raise NoSubjectError(
            f"config.json says {scheme.name if scheme else 'not quantized'} for {name}: the ledger says {said}"
        )
    return scheme


def _derived(
    there: HeaderTensor, header: Header, entry: Mapping[str, Any], scheme: Scheme | None, layout: Layout
) -> tuple[Derived, ...]:
    """The result's tensors for a source tensor, each as the layout wants it. Raises NoSubjectError."""
    file, place = entry["file"], target_of(there.name, entry)
    if scheme is None:
        found = _find(header, there.name, file)
        if (found.dtype, found.shape) != (there.dtype, there.shape):
            raise NoSubjectError(
                f"{there.name} in {file} is {found.dtype} {list(found.shape)}: expected a copy of {there.dtype} "
                f"{list(there.shape)}"
            )
        return (Derived(there.name, OutSpec("", BYTES, (found.end - found.begin,), slab_axis=0), found.begin),)
    rows, columns = there.shape
    derived: list[Derived] = []
    for spec in layout.outputs(scheme, there.dtype, rows, columns):
        found = _find(header, f"{place.module}.{spec.suffix}", file)
        if (found.dtype, found.shape) != (spec.dtype, place.stacked(spec.shape)):
            raise NoSubjectError(
                f"{found.name} in {file} is {found.dtype} {list(found.shape)}: expected {spec.dtype} "
                f"{list(place.stacked(spec.shape))}"
            )
        derived.append(Derived(found.name, spec, place.slice_of(found.begin, found.end)[0]))
    return tuple(derived)


def _find(header: Header, name: str, where: str) -> HeaderTensor:
    for t in header.tensors:
        if t.name == name:
            return t
    raise NoSubjectError(f"{name} is not in {where}, where the ledger has it")
