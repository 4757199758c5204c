"""What a checkpoint stands for: its tensors, with weights in place of the codes and scales that some are stored as, and
with a matrix for each expert in place of the stacks that are quantized. Headers alone decide."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal

from shardq.checkpoint import Checkpoint, TensorRef
from shardq.dequantize.finding import find_encoded
from shardq.errors import UnsupportedSource
from shardq.layouts import find_layout
from shardq.layouts.base import Place
from shardq.recipe import Recipe
from shardq.roles import Role, assign_roles, prediction_tensors
from shardq.untied import untied_head

if TYPE_CHECKING:
    from shardq.dequantize.base import Encoded
    from shardq.dequantize.finding import Found
    from shardq.fold import Fold
    from shardq.importance_vectors import SizesRef
    from shardq.stacks import ExpertStack

SHOWN: Final = 4  # problems told in a message before "and N more"
TURNED_KINDS: Final = (
    "mxfp4_gptoss",
)  # whose stacks readers decode to [in, out], not as codes lie (transformers 5.23)


@dataclass(frozen=True, slots=True)
class Absorbed:
    """A tensor of the source that is no tensor of its own among the weights."""

    fate: Literal["decoded", "split", "dropped"]
    into: str  # the weight that it is a part of, or the prefix of the experts that it was split into; empty if dropped
    reason: str  # the kind of source, the row of the stack, or why it stays behind


@dataclass(frozen=True, slots=True)
class Weights:
    """All of a checkpoint: each of its tensors is among `tensors`, or a key of `absorbed`."""

    tensors: Mapping[str, TensorRef]
    absorbed: Mapping[str, Absorbed]
    places: Mapping[str, Place]  # modules that go back into a stack, as its readers want
    stacks: "tuple[ExpertStack, ...]" = ()  # those of the source that were split
    importance: "Mapping[str, SizesRef]" = field(default_factory=dict)  # of weights, as a fold has it

    @property
    def were_encoded(self) -> bool:
        """True if the source is quantized."""
        return any(a.fate == "decoded" for a in self.absorbed.values())

    def shards_of(self, tensor: str) -> Iterator[str]:
        """The shards that a weight is made of."""
        t = self.tensors[tensor]
        yield t.shard
        for e in t.encoded:
            for part in e.parts:
                yield part.shard


def find_weights(checkpoint: Checkpoint, recipe: Recipe) -> Weights:
    """The weights of a checkpoint, in its order. Stacks that the recipe keeps stay whole.

    Raises UnsupportedSource for codes without scales and the reverse, for shapes that do not go together, for sources
    that have no reader, and for stacks that cannot be told apart; BadFold.
    """
    tensors, absorbed = _decode(checkpoint, recipe.dtype)
    if recipe.purpose == "dequantize":
        return Weights(tensors, absorbed, {})
    if recipe.quant_lm_head and (head := untied_head(tensors, checkpoint.config)):
        tensors[head.name] = head
    config, taken = checkpoint.config, taken_parts(recipe)
    verdicts = assign_roles(tensors.values(), config, taken)
    dropped = prediction_tensors(tensors.values(), config) if recipe.mtp == "drop" else frozenset()

    def is_split(t: TensorRef) -> bool:
        ignored = any(p.matches(n) for p in recipe.ignore for n in (t.module, t.name))
        wanted = verdicts[t.name].role is Role.EXPERT_STACK and not ignored and t.name not in dropped
        return wanted and (recipe.purpose == "quantize" or bool(t.encoded))

    halves = find_layout(recipe.layout).halves_experts
    return _folded(_split_stacks(checkpoint, tensors, absorbed, is_split, halves), checkpoint, recipe.fold)


def recorded_weights(
    checkpoint: Checkpoint, kept: Container[str], dtype: str | None, fold: "Fold | None", *, halves: bool
) -> Weights:
    """The weights that an output was made of: stacks were split that are not among the tensors `kept`, which its ledger
    names, and a tied head has weights if it is; `dtype` is that of its recipe, `halves` as find_stacks has it. Raises
    as find_weights."""
    tensors, absorbed = _decode(checkpoint, dtype)
    if (head := untied_head(tensors, checkpoint.config)) and head.name in kept:
        tensors[head.name] = head

    def is_split(t: TensorRef) -> bool:
        return len(t.shape or ()) == 3 and t.name not in kept

    return _folded(_split_stacks(checkpoint, tensors, absorbed, is_split, halves), checkpoint, fold)


def _folded(weights: Weights, checkpoint: Checkpoint, fold: "Fold | None") -> Weights:
    if fold is None:
        return weights
    from shardq.fold_weights import fold_weights  # with all that a fold needs

    made = fold_weights(weights.tensors, checkpoint, fold)
    return replace(weights, tensors=made.tensors, importance=made.importance)


def taken_parts(recipe: Recipe) -> frozenset[Role]:
    """Parts of which Linear layers are quantized like those of the text model."""
    wanted = ((Role.MTP, recipe.mtp == "quantize"), (Role.NONTEXT, recipe.quant_nontext))
    return frozenset(role for role, on in wanted if on)


def kept_shape(t: TensorRef) -> tuple[int, ...]:
    """The shape that a tensor has where it is kept: of some stacks another than that of its slices as rows."""
    assert t.shape is not None
    return (*t.shape[:-2], t.shape[-1], t.shape[-2]) if is_turned(t) else t.shape


def is_turned(t: TensorRef) -> bool:
    """True if rows become columns where it is kept as a stack."""
    return bool(t.encoded) and t.encoded[0].index is not None and t.encoded[0].kind in TURNED_KINDS


# --- quantized sources ---------------------------------------------------------------------------------------------


def _decode(checkpoint: Checkpoint, dtype: str | None) -> tuple[dict[str, TensorRef], dict[str, Absorbed]]:
    found = find_encoded(checkpoint.tensors.values(), checkpoint.config, checkpoint.peeked)
    if all(s.header_sha256 is None for s in checkpoint.shards):  # recorded, without content: as an index has them
        found = replace(found, wanted=())
    _refuse_problems(found, checkpoint.label)
    owners = {c.name: c for c in found.companions if c.paired}
    tensors: dict[str, TensorRef] = {}
    absorbed: dict[str, Absorbed] = {}
    for t in checkpoint.tensors.values():
        owner = owners.get(t.name)
        if reason := found.dropped.get(t.name):
            absorbed[t.name] = Absorbed("dropped", "", reason)
        elif owner is None:
            add_weight(tensors, t)
        else:
            if owner.part == "codes":
                add_weight(tensors, _logical(t, owner.weight, found.encoded.get(owner.weight, ()), dtype))
            if t.name != owner.weight:
                absorbed[t.name] = Absorbed("decoded", owner.weight, owner.kind)
    return tensors, absorbed


def _logical(codes: TensorRef, name: str, encoded: "Sequence[Encoded]", dtype: str | None) -> TensorRef:
    """The weight that codes stand for, in the type of its reader unless one is given; of unknown shape where only an
    index is known."""
    if not encoded:
        return replace(codes, name=name, dtype=None, shape=None)
    first = encoded[0]
    stacked = () if first.index is None else (len(encoded),)
    return TensorRef(
        name,
        codes.shard,
        dtype or first.dtype,
        (*stacked, first.rows, first.columns),
        codes.begin,
        codes.end,
        tuple(encoded),
    )


def add_weight(tensors: dict[str, TensorRef], t: TensorRef) -> None:
    """Put a weight among others. Raises UnsupportedSource if it is there."""
    if t.name in tensors:
        raise UnsupportedSource(
            f"{t.name} is in {tensors[t.name].shard} and, in another form, in {t.shard}: expected it once; remove the "
            "one that is not the model's"
        )
    tensors[t.name] = t


def _refuse_problems(found: "Found", label: str) -> None:
    told = [str(p) for p in found.problems]
    told += [f"{t.name} in {t.shard} says the shape of others and was not read" for t in found.wanted]
    if told:
        more = f"; and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
        raise UnsupportedSource(f"{label} cannot be read: {'; '.join(told[:SHOWN])}{more}")


# --- expert stacks -------------------------------------------------------------------------------------------------


def _split_stacks(
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorRef],
    absorbed: Mapping[str, Absorbed],
    is_split: Callable[[TensorRef], bool],
    halves: bool,
) -> Weights:
    wanted = {n for n, t in tensors.items() if is_split(t)}
    if not wanted:
        return Weights(tensors, absorbed, {})
    from shardq.split_stacks import split_stacks  # most models have no stacks

    return split_stacks(checkpoint, tensors, absorbed, wanted, halves)
