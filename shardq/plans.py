"""Plan: a pure function of checkpoint headers, recipe and version. Every name, offset and byte is known, and every
refusal made, before a weight is read; two plans of the same input are equal."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from shardq.checkpoint import Checkpoint, TensorRef
from shardq.decide import Decision, decide
from shardq.files.safetensors import FilePlan, TensorSpec, plan_file
from shardq.formats import STORAGE
from shardq.layouts import find_layout
from shardq.layouts.base import Layout, ModuleChoice, unit_rows
from shardq.recipe import Recipe
from shardq.roles import Role
from shardq.schemes import Scheme
from shardq.tasks import SLAB_BYTES, SPAN_BYTES, CopyTask, Piece, QuantizeTask, Target, Task
from shardq.version import NUMERICS, VERSION

COPY_PIECES = 64  # small tensors copied by one task; keeps a task's message below 4 kB


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One output shard: its header is final, so workers may write its tensors in any order."""

    name: str
    shard: str  # the source shard whose tensors it holds
    header: bytes  # the file's first bytes, length prefix included
    size_bytes: int
    offsets: Mapping[str, tuple[int, int]]  # tensor -> first byte, byte behind the last
    specs: Mapping[str, TensorSpec]


@dataclass(frozen=True)
class Plan:
    """All that a run does, decided."""

    checkpoint: Checkpoint
    recipe: Recipe
    decisions: tuple[Decision, ...]  # one for every source tensor
    files: tuple[OutputFile, ...]  # empty when only an index is known
    tasks: tuple[Task, ...]  # in the order in which they should start; ids are positions

    @property
    def layout(self) -> Layout:
        """The layout object of the recipe."""
        return find_layout(self.recipe.layout)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that decides the output's bytes, in hex."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """What decides the output's bytes, key by key; the keys are named when a folder was made otherwise."""
        c = self.checkpoint
        return {
            "source.label": c.label,
            "source.commit": c.commit,
            "source.shards": [[s.name, s.size_bytes, s.sha256, s.header_sha256] for s in c.shards],
            "source.config": hashlib.sha256(c.config_bytes or b"").hexdigest(),
            "source.files": sorted([f.name, f.size_bytes] for f in c.side_files),
            **{f"recipe.{k}": v for k, v in self.recipe.as_dict().items()},
            "version": VERSION,
            "numerics": NUMERICS,
        }

    def choices(self) -> tuple[ModuleChoice, ...]:
        """Every module that a loader may believe to be quantized: the quantized ones, and kept 2-D matrices that are
        Linear layers to a loader (embeddings, norms and convolutions are not)."""
        loader_ignores = (
            Role.EMBEDDING,
            Role.NORM,
            Role.CONV,
            Role.VECTOR,
            Role.BUFFER,
            Role.EXPERT_STACK,
            Role.UNKNOWN,
        )
        return tuple(
            ModuleChoice(d.tensor.module, d.role.value, d.scheme)
            for d in self.decisions
            if d.scheme or (d.role not in loader_ignores and d.tensor.name.endswith(".weight"))
        )

    @property
    def source_bytes(self) -> int:
        """Bytes of all source tensors."""
        return sum(t.size_bytes for t in self.checkpoint.tensors.values())

    @property
    def output_bytes(self) -> int:
        """Bytes of all output shards, headers included."""
        return sum(f.size_bytes for f in self.files)

    @property
    def largest_task_bytes(self) -> int:
        """Memory of the largest task."""
        return max((t.cost_bytes for t in self.tasks), default=0)

    @property
    def largest_span_bytes(self) -> int:
        """Memory that range mode needs for one piece: SPAN_BYTES, less for small shards, more for huge rows."""
        largest_shard = max((s.size_bytes for s in self.checkpoint.shards), default=0)
        largest_task = max((end - begin for begin, end in (t.extent for t in self.tasks)), default=0)
        return max(min(SPAN_BYTES, largest_shard), largest_task)


def make_plan(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """The plan of a checkpoint under a recipe. Raises what `decide` raises."""
    decisions = decide(checkpoint, recipe)
    if any(t.shape is None for t in checkpoint.tensors.values()):
        return Plan(checkpoint, recipe, decisions, (), ())
    layout = find_layout(recipe.layout)
    by_shard: dict[str, list[Decision]] = {s.name: [] for s in checkpoint.shards}
    for d in decisions:
        by_shard[d.tensor.shard].append(d)
    files: list[OutputFile] = []
    tasks: list[Task] = []
    for shard, ds in by_shard.items():
        file = _output_file(shard, ds, layout)
        files.append(file)
        made = sorted(_tasks(ds, file, layout), key=lambda t: t.source_bytes, reverse=True)  # no giant at the tail
        first = len(tasks)
        tasks.extend(replace(t, id=first + i) for i, t in enumerate(made))
    return Plan(checkpoint, recipe, decisions, tuple(files), tuple(tasks))


def output_names(decision: Decision, layout: Layout) -> tuple[str, ...]:
    """Names of the output tensors that a source tensor becomes."""
    return tuple(s.name for s in _specs(decision, layout))


def _specs(d: Decision, layout: Layout) -> tuple[TensorSpec, ...]:
    t = d.tensor
    assert t.dtype is not None
    assert t.shape is not None
    if d.scheme is None:
        return (TensorSpec(t.name, t.dtype, t.shape),)
    rows, columns = t.shape
    return tuple(
        TensorSpec(f"{t.module}.{o.suffix}", o.dtype, o.shape) for o in layout.outputs(d.scheme, t.dtype, rows, columns)
    )


def _output_file(shard: str, ds: Sequence[Decision], layout: Layout) -> OutputFile:
    specs = [s for d in ds for s in _specs(d, layout)]
    planned: FilePlan = plan_file(specs, dict(layout.metadata))
    return OutputFile(
        shard,
        shard,
        planned.header,
        planned.size_bytes,
        planned.offsets,
        {s.name: s for s in specs},
    )


def _tasks(ds: Sequence[Decision], file: OutputFile, layout: Layout) -> Iterator[Task]:
    """All tasks of a shard in the order of its bytes. Small copies share a task, but only inside one window of
    SPAN_BYTES, so that range mode can bring every task's bytes in one piece."""
    window = 0  # where the present one begins
    batch: list[Piece] = []
    for atom in _atoms(ds, file, layout):
        begin, end = atom.extent if isinstance(atom, QuantizeTask) else (atom.begin, atom.begin + atom.size_bytes)
        apart = end - window > SPAN_BYTES
        if batch and (apart or len(batch) == COPY_PIECES):
            yield CopyTask(-1, file.shard, file.name, tuple(batch))
            batch = []
        if apart:
            window = begin
        if isinstance(atom, QuantizeTask):
            yield atom
        else:
            batch.append(atom)
    if batch:
        yield CopyTask(-1, file.shard, file.name, tuple(batch))


