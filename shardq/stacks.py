"""Expert stacks: what every slice of a three-dimensional expert tensor holds, from names, shapes and config alone.

A stack is `[experts, a, b]`. Whether a slice is `[out, in]` or `[in, out]` is inferred from the group that it belongs
to, whether gate and up rows alternate cannot be and is a row of families.toml. Nothing here reads a weight.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from shardq.checkpoint import TensorRef
from shardq.companions import find_companions
from shardq.errors import UnsupportedSource
from shardq.families import StackRow, load_families
from shardq.formats import STORAGE
from shardq.fused import model_types
from shardq.orientation import Slice, find_orientation

# architectures.md section 4.1: o and i are the order of the axes, il alternating gate and up, sep gate and up apart.
StackLayout = Literal["s_oi", "s_io", "s_oi_il", "s_io_il", "s_sep"]
INTERLEAVED: Final[frozenset[StackLayout]] = frozenset({"s_oi_il", "s_io_il"})  # rows of gate and up take turns


@dataclass(frozen=True, slots=True)
class StackPart:
    """One projection in each slice of a stack."""

    projection: str  # as loaders call it: `gate_proj`
    lines: range  # its rows among the outputs of a slice: rows where it is [out, in], columns where it is transposed


@dataclass(frozen=True, slots=True)
class ExpertMatrix:
    """One matrix of one expert, and where it lies."""

    name: str  # `a.experts.3.gate_proj.weight`
    stack: str  # the tensor that holds it; of a quantized source the tensor of codes
    expert: int  # slice of the stack
    lines: range  # outputs of the slice that are its rows, in order
    rows: int  # outputs
    columns: int  # inputs
    transposed: bool  # the slice is [in, out]


@dataclass(frozen=True, slots=True)
class ExpertBias:
    """The bias of one projection of one expert, and where it lies."""

    name: str  # `a.experts.3.gate_proj.bias`
    stack: str  # the two-dimensional tensor [experts, outputs] that holds it
    expert: int
    lines: range


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """One stack: how its matrices lie and what they are called. The counts are None where only an index is known."""

    tensor: str  # name in the source
    weight: str  # the same, or what it would be called if the source were not quantized
    row: str  # id in families.toml
    prefix: str  # `a.experts`: matrices are `a.experts.<i>.<projection>.weight`
    emit: Literal["per_expert", "stacked"]  # what loaders want
    layout: StackLayout | None
    transposed: bool  # slices are [in, out]
    experts: int | None
    columns: int | None  # inputs of each matrix
    parts: tuple[StackPart, ...]  # lines are empty where only an index is known
    bias: str | None

    def matrices(self) -> Iterator[ExpertMatrix]:
        """All matrices, expert by expert, parts in the order of loaders (gate, up). Nothing for an index."""
        for expert in range(self.experts or 0):
            for p in self.parts:
                name = f"{self.prefix}.{expert}.{p.projection}.weight"
                assert self.columns is not None
                yield ExpertMatrix(
                    name, self.tensor, expert, p.lines, len(p.lines), self.columns, transposed=self.transposed
                )

    def biases(self) -> Iterator[ExpertBias]:
        """All biases, in the same order. Nothing where there are none, and for an index."""
        for expert in range(self.experts or 0 if self.bias else 0):
            for p in self.parts:
                assert self.bias is not None
                yield ExpertBias(f"{self.prefix}.{expert}.{p.projection}.bias", self.bias, expert, p.lines)


@dataclass(frozen=True, slots=True)
class _Found:
    """A stack before its group is known."""

    ref: TensorRef
    weight: str
    packed: bool  # codes with several values in an element: their last axis are inputs, of which the number is wrong


def find_stacks(
    tensors: Iterable[TensorRef], config: Mapping[str, Any] | None, *, halves: bool = False
) -> tuple[ExpertStack, ...]:
    """Every expert stack among `tensors`, in the order given; leave out those that are kept as they are, for one that
    cannot be described is refused. `halves`: rows of gate and up that take turns become the halves that
    Layout.halves_experts says.

    Known by their names (the rows `stack` of families.toml) and three dimensions, or unknown ones. Codes of a quantized
    source are described like the weights that they stand for. Raises UnsupportedSource for a stack that belongs to no
    row, whose partner is missing, or whose shapes do not tell which axis is which.
    """
    refs = {t.name: t for t in tensors}
    types = model_types(config)
    groups: dict[str, dict[str, _Found]] = defaultdict(dict)
    for found in _candidates(refs):
        container, projection = load_families().experts.split(found.weight) or ("", "")
        groups[container][projection] = found
    described: dict[str, ExpertStack] = {}
    for container, members in groups.items():
        for stack in _describe_group(container, members, refs, types, config, halves):
            described[stack.tensor] = stack
    return tuple(described[name] for name in refs if name in described)


def _candidates(refs: Mapping[str, TensorRef]) -> Iterator[_Found]:
    experts = load_families().experts
    codes = {}
    parameters = set()
    for c in find_companions(refs.values()):
        if c.part == "codes" and c.paired:
            codes[c.name] = c.weight
        else:
            parameters.add(c.name)
    for ref in refs.values():
        weight = codes.get(ref.name, ref.name)
        if ref.name not in parameters and experts.is_stack(weight, ref.shape):
            storage = STORAGE.get(ref.dtype) if ref.dtype is not None else None
            packed = ref.name in codes and not (storage is not None and storage.floating and storage.bits == 8)
            yield _Found(ref, weight, packed)


def _describe_group(
    container: str,
    members: Mapping[str, _Found],
    refs: Mapping[str, TensorRef],
    types: frozenset[str],
    config: Mapping[str, Any] | None,
    halves: bool,
) -> Iterator[ExpertStack]:
    left = dict(members)
    for row in load_families().stacks:
        if not row.fits(container, left, types):
            continue
        group = {name: left.pop(name) for name in row.members}
        yield from _describe_row(container, row, group, refs, config, halves)
    if left:
        raise UnsupportedSource(
            f"expert stack {next(iter(left.values())).ref.name}: no known family stacks {', '.join(sorted(left))} in "
            f"{container} alone (model types {', '.join(sorted(types)) or 'unknown'}); keep it with --ignore"
        )


def _describe_row(
    container: str,
    row: StackRow,
    group: Mapping[str, _Found],
    refs: Mapping[str, TensorRef],
    config: Mapping[str, Any] | None,
    halves: bool,
) -> Iterator[ExpertStack]:
    slices = {name: _slice(found) for name, found in group.items()}
    known = {name: s for name, s in slices.items() if s is not None}
    if len(known) < len(slices):
        for projection, found in group.items():
            parts = tuple(StackPart(written, range(0)) for written in row.written[projection])
            yield _stack(found, container, row, None, None, None, parts, refs, transposed=False)
        return
    where = next(iter(group.values())).ref.name
    if row.fused and not row.model_types and not model_types(config):
        raise UnsupportedSource(
            f"expert stack {where}: gate and up may alternate or be halves, which only the model type tells, and there "
            "is none in config.json; add it, or keep the stack with --ignore"
        )
    transposed = find_orientation(row, known, config, where)
    experts = {found.ref.shape[0] for found in group.values() if found.ref.shape}
    if len(experts) != 1:
        raise UnsupportedSource(
            f"expert stack {where}: it and its partners hold {sorted(experts)} experts, expected the same number"
        )
    outputs = {name: s.outputs(transposed=transposed) for name, s in known.items()}
    for projection, found in group.items():
        parts = _parts(row, projection, outputs[projection], halves)
        partner = row.down if projection != row.down else row.members[0]
        columns = known[projection].inputs(transposed=transposed)
        if columns is None:  # packed: the other side of the expert tells
            columns = outputs[partner] // (len(row.written[partner]))
        layout = _layout(row, transposed=transposed)
        yield _stack(found, container, row, layout, next(iter(experts)), columns, parts, refs, transposed=transposed)


def _slice(found: _Found) -> Slice | None:
    if found.ref.shape is None:
        return None
    _, first, *others = found.ref.shape
    return Slice(first, None if found.packed else others[0])


def _parts(row: StackRow, projection: str, outputs: int, halves: bool) -> tuple[StackPart, ...]:
    written = row.written[projection]
    if len(written) == 1:
        return (StackPart(written[0], range(outputs)),)
    half = outputs // 2
    if row.interleaved and not halves:  # gate in the even rows
        return tuple(StackPart(name, range(k, outputs, 2)) for k, name in enumerate(written))
    return tuple(StackPart(name, range(k * half, (k + 1) * half)) for k, name in enumerate(written))


def _layout(row: StackRow, *, transposed: bool) -> StackLayout:
    if not row.fused:
        return "s_sep"
    if transposed:
        return "s_io_il" if row.interleaved else "s_io"
    return "s_oi_il" if row.interleaved else "s_oi"


def _stack(
    found: _Found,
    container: str,
    row: StackRow,
    layout: StackLayout | None,
    experts: int | None,
    columns: int | None,
    parts: tuple[StackPart, ...],
    refs: Mapping[str, TensorRef],
    *,
    transposed: bool,
) -> ExpertStack:
    biases = (f"{found.weight}_bias", f"{found.weight.removesuffix('.weight')}.bias")
    bias = next((b for b in biases if b in refs), None)
    if bias is not None and experts is not None:
        expected = (experts, sum(len(p.lines) for p in parts))
        if refs[bias].shape != expected:
            raise UnsupportedSource(f"expert bias {bias} is {refs[bias].shape}: expected {expected}")
    return ExpertStack(
        tensor=found.ref.name,
        weight=found.weight,
        row=row.id,
        prefix=expert_prefix(container),
        emit=row.emit,
        layout=layout,
        transposed=transposed,
        experts=experts,
        columns=columns,
        parts=parts,
        bias=bias,
    )


def expert_prefix(container: str) -> str:
    """`a.experts` for the container of a stack: what stands before `.<i>.gate_proj` in the names that loaders accept.

    vLLM 0.33 and SGLang 0.5.23 want a segment `experts` (or `shared_experts`), also where the stack has none
    (`moe.gate_proj`, `block_sparse_moe.input_linear`), and know nothing of `switch_mlp`, a name of mlx-lm.
    """
    parent, _, seg = container.rpartition(".")
    if seg.endswith("experts"):
        return container
    return f"{parent}.experts" if seg == "switch_mlp" else f"{container}.experts"
