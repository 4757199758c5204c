"""Plan: a pure function of checkpoint headers, recipe and version. Every name, offset and byte is known, and every
refusal made, before a weight is read; two plans of the same input are equal."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from shardq.checkpoint import Checkpoint
from shardq.cut import ROWS, Part, cut_shard
from shardq.decide import Decision, decide_weights
from shardq.dequantize.finding import REASONS
from shardq.errors import LayoutRefuses
from shardq.files.safetensors import FilePlan, TensorSpec, plan_file
from shardq.halves import check_halves, check_tuned_halves
from shardq.layouts import find_layout
from shardq.layouts.base import Layout, ModuleChoice, OutSpec, Place, unit_rows
from shardq.reach import find_reaches
from shardq.recipe import Recipe
from shardq.roles import may_be_linear
from shardq.schemes import Scheme
from shardq.search import Searches
from shardq.tasks import CopyTask, Piece, QuantizeTask, Target, Task
from shardq.version import NUMERICS, VERSION
from shardq.weights import Weights, find_weights, is_turned, kept_shape

if TYPE_CHECKING:
    from shardq.carry import Goal
    from shardq.gguf.planned import PlannedGguf
    from shardq.replaced import ReplacedRef
    from shardq.tuned import TunedRef


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One output shard: its header is final, so workers may write its tensors in any order."""

    name: str
    shards: tuple[str, ...]  # source shards that must be known to be right before it is, in order; the first begins it
    header: bytes  # the file's first bytes, length prefix included
    size_bytes: int
    offsets: Mapping[str, tuple[int, int]]  # tensor -> first byte, byte behind the last
    specs: Mapping[str, TensorSpec]  # none of a GGUF file, whose tensors are in Plan.gguf
    fixed: tuple[tuple[int, bytes], ...] = ()  # what no weight decides: offset, content