def _atoms(ds: Sequence[Decision], file: OutputFile, layout: Layout) -> Iterator[QuantizeTask | Piece]:
    """What a shard's tensors come to, none larger than a slab, in the order of their bytes."""
    for d in sorted(ds, key=lambda d: d.tensor.begin):
        t = d.tensor
        if d.scheme is not None:
            targets = tuple(
                Target(s.name.removeprefix(t.module + "."), s.dtype, s.shape, file.offsets[s.name][0])
                for s in _specs(d, layout)
            )
            yield from _slabs(t, d.scheme, file.name, layout, targets)
            continue
        target = file.offsets[t.name][0]
        for at in range(0, t.size_bytes, SLAB_BYTES):
            yield Piece(t.name, t.begin + at, target + at, min(SLAB_BYTES, t.size_bytes - at))


def _slabs(
    t: TensorRef, scheme: Scheme, file: str, layout: Layout, targets: tuple[Target, ...]
) -> Iterator[QuantizeTask]:
    assert t.dtype is not None
    assert t.shape is not None
    rows, columns = t.shape
    unit = unit_rows(layout, scheme)
    slab = max(1, SLAB_BYTES // (columns * STORAGE[t.dtype].bits // 8) // unit) * unit
    for row in range(0, rows, slab):
        yield QuantizeTask(
            -1, t.shard, file, t.name, t.dtype, t.begin, rows, columns, row, min(rows, row + slab), scheme,
            layout.name, targets,
        )  # fmt: skip
