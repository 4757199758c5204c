"""The plan of a GGUF output: every tensor's type and place, and the tasks that write it."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardq.checkpoint import Checkpoint
from shardq.decide import Decision
from shardq.errors import UnsupportedSource
from shardq.files.gguf import GgufSpec, KeyValue, drop_ones, plan_gguf, spec_bytes
from shardq.files.gguf_split import plan_parts
from shardq.files.safetensors import FilePlan
from shardq.gguf.file_types import FileType, find_file_type
from shardq.gguf.metadata import find_metadata, find_tensors, order_quantized
from shardq.gguf.mixtures import TypeOptions, Wanted, choose_types, order_tensors, read_model
from shardq.gguf.model_files import model_files
from shardq.gguf.options import GgufOptions
from shardq.gguf.origins import Origins, Taken
from shardq.gguf.planned import PlannedGguf, PlannedTensor
from shardq.gguf.tensors import OutputTensor
from shardq.gguf.units import find_takes, plan_tasks
from shardq.gguf.weighing import find_weighing
from shardq.importance import doubts
from shardq.importance_vectors import VectorRef
from shardq.plans import OutputFile, Plan
from shardq.recipe import Recipe
from shardq.roles import assign_roles
from shardq.schemes import BLOCKS
from shardq.search import Searches
from shardq.weights import Weights, find_weights

PLACELESS = "gguf:no place"  # rule of weights that llama.cpp's architecture has no tensor for


@dataclass(frozen=True, slots=True)
class Sourced:
    """An output tensor, the weights that its parts lie in, and whose importance they have."""

    tensor: OutputTensor
    taken: tuple[Taken, ...]
    weighing: tuple[VectorRef | None, ...]

    @property
    def is_weighed(self) -> bool:
        """True if a file of importance speaks of it."""
        return any(self.weighing)


def plan_gguf_output(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """The plan of a recipe with a file type. `checkpoint` has its texts.

    Raises UnsupportedSource for architectures, tensors and tokenizers that are not written, CheckpointIncomplete,
    SourceUnreadable, MissingPackage, BadOption, BadImportance, LayoutRefuses.
    """
    file_type, options = find_file_type(recipe.preset), recipe.gguf
    assert file_type
    assert options
    weights = find_weights(checkpoint, recipe)
    origins, model = Origins(checkpoint, weights), model_files(checkpoint)
    outputs = find_tensors(model, origins.shards())
    sourced = {o.name: _sourced(o, origins, weights, recipe) for o in outputs}
    pairs = order_quantized(find_metadata(model, outputs, file_type.number, options.tokenizer_pre))
    specs = _specs(sourced, pairs, file_type, options, weighed=_has_entries(recipe), requantize=recipe.requantize)
    prefix = f"{model.name}-{file_type.name}"
    if options.max_part_bytes is None:
        plans: Mapping[str, FilePlan] = {f"{prefix}.gguf": plan_gguf(pairs, specs)}
    else:
        plans = plan_parts(pairs, specs, prefix, options.max_part_bytes)
    planned = _planned(specs, plans, sourced, recipe)
    files = _files(checkpoint, weights, plans, sourced)
    begins = {t.name: plans[t.file].offsets[t.name][0] for t in planned.tensors}
    rounded = recipe.decode == "rounded"
    takes = find_takes(planned.tensors, begins, sourced, weights, rounded)
    tasks = plan_tasks(checkpoint, weights, takes, rounded)
    decisions = _decide(checkpoint, weights, planned, takes)
    searches = Searches({}, {}, planned.notes)
    return Plan(checkpoint, recipe, weights, decisions, files, tasks, {}, {}, {}, searches, planned)


def _has_entries(recipe: Recipe) -> bool:
    """A file of importance that says nothing is none to llama.cpp."""
    return recipe.importance is not None and bool(recipe.importance.entries)


def _sourced(tensor: OutputTensor, origins: Origins, weights: Weights, recipe: Recipe) -> Sourced:
    taken = tuple(origins.find(part) for part in tensor.parts)
    none = (None,) * len(taken)
    if recipe.importance is None or tensor.type == "F32" or len(tensor.shape) < 2 or not taken:
        return Sourced(tensor, taken, none)
    if any(t.turned for t in taken) and recipe.importance.format == "shardq":
        return Sourced(tensor, taken, none)  # its vectors are of the inputs before they are turned
    modules = [weights.tensors[t.weight].module for t in taken[:: len(taken) // tensor.slices]]
    order = tensor.parts[0].column_order
    found = find_weighing(recipe.importance, tensor.name, modules, tensor.shape[-1], order)
    return Sourced(tensor, taken, found if len(found) == len(taken) else found * len(taken))


def _specs(
    sourced: Mapping[str, Sourced],
    pairs: Sequence[KeyValue],
    file_type: FileType,
    options: GgufOptions,
    weighed: bool,
    requantize: bool,
) -> list[GgufSpec]:
    """All tensors as llama_model_quantize writes them, in its order."""
    ordered = [sourced[name] for name in order_tensors(sourced)]
    shapes = [drop_ones(tuple(reversed(s.tensor.shape))) for s in ordered]
    wanted = [
        Wanted(s.tensor.name, shape, s.tensor.type, s.is_weighed) for s, shape in zip(ordered, shapes, strict=True)
    ]
    chosen = TypeOptions(
        file_type, options.pure, options.output_type, options.embedding_type, options.overrides, requantize
    )
    types = choose_types(read_model(pairs), wanted, chosen, weighed)
    return [GgufSpec(w.name, kind, w.shape) for w, kind in zip(wanted, types, strict=True)]


def _planned(
    specs: Sequence[GgufSpec], plans: Mapping[str, FilePlan], sourced: Mapping[str, Sourced], recipe: Recipe
) -> PlannedGguf:
    homes = {name: file for file, plan in plans.items() for name in plan.offsets}
    tensors = []
    outputs: dict[str, dict[str, None]] = {}
    for spec in specs:
        made = sourced[spec.name]
        names = tuple(dict.fromkeys(t.weight for t in made.taken))
        size, home = spec_bytes(spec), homes[spec.name]
        tensors.append(PlannedTensor(spec.name, spec.type, spec.shape, size, home, names, made.is_weighed))
        for name in names:
            outputs.setdefault(name, {})[spec.name] = None
    notes: tuple[str, ...] = ()
    if given := recipe.importance:
        blocks = [t for t in tensors if t.type in BLOCKS]
        bare = [t.name for t in blocks if not t.weighed]
        bits = {BLOCKS[t.type].bits for t in blocks if t.weighed}
        notes = tuple(note for b in sorted(bits) for note in doubts(given.provenance, b))
        if bare:
            notes += (f"{given.label} weighs no errors of {len(bare)} of {len(blocks)} tensors, as {bare[0]}.",)
    return PlannedGguf(
        tuple(tensors),
        {name: tuple(own) for name, own in outputs.items()},
        {name: homes[next(iter(own))] for name, own in outputs.items()},
        notes,
    )


def _files(
    checkpoint: Checkpoint, weights: Weights, plans: Mapping[str, FilePlan], sourced: Mapping[str, Sourced]
) -> tuple[OutputFile, ...]:
    """The files, with what is known of them already."""
    order = {s.name: number for number, s in enumerate(checkpoint.shards)}
    files = []
    for name, plan in plans.items():
        own = [sourced[tensor] for tensor in plan.offsets]
        shards = {shard for s in own for t in s.taken for shard in weights.shards_of(t.weight)}
        fixed = tuple(
            (plan.offsets[s.tensor.name][0], struct.pack(f"<{len(s.tensor.values)}f", *s.tensor.values))
            for s in own
            if not s.tensor.parts
        )
        needs = tuple(sorted(shards, key=order.__getitem__)) or (checkpoint.shards[0].name,)
        files.append(OutputFile(name, needs, plan.header, plan.size_bytes, plan.offsets, {}, fixed))
    return tuple(files)


def _decide(
    checkpoint: Checkpoint, weights: Weights, planned: PlannedGguf, takes: Mapping[str, Sequence[object]]
) -> tuple[Decision, ...]:
    """What becomes of every weight: its scheme is that of the first tensor in blocks that it goes into."""
    roles = assign_roles(weights.tensors.values(), checkpoint.config, frozenset())
    types = {t.name: t.type for t in planned.tensors}
    decisions = []
    for t in weights.tensors.values():
        role = roles[t.name].role
        names = planned.outputs.get(t.name, ())
        scheme = next((BLOCKS[types[name]] for name in names if types[name] in BLOCKS), None)
        if scheme:
            decisions.append(Decision(t, role, roles[t.name].rule, "quantize", scheme))
        elif names:
            decisions.append(Decision(t, role, roles[t.name].rule, "copy", None))
        else:
            decisions.append(Decision(t, role, PLACELESS, "drop", None))
    if not takes:
        raise UnsupportedSource(f"{checkpoint.label}: none of its weights has a place in a GGUF file")
    return tuple(decisions)