@dataclass(frozen=True)
class Plan:
    """All that a run does, decided."""

    checkpoint: Checkpoint
    recipe: Recipe
    weights: Weights  # what the checkpoint stands for
    decisions: tuple[Decision, ...]  # one for each of the weights
    files: tuple[OutputFile, ...]  # empty when only an index is known
    tasks: tuple[Task, ...]  # in the order in which they should start; ids are positions
    places: Mapping[str, Place]  # modules whose tensors are slices of stacks
    reaches: Mapping[str, tuple[str, ...]]  # quantized tensor -> those whose largest magnitudes it needs; see Scheme
    goals: "Mapping[str, Goal]"  # tensor whose codes are carried -> how
    searches: Searches
    gguf: "PlannedGguf | None" = None  # of files of llama.cpp
    tuned: "Mapping[str, TunedRef]" = field(default_factory=dict)  # quantized tensor -> codes that were tuned for it
    replaced: "Mapping[str, ReplacedRef]" = field(default_factory=dict)  # copied tensor -> what is written instead

    @property
    def layout(self) -> Layout:
        """The layout object of the recipe."""
        return find_layout(self.recipe.layout)

    @property
    def settles(self) -> bool:
        """True if files are made of so many shards that these go one by one, when what was made of each is durable;
        else a shard goes with the files that need it."""
        return self.gguf is not None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that decides the output's bytes, in hex."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def file_of(self, decision: Decision) -> str | None:
        """The output file that a source tensor goes into; None if it is dropped."""
        return self.gguf.files.get(decision.tensor.name) if self.gguf else self._files.get(decision.tensor.name)

    def names_of(self, decision: Decision) -> tuple[str, ...]:
        """Names of the output tensors that a source tensor becomes, or becomes a part of; none if it is dropped."""
        if self.gguf:
            return self.gguf.outputs.get(decision.tensor.name, ())
        if decision.action == "drop":
            return ()
        return tuple(s.name for s in _specs(decision, self.layout, self.places))

    @cached_property
    def _files(self) -> dict[str, str]:
        homes = _homes(self.decisions, self.places)
        return {d.tensor.name: _file_of(d, self.places, homes) for d in self.decisions if d.action != "drop"}

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
            **({"source.texts": _hashes(c.texts)} if self.gguf else {}),
            "version": VERSION,
            "numerics": NUMERICS,
        }

    def choices(self) -> tuple[ModuleChoice, ...]:
        """Every module that a loader may believe to be quantized: the quantized ones, and what is kept and may be a
        Linear layer or experts to a loader."""
        found = (
            ModuleChoice(self._module(d), d.role.value, d.scheme)
            for d in self.decisions
            if d.scheme or (d.action == "copy" and may_be_linear(d.tensor, d.role))
        )
        return tuple(dict.fromkeys(found))  # the slices of a stack are one module

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is odd but harmless about the checkpoint, and what a conversion changes beside the weights."""
        lost = [n for n, a in self.weights.absorbed.items() if a.reason == REASONS["activation"]]
        if self.recipe.purpose != "convert" or not lost or all(d.scheme.activation for d in self.decisions if d.scheme):
            return self.checkpoint.warnings
        names = lost[0] + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")
        told = (
            f"Scales of activations stay behind: {names}. Weights are those of the source, but servers leave "
            "activations in 16 bits where the source has them quantized by these scales."
        )
        return (*self.checkpoint.warnings, told)

    def _module(self, d: Decision) -> str:
        place = self.places.get(d.tensor.module) if d.scheme else None
        return place.module if place else d.tensor.module

    @property
    def source_bytes(self) -> int:
        """Bytes of all source tensors."""
        return sum(t.size_bytes for t in self.checkpoint.tensors.values())

    @property
    def output_bytes(self) -> int:
        """Bytes of all output shards, headers included."""
        return sum(f.size_bytes for f in self.files)


def make_plan(checkpoint: Checkpoint, recipe: Recipe, *, before_tuning: bool = False) -> Plan:
    """The plan of a checkpoint under a recipe; for a GGUF file `checkpoint` has its texts. `before_tuning`: what only
    data give may still be missing. Raises what `decide` raises, and what gguf.planning does."""
    if recipe.gguf:
        from shardq.gguf.planning import plan_gguf_output  # brings numpy and, where it is installed, gguf

        return plan_gguf_output(checkpoint, recipe)
    check_halves(checkpoint, recipe)
    weights = find_weights(checkpoint, recipe)
    check_tuned_halves(weights.stacks, recipe)
    if recipe.purpose == "convert":
        from shardq.conversion import common_scheme

        common = common_scheme(tuple(weights.tensors.values()), checkpoint.config, recipe)
        recipe = replace(recipe, scheme=common or recipe.scheme)
    decisions = decide_weights(weights, checkpoint, recipe)
    if recipe.fold:
        from shardq.fold_weights import check_kept

        check_kept(decisions)
    layout = find_layout(recipe.layout)
    modules = [d.tensor.module for d in decisions if d.scheme]
    places = {m: weights.places[m] for m in modules if m in weights.places}
    places |= layout.places(modules, checkpoint.config)
    if any(t.shape is None for t in weights.tensors.values()):
        return Plan(checkpoint, recipe, weights, decisions, (), (), places, {}, {}, Searches({}, {}))
    goals = {d.tensor.name: d.goal for d in decisions if d.goal}
    tuned, replaced = _match_tuned(decisions, recipe, before_tuning)
    made = [d for d in decisions if d.tensor.name not in tuned]
    reaches = find_reaches(_reaching(made, goals), checkpoint.config)
    written = [d for d in decisions if d.action != "drop"]
    homes = _homes(written, places)
    files = _files(checkpoint, weights, written, layout, places, homes, reaches)
    searches = _find_searches(made, recipe, weights)
    tasks = _tasks(checkpoint, recipe, written, places, homes, files, searches, tuned, replaced)
    plan = Plan(
        checkpoint, recipe, weights, decisions, files, tasks, places, reaches, goals, searches,
        tuned=tuned, replaced=replaced,
    )  # fmt: skip
    layout.config_block(recipe.scheme, plan.choices(), VERSION)  # refuses what no configuration can say
    if lost := [f.name for f in files if not fnmatchcase(f.name, layout.file_names)]:
        raise LayoutRefuses(
            f"layout {layout.name}: its readers look for {layout.file_names} and would not find {lost[0]}: rename the "
            "shards of the source, also in its index, or choose another --format"
        )
    return plan


def _match_tuned(
    decisions: Sequence[Decision], recipe: Recipe, before_tuning: bool
) -> "tuple[Mapping[str, TunedRef], Mapping[str, ReplacedRef]]":
    """By weight, what a tuning has given. Raises BadTuned, and BadOption for scales that only data give."""
    if not recipe.tuned and not any(d.scheme and d.scheme.calibrated for d in decisions):
        return {}, {}
    from shardq.replaced import match_replaced  # with the formats of a tuned folder
    from shardq.tuned import check_input_scales, match_tuned

    tuned = match_tuned(decisions, recipe.tuned) if recipe.tuned else {}
    if not before_tuning:
        check_input_scales(decisions, find_layout(recipe.layout), tuned, recipe.tuned)
    return tuned, match_replaced(decisions, recipe.tuned.replaced, recipe.tuned.label) if recipe.tuned else {}


def _find_searches(decisions: Sequence[Decision], recipe: Recipe, weights: Weights) -> Searches:
    """Raises BadImportance, BadOption."""
    if recipe.search == "none":
        return Searches({}, {})
    from shardq.searching import find_searches  # with importance and its files

    return find_searches(decisions, recipe, weights.importance)


def _reaching(decisions: Sequence[Decision], goals: "Mapping[str, Goal]") -> Iterator[tuple[str, str, Scheme]]:
    """What may need magnitudes: all that is quantized, and of what is carried only codes that get a global scale."""
    for d in decisions:
        to = goals.get(d.tensor.name)
        if d.scheme and (to is None or _needs_largest(d, to)):
            yield d.tensor.module, d.tensor.name, d.scheme


def _needs_largest(d: Decision, to: "Goal") -> bool:
    from shardq.carry import needs_largest

    return needs_largest(d.tensor.encoded[0], to)


def _specs(d: Decision, layout: Layout, places: Mapping[str, Place]) -> tuple[TensorSpec, ...]:
    t = d.tensor
    assert t.dtype is not None
    assert t.shape is not None
    if d.scheme is None:
        return (TensorSpec(t.name, t.dtype, kept_shape(t)),)
    rows, columns = t.shape
    place = places.get(t.module, Place(t.module, 0, 0))
    return tuple(
        TensorSpec(f"{place.module}.{o.suffix}", o.dtype, place.stacked(o.shape))
        for o in _outputs(layout.name, d.scheme, t.dtype, rows, columns)
    )


@lru_cache(maxsize=1024)
def _outputs(layout: str, scheme: Scheme, dtype: str, rows: int, columns: int) -> tuple[OutSpec, ...]:
    """As of the layout of that name: equal matrices come by the thousand."""
    return find_layout(layout).outputs(scheme, dtype, rows, columns)


def _homes(decisions: Sequence[Decision], places: Mapping[str, Place]) -> dict[str, str]:
    """The file of each stack: that of its first slice. Raises LayoutRefuses for a stack that is not whole or not of one
    kind."""
    stacks: dict[str, list[Decision]] = {}
    for d in decisions:
        if d.scheme and (place := places.get(d.tensor.module)):
            stacks.setdefault(place.module, []).append(d)
    for name, ds in stacks.items():
        kinds = {(d.scheme, d.tensor.shape, d.tensor.dtype) for d in ds}
        indices = sorted(places[d.tensor.module].index for d in ds)
        count = places[ds[0].tensor.module].count
        if indices != list(range(count)) or len(kinds) > 1:
            raise LayoutRefuses(
                f"{name} is a stack of {count} matrices to its readers, and {len(ds)} of {len(kinds)} kinds would be "
                f"quantized, the first {ds[0].tensor.name}: quantize or --ignore all of them alike"
            )
    return {name: ds[0].tensor.shard for name, ds in stacks.items()}


def _file_of(d: Decision, places: Mapping[str, Place], homes: Mapping[str, str]) -> str:
    place = places.get(d.tensor.module) if d.scheme else None
    return homes[place.module] if place else d.tensor.shard


def _files(
    checkpoint: Checkpoint,
    weights: Weights,
    decisions: Sequence[Decision],
    layout: Layout,
    places: Mapping[str, Place],
    homes: Mapping[str, str],
    reaches: Mapping[str, tuple[str, ...]],
) -> tuple[OutputFile, ...]:
    """Files in the order and with the names of the source shards; one that would hold nothing is not written, unless
    the source's own holds nothing."""
    order = {s.name: number for number, s in enumerate(checkpoint.shards)}
    specs: dict[str, dict[str, TensorSpec]] = {name: {} for name in order}
    needs: dict[str, set[str]] = {name: {name} for name in order}
    for d in decisions:
        file = _file_of(d, places, homes)
        specs[file] |= {s.name: s for s in _specs(d, layout, places)}
        for name in (d.tensor.name, *reaches.get(d.tensor.name, ())):
            needs[file].update(weights.shards_of(name))
    files: list[OutputFile] = []
    for name, own in specs.items():
        if not own and any(t.shard == name for t in checkpoint.tensors.values()):
            continue  # all that it held went into stacks elsewhere, or was dropped
        planned: FilePlan = plan_file(list(own.values()), dict(layout.metadata))
        first, *others = sorted(needs[name], key=lambda s: (s != name, order[s]))
        files.append(OutputFile(name, (first, *others), planned.header, planned.size_bytes, planned.offsets, own))
    return tuple(files)


