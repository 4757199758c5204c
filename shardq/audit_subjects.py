"""Which tensors an audit takes, and what is known of each of them from records and headers."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from shardq.carry import Goal, needs_largest
from shardq.checkpoint import TensorRef
from shardq.dequantize.base import Encoded
from shardq.errors import BadOption, UnknownScheme, VerifyFailed
from shardq.files.safetensors import Header, HeaderTensor
from shardq.fold_weights import weigh
from shardq.formats import STORAGE, WEIGHT_DTYPES
from shardq.importance import Importance, match
from shardq.importance_vectors import Ref, SizesRef
from shardq.layouts.base import Layout, OutSpec, unit_rows
from shardq.outputs import Output, target_of
from shardq.reach import find_reaches
from shardq.recorded import goal_of, is_as_recorded
from shardq.replaced import ReplacedRef
from shardq.schemes import Scheme, parse_name
from shardq.search import Search, read_search
from shardq.tuned import TunedCodes, TunedRef
from shardq.untied import embedding_as
from shardq.weights import is_turned

DECODED_BYTES: Final = 4  # for each weight of a row that is decoded: what it is held as
BYTES: Final = "U8"  # a copy is a column of bytes, whatever it holds

Ledger = Mapping[str, Mapping[str, Any]]
Headers = Mapping[str, Header]  # file -> header
Weights = Mapping[str, TensorRef]


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
    """One weight of the source and what became of it. A copied tensor is one column of bytes."""

    name: str
    outcome: str  # as in the ledger
    role: str
    shard: str  # of the source
    file: str  # of the result
    dtype: str
    begin: int  # of its first byte in the source shard
    rows: int
    columns: int
    row_bytes: int  # of the source; of an encoded one, once it is decoded
    unit_rows: int  # rows are read in multiples of this
    scheme: Scheme | None  # None: copied
    outputs: tuple[Derived, ...]
    reach: tuple[TensorRef, ...] = ()  # of the source: whose largest magnitude the scales need, if not a group's
    encoded: tuple[Encoded, ...] = ()  # how rows are made where they are not there as they are; of a stack that is kept
    # each slice, with a tensor of `outputs` for each
    goal: Goal | None = None  # where its codes are carried; None: they are made anew
    search: Search | None = None  # by which its scales were found
    importance: Ref | None = None  # how much an error counted in each column
    tuned: TunedRef | None = None  # where its codes come from, if they were tuned
    replaced: ReplacedRef | None = None  # what stands in place of a copy

    @property
    def is_strided(self) -> bool:
        """True if the source is read by columns: its rows run along the lines that are stored."""
        return any(e.is_strided for e in self.encoded)

    @property
    def weight(self) -> TensorRef:
        """The matrix of the source, or one like each slice of a stack."""
        end = self.begin + self.rows * self.row_bytes
        return TensorRef(self.name, self.shard, self.dtype, (self.rows, self.columns), self.begin, end, self.encoded)

    @property
    def stores_scale(self) -> bool:
        """True if one of the outputs tells a scale that all rows share, and its largest magnitude with it."""
        return self.goal is None and any(d.spec.slab_axis is None and not d.spec.values for d in self.outputs)


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


def ledger_reaches(output: Output, source: Weights) -> dict[str, tuple[str, ...]]:
    """`find_reaches` of what a ledger says that was quantized and not tuned; of what was carried only what needs more
    than its own codes, by `source`, which has all that is encoded. Raises VerifyFailed for an unknown scheme."""
    schemes: dict[str, Scheme] = {}
    quantized: list[tuple[str, str, Scheme]] = []
    for name, entry in output.ledger["tensors"].items():
        if entry["outcome"] != "quantized" or "tuned" in entry:
            continue
        said = entry.get("scheme")
        if said not in schemes:
            try:
                schemes[said] = output.layout.settle(parse_name(str(said)))
            except UnknownScheme as e:
                raise VerifyFailed(f"{output.where} has a broken entry for {name}: {e}; quantize again") from e
        t = source.get(name)
        to = goal_of(t, entry, output.layout) if t and is_as_recorded(t, entry) else None
        if t is None or to is None or needs_largest(t.encoded[0], to):
            quantized.append((name.rpartition(".")[0], name, schemes[said]))
    return find_reaches(quantized, output.config)


def make_subject(
    name: str, reach: Iterable[str], output: Output, source: Weights, result: Headers, importance: Importance | None,
    sizes: Mapping[str, SizesRef],
) -> Subject:  # fmt: skip
    """Put together what is known of a tensor; `reach` as of `ledger_reaches`, `importance` that of the run, or `sizes`
    of its fold. Raises NoSubjectError, BadImportance."""
    entry = output.ledger["tensors"][name]
    t = _find_source(name, output, source)
    scheme = _scheme(_matrix(t), output) if entry["outcome"] == "quantized" else None
    rows, columns = t.size_bytes, 1
    if t.encoded:
        rows, columns = t.encoded[0].rows, t.encoded[0].columns
    elif scheme:
        rows, columns = t.shape or (0, 0)
    return Subject(
        name=name,
        outcome=entry["outcome"],
        role=entry["role"],
        shard=entry["shard"],
        file=entry["file"],
        dtype=entry["dtype"],
        begin=t.begin,
        rows=rows,
        columns=columns,
        row_bytes=DECODED_BYTES * columns if t.encoded else t.size_bytes // max(1, rows),
        unit_rows=unit_rows(output.layout, scheme) if scheme else 1,
        scheme=scheme,
        outputs=_derived(t, result[entry["file"]], entry, scheme, output.layout),
        reach=tuple(_matrix(_find_source(n, output, source), measured=True) for n in reach),
        encoded=t.encoded,
        goal=goal_of(t, entry, output.layout),
        search=_search(name, entry),
        importance=_importance(t, (rows, columns), importance, sizes) if _weighed(entry) else None,
    )


def with_tuned(s: Subject, entry: Mapping[str, Any], tuned: TunedCodes | None) -> Subject:
    """A tensor of whose entry a folder has the codes, or the content. Raises NoSubjectError where it does not."""
    if tuned is None or not entry.keys() & {"tuned", "replaced"}:
        return s
    module, replaced = s.name.removesuffix(".weight"), tuned.replaced.get(s.name)
    if "replaced" in entry:
        if replaced is None or (replaced.dtype, list(replaced.shape)) != (entry["dtype"], entry["shape"]):
            raise NoSubjectError(f"{tuned.label} does not replace {s.name}, as the ledger has it")
        return replace(s, replaced=replaced)
    if tuned.shapes.get(module) != (s.rows, s.columns):
        raise NoSubjectError(f"{tuned.label} has no codes of {s.name}, as the ledger has it")
    return replace(s, tuned=tuned.refs[module])


def _importance(
    t: TensorRef, shape: tuple[int, int], given: Importance | None, sizes: Mapping[str, SizesRef]
) -> Ref | None:
    """Of a tensor whose errors were weighed. Raises BadImportance."""
    data = match(given, {t.module: shape})[t.module] if given else None
    return weigh(t, data, sizes.get(t.name))


def _search(name: str, entry: Mapping[str, Any]) -> Search | None:
    try:
        return read_search(entry["search"]) if "search" in entry else None
    except (TypeError, BadOption) as e:
        raise NoSubjectError(f"{name} has a search in the ledger that is none: {e}") from e


def _weighed(entry: Mapping[str, Any]) -> bool:
    return bool(entry.get("weighed"))


def sources_of(names: Iterable[str], output: Output, source: Headers) -> dict[str, TensorRef]:
    """Tensors as headers of a source have them that has nothing encoded, and of a tied model the embedding as its head;
    without those that are not there."""
    wanted: dict[str, set[str]] = {}
    for name in names:
        wanted.setdefault(output.ledger["tensors"][name]["shard"], set()).add(name)
    found: dict[str, TensorRef] = {}
    for shard, mine in wanted.items():
        there = {t.name: TensorRef(t.name, shard, t.dtype, t.shape, t.begin, t.end) for t in source[shard].tensors}
        made = (there.get(name) or embedding_as(name, there) for name in mine)
        found |= {t.name: t for t in made if t}
    return found


def _matrix(t: TensorRef, measured: bool = False) -> TensorRef:
    """A tensor that was quantized. Raises NoSubjectError where it cannot have been, or has nothing to be measured."""
    shape = t.shape or ()
    if len(shape) != 2 or t.dtype not in WEIGHT_DTYPES or (measured and 0 in shape):
        raise NoSubjectError(f"{t.name} is {t.dtype} {list(shape)}: the ledger says that it was quantized")
    return t


def _find_source(name: str, output: Output, source: Weights) -> TensorRef:
    entry = output.ledger["tensors"][name]
    t = source.get(name)
    if t is None or t.shard != entry["shard"]:
        raise NoSubjectError(f"{name} is not in source shard {entry['shard']}, where the ledger has it")
    if not is_as_recorded(t, entry):
        raise NoSubjectError(
            f"{name} is {t.dtype} {list(t.shape or ())}{', encoded,' if t.encoded else ''} in source shard "
            f"{entry['shard']}: the ledger says {entry['dtype']} {entry['shape']}, {entry['outcome']}"
        )
    return t


def _scheme(t: TensorRef, output: Output) -> Scheme:
    """What a loader believes, which must be what the ledger says."""
    name = t.name
    scheme, said = output.believed_scheme(name), output.ledger["tensors"][name]["scheme"]
    if scheme is None or scheme.name != said:
        raise NoSubjectError(
            f"config.json says {scheme.name if scheme else 'not quantized'} for {name}: the ledger says {said}"
        )
    return scheme


def _derived(
    t: TensorRef, header: Header, entry: Mapping[str, Any], scheme: Scheme | None, layout: Layout
) -> tuple[Derived, ...]:
    """The result's tensors for a source tensor, each as the layout wants it. Raises NoSubjectError."""
    file, place = entry["file"], target_of(t.name, entry)
    if scheme is None:
        found = _find(header, t.name, file)
        if (found.dtype, list(found.shape)) != (entry["dtype"], entry["shape"]):
            raise NoSubjectError(
                f"{t.name} in {file} is {found.dtype} {list(found.shape)}: expected a copy of {entry['dtype']} "
                f"{entry['shape']}"
            )
        if t.encoded:
            return tuple(_slices(t, found))
        return (Derived(t.name, OutSpec("", BYTES, (found.end - found.begin,), slab_axis=0), found.begin),)
    assert t.shape is not None
    rows, columns = t.shape
    derived: list[Derived] = []
    for spec in layout.outputs(scheme, entry["dtype"], rows, columns):
        found = _find(header, f"{place.module}.{spec.suffix}", file)
        if (found.dtype, found.shape) != (spec.dtype, place.stacked(spec.shape)):
            raise NoSubjectError(
                f"{found.name} in {file} is {found.dtype} {list(found.shape)}: expected {spec.dtype} "
                f"{list(place.stacked(spec.shape))}"
            )
        derived.append(Derived(found.name, spec, place.slice_of(found.begin, found.end)[0]))
    return tuple(derived)


def _slices(t: TensorRef, found: HeaderTensor) -> Iterator[Derived]:
    """What was only decoded: a matrix, or each slice of a stack."""
    turned, size_bytes = is_turned(t), (found.end - found.begin) // len(t.encoded)
    for number, e in enumerate(t.encoded):
        spec = OutSpec("", found.dtype, (e.columns, e.rows) if turned else (e.rows, e.columns), 1 if turned else 0)
        yield Derived(t.name, spec, found.begin + number * size_bytes)


def _find(header: Header, name: str, where: str) -> HeaderTensor:
    for t in header.tensors:
        if t.name == name:
            return t
    raise NoSubjectError(f"{name} is not in {where}, where the ledger has it")
