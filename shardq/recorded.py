"""What a ledger says that a source stands for: by itself, and beside the source's own headers."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from shardq.carry import Goal, goal
from shardq.checkpoint import Checkpoint, TensorRef
from shardq.layouts.base import Layout
from shardq.ledger import DECODED
from shardq.outputs import Output
from shardq.schemes import parse_name
from shardq.weights import Absorbed, Weights, kept_shape, recorded_weights

FATES: Final = frozenset({"decoded", "split", "dropped"})  # of tensors of the source that are no weights

Ledger = Mapping[str, Any]


def source_of(ledger: Ledger) -> Mapping[str, Mapping[str, Any]]:
    """What became of tensors that are no weights; ledgers of earlier versions have none, as no source had any."""
    found: Mapping[str, Mapping[str, Any]] = ledger.get("source", {})
    return found


def weights_of(output: Output, checkpoint: Checkpoint) -> Weights:
    """What a source stands for to an output's recipe. Raises UnsupportedSource."""
    kept, dtype = output.ledger["tensors"], output.identity.get("recipe.dtype")
    return recorded_weights(checkpoint, kept, dtype, output.fold, halves=output.layout.halves_experts)


def check_absorbed(ledger: Ledger) -> Iterator[str]:
    """Where a ledger contradicts itself about tensors that are no weights: each is a part of a weight that it names, or
    of experts that it names, or stays behind; and none is a weight as well."""
    weights, prefixes = ledger["tensors"], _prefixes(ledger["tensors"])
    for name, entry in source_of(ledger).items():
        fate, into = entry.get("outcome"), entry.get("into")
        if fate not in FATES:
            yield f"{name} has outcome {fate!r} in the ledger's source: expected one of {', '.join(sorted(FATES))}"
        elif name in weights:
            yield f"{name} is a weight in the ledger and, as {fate}, a part of others"
        elif fate == "split" and into not in prefixes:
            yield f"{name} was split, and the ledger has no experts {into!r}"
        elif fate == "decoded" and into not in weights and into not in prefixes:
            yield f"{name} was decoded, and the ledger has no weight {into!r}"


def check_account(ledger: Ledger, weights: Weights) -> Iterator[str]:
    """Where a ledger's tensors and their fates are not those of its source."""
    for name in weights.tensors.keys() - ledger["tensors"].keys():
        yield f"{name} is in the source and not in the ledger"
    for name in ledger["tensors"].keys() - weights.tensors.keys():
        yield f"{name} is not in the source as the ledger has it"
    said = source_of(ledger)
    for name in said.keys() - weights.absorbed.keys():
        yield f"{name} is not in the source as the ledger has it"
    for name, absorbed in weights.absorbed.items():
        if name not in said:
            yield f"{name} is in the source and not in the ledger"
        elif said[name] != _entry(absorbed):
            yield f"{name} was {_told(_entry(absorbed))}: the ledger says {_told(said[name])}"


def is_as_recorded(t: TensorRef, entry: Mapping[str, Any]) -> bool:
    """Whether a weight of the source is what its entry says: type, shape, and whether it had to be decoded. What was
    carried has the type of its scales."""
    outcome, carried = entry["outcome"], "carried" in entry
    if t.shape is None or (carried and len(t.encoded) != 1):
        return False
    shape = t.shape if outcome == "quantized" else kept_shape(t)
    fits = outcome not in ("copied", DECODED) or bool(t.encoded) == (outcome == DECODED)
    return fits and (carried or t.dtype == entry["dtype"]) and bool(list(shape) == entry["shape"])


def is_of_source(entry: Mapping[str, Any]) -> bool:
    """False for what a tuning has replaced or scaled: the source alone does not give it."""
    return "replaced" not in entry and "scaled" not in entry


def goal_of(t: TensorRef, entry: Mapping[str, Any], layout: Layout) -> Goal | None:
    """Where the codes of a weight were carried, as its entry says; None where they were not. The entry goes with the
    weight, and the layout takes its scheme."""
    if "carried" not in entry:
        return None
    e = t.encoded[0]
    return goal(layout, layout.settle(parse_name(entry["scheme"])), entry["dtype"], e.rows, e.columns)


def _prefixes(names: Mapping[str, Any]) -> set[str]:
    """What names begin with, up to a dot."""
    return {name[:at] for name in names for at, letter in enumerate(name) if letter == "."}


def _entry(a: Absorbed) -> dict[str, str]:
    return {"outcome": a.fate, "into": a.into, "reason": a.reason}


def _told(entry: Mapping[str, Any]) -> str:
    into = f" into {entry['into']}" if entry.get("into") else ""
    return f"{entry.get('outcome')}{into} ({entry.get('reason')})"