def _tasks(
    checkpoint: Checkpoint,
    recipe: Recipe,
    decisions: Sequence[Decision],
    places: Mapping[str, Place],
    homes: Mapping[str, str],
    files: Sequence[OutputFile],
    searches: Searches,
    tuned: "Mapping[str, TunedRef]",
    replaced: "Mapping[str, ReplacedRef]",
) -> tuple[Task, ...]:
    """All tasks: those of the cut, shard by shard."""
    by_name = {d.tensor.name: d for d in decisions}
    by_file = {f.name: f for f in files}
    by_shard: dict[str, list[Decision]] = {s.name: [] for s in checkpoint.shards}
    for d in decisions:
        by_shard[d.tensor.shard].append(d)
    tasks: list[Task] = []
    for shard, ds in by_shard.items():
        for unit in cut_shard(d.tensor for d in ds):
            d = by_name[unit[0].tensor.name]
            number = len(tasks)
            if d.scheme is None and not d.tensor.encoded:
                pieces = tuple(_piece(p, by_file[shard], replaced.get(p.tensor.name)) for p in unit)
                tasks.append(CopyTask(number, shard, shard, pieces))
            else:
                file = by_file[_file_of(d, places, homes)]
                task = _quantize_task(number, unit[0], d, file, recipe, places, searches)
                tasks.append(replace(task, tuned=tuned[d.tensor.name]) if d.tensor.name in tuned else task)
    return tuple(tasks)


