"""The units of work of a GGUF output: the cut of the checkpoint that all outputs share, and what each unit writes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from shardq.block_tasks import BlocksTask, Take, Vector, VectorsTask
from shardq.checkpoint import Checkpoint, TensorRef
from shardq.cut import Part, cut_shard, is_matrix
from shardq.errors import LayoutRefuses, UnsupportedSource
from shardq.formats import WEIGHT_DTYPES
from shardq.gguf.mixtures import SOURCE_TYPE
from shardq.gguf.planned import PlannedTensor
from shardq.weights import Weights

if TYPE_CHECKING:
    from shardq.gguf.planning import Sourced


def find_takes(
    tensors: Sequence[PlannedTensor],
    begins: Mapping[str, int],
    sourced: "Mapping[str, Sourced]",
    weights: Weights,
    rounded: bool,
) -> dict[str, tuple[Take, ...]]:
    """What becomes of each weight; `rounded`: by way of BF16, as llama.cpp's converter has it. Raises UnsupportedSource
    for weights that are no floats, and for shapes that do not go together."""
    takes: dict[str, list[Take]] = {}
    for t in tensors:
        made, at = sourced[t.name], begins[t.name]
        for taken, part, ref in zip(made.taken, made.tensor.parts, made.weighing, strict=True):
            weight = weights.tensors[taken.weight]
            take = Take(
                t.name, t.file, at, t.type, taken.rows, part.order, part.column_order, taken.turned, made.tensor.added,
                made.tensor.negative_exp, ref, taken.carried and t.type == made.tensor.type,
                narrowed=rounded and made.tensor.type is None and weight.dtype != SOURCE_TYPE,
            )  # fmt: skip
            at += _check(weight, take)
            takes.setdefault(taken.weight, []).append(take)
        if made.taken and at != begins[t.name] + t.size_bytes:
            raise UnsupportedSource(
                f"{t.name} of a GGUF file has {t.size_bytes} bytes, and {made.taken[0].weight} and what goes with it "
                f"make {at - begins[t.name]}: expected tensors of one shape"
            )
    return {name: tuple(own) for name, own in takes.items()}


def plan_tasks(
    checkpoint: Checkpoint, weights: Weights, takes: Mapping[str, tuple[Take, ...]], rounded: bool
) -> tuple[BlocksTask | VectorsTask, ...]:
    """All tasks, shard by shard; ids are positions. Raises LayoutRefuses for what is too large to be turned."""
    by_shard: dict[str, list[TensorRef]] = {s.name: [] for s in checkpoint.shards}
    for t in weights.tensors.values():
        by_shard[t.shard].append(t)
    tasks: list[BlocksTask | VectorsTask] = []
    for tensors in by_shard.values():
        for unit in cut_shard(tensors):
            tasks.append(_task(len(tasks), unit, takes, rounded))
    return tuple(tasks)


def _task(
    number: int, unit: tuple[Part, ...], takes: Mapping[str, tuple[Take, ...]], rounded: bool
) -> BlocksTask | VectorsTask:
    part = unit[0]
    if part.rows is None:
        return _vectors_task(number, unit, takes)
    t = part.tensor
    assert t.dtype is not None
    assert t.shape is not None
    e = t.encoded[part.index] if t.encoded else None
    rows, columns = (e.rows, e.columns) if e else t.shape
    own = tuple(_within(take, part, t) for take in takes.get(t.name, ()))
    return BlocksTask(
        number, t.shard, t.name, t.dtype, part.begin if e else t.begin, rows, columns, *part.rows,
        tuple(take for take in own if take),
        encoded=e,
        span_bytes=part.size_bytes if e else 0,
        rounds=e is not None and e.rounds(rounded),
    )  # fmt: skip


def _within(take: Take, part: Part, t: TensorRef) -> Take | None:
    """A take, if rows of this part belong to it."""
    assert part.rows is not None
    inside = take.within(*part.rows)
    if inside and take.turned and len(inside) < len(take.rows):
        raise LayoutRefuses(
            f"{t.name}: its rows {take.rows.start} to {take.rows.stop} become columns of {take.tensor} and are not "
            "read at once, because the tensor is too large"
        )
    return take if inside else None


def _vectors_task(number: int, unit: tuple[Part, ...], takes: Mapping[str, tuple[Take, ...]]) -> VectorsTask:
    first = unit[0]
    begin, end = min(p.begin for p in unit), max(p.begin + p.size_bytes for p in unit)
    vectors = tuple(_vectors(unit, takes))
    source_bytes = sum(p.size_bytes for p in unit)
    return VectorsTask(number, first.tensor.shard, first.tensor.name, source_bytes, (begin, end), vectors)


def _vectors(unit: tuple[Part, ...], takes: Mapping[str, tuple[Take, ...]]) -> Iterator[Vector]:
    for part in unit:
        t = part.tensor
        if own := takes.get(t.name):
            assert t.dtype is not None
            yield Vector(t.name, t.dtype, t.begin, t.numel, own)


def _check(t: TensorRef, take: Take) -> int:
    """The bytes that `take` makes of `t`. Raises UnsupportedSource where it cannot."""
    assert t.shape is not None
    if t.dtype not in WEIGHT_DTYPES:
        raise UnsupportedSource(f"{t.name} in {t.shard} is {t.dtype}: expected one of {', '.join(WEIGHT_DTYPES)}")
    is_rows = bool(t.encoded) or is_matrix(t)
    rows, columns = (*t.shape, 1)[:2] if is_rows else (t.numel, 1)
    needs_rows = take.type != "F32" or take.turned or take.column_order is not None
    orders = ((take.order, len(take.rows)), (take.column_order, columns))
    is_odd = len(t.shape) > 2 or take.negative_exp if is_rows else needs_rows
    if is_odd or any(o and o.size != size for o, size in orders) or not take.rows or take.rows[-1] >= rows:
        raise UnsupportedSource(
            f"{t.name} in {t.shard} is {list(t.shape)}: {take.tensor} of a GGUF file needs {len(take.rows)} rows of a "
            "matrix of it"
        )
    return take.row_bytes(columns) * (columns if take.turned else len(take.rows))