def _piece(p: Part, file: OutputFile, replaced: "ReplacedRef | None") -> Piece:
    offset = p.begin - p.tensor.begin
    target = file.offsets[p.tensor.name][0] + offset
    return Piece(p.tensor.name, p.begin, target, p.size_bytes, p.strip_bytes, replaced and replaced.behind(offset))


def _quantize_task(
    number: int,
    part: Part,
    d: Decision,
    file: OutputFile,
    recipe: Recipe,
    places: Mapping[str, Place],
    searches: Searches,
) -> QuantizeTask:
    t, layout = d.tensor, find_layout(recipe.layout)
    assert t.dtype is not None
    assert t.shape is not None
    assert part.rows is not None
    e = t.encoded[part.index] if t.encoded else None
    rows, columns = (e.rows, e.columns) if e else t.shape
    reads_back = False
    if d.scheme is None:
        targets: tuple[Target, ...] = (_kept_target(part, d, file),)
    else:
        assert ROWS % unit_rows(layout, d.scheme) == 0, f"{layout.name} cuts {d.scheme.name} elsewhere than slabs"
        outputs, begins = _outputs(layout.name, d.scheme, t.dtype, rows, columns), _targets(d, file, layout, places)
        targets = tuple(Target(o.suffix, o.dtype, o.shape, at) for o, at in zip(outputs, begins, strict=True))
        reads_back = layout.unpacks_to(d.scheme) != d.scheme
    return QuantizeTask(
        number, t.shard, file.name, t.name, t.dtype, part.begin if e else t.begin, rows, columns, *part.rows, d.scheme,
        layout.name, targets,
        reads_back=reads_back,
        encoded=e,
        span_bytes=part.size_bytes if e else 0,
        rounds=e is not None and e.rounds(recipe.decode == "rounded"),
        goal=d.goal,
        search=searches.searches.get(t.name),
        importance=searches.vectors.get(t.name),
        turned=d.scheme is None and is_turned(t),
    )  # fmt: skip


def _targets(d: Decision, file: OutputFile, layout: Layout, places: Mapping[str, Place]) -> Iterator[int]:
    """Where the tensors of a module begin in its file."""
    place = places.get(d.tensor.module, Place(d.tensor.module, 0, 0))
    for spec in _specs(d, layout, places):
        yield place.slice_of(*file.offsets[spec.name])[0]


def _kept_target(part: Part, d: Decision, file: OutputFile) -> Target:
    """Where a matrix goes that is only decoded: the whole tensor, or its slice of a stack."""
    t = d.tensor
    assert t.dtype is not None
    e = t.encoded[part.index]
    begin, end = file.offsets[t.name]
    shape = (e.columns, e.rows) if is_turned(t) else (e.rows, e.columns)
    return Target("", t.dtype, shape, begin + part.index * ((end - begin) // len(t.encoded)))


def _hashes(texts: Mapping[str, bytes]) -> list[list[str]]:
    return sorted([name, hashlib.sha256(data).hexdigest()] for name, data in texts.items())
