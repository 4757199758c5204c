"""A checkpoint's tensors against a model's parameters: which part of the model needs which, and what fits nothing."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from shardq.checkpoint import Checkpoint, TensorRef
from shardq.errors import CheckpointIncomplete, UnsupportedSource
from shardq.halves import holds_halves
from shardq.recipe import dequantize_recipe
from shardq.tune.conversions import Conversions, find_conversions
from shardq.tune.skeleton import Skeleton
from shardq.untied import untied_head
from shardq.weights import find_weights, recorded_weights

SHOWN: Final = 4
BIAS: Final = "bias"
WEIGHT: Final = ".weight"
# Buffers that old checkpoints hold and models compute; transformers adds them to each model's own patterns.
COMPUTED: Final = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


@dataclass(frozen=True, slots=True)
class Matched:
    """What a model's parameters are made of, by the part of the model that they belong to."""

    tensors: Mapping[str, TensorRef]  # weights, encoded ones as such
    conversions: Conversions
    shapes: Mapping[str, tuple[int, ...]]  # of parameters
    blocks: tuple[tuple[str, ...], ...]  # parameters of each block
    small: tuple[str, ...]  # outside the blocks, there all the time
    front: tuple[str, ...]  # embeddings
    head: tuple[str, ...]  # what only the end of the model needs
    tied: Mapping[str, tuple[str, ...]]  # of a parameter with several names: all of them
    blanks: tuple[tuple[str, ...], ...]  # tensors of each block that must be zero: biases that the model does not have
    notes: tuple[str, ...]


def match_model(checkpoint: Checkpoint, skeleton: Skeleton) -> Matched:
    """Raises UnsupportedSource for tensors of a block that no parameter is made of, CheckpointIncomplete for parameters
    without tensors."""
    tensors, conversions = _find(checkpoint, skeleton)
    state = skeleton.model.state_dict(keep_vars=True)
    chosen = _shared(state, skeleton.model.all_tied_weights_keys, conversions)
    blanks = _blanks(conversions.unexpected, tensors, skeleton)
    left = {n: key for n, key in conversions.unexpected.items() if not any(n in of for of in blanks)}
    notes = _refuse_unexpected(left, skeleton, checkpoint.label)
    mine = _text_prefixes(skeleton)
    needed = [n for n, of in chosen.items() if any(name.startswith(mine) for name in of)]
    _refuse_missing(needed, conversions, skeleton.model, checkpoint.label)
    outside = [n for n in needed if _block_of(n, skeleton.blocks) is None]
    front, head = _ends(skeleton.model, chosen)
    blocks: list[list[str]] = [[] for _ in range(skeleton.count)]
    for n in needed:
        if (index := _block_of(n, skeleton.blocks)) is not None:
            blocks[index].append(n)
    return Matched(
        tensors,
        conversions,
        {name: tuple(value.shape) for name, value in state.items()},
        tuple(map(tuple, blocks)),
        tuple(n for n in outside if n not in front and n not in head),
        tuple(n for n in outside if n in front),
        tuple(n for n in outside if n in head),
        {n: of for n, of in chosen.items() if len(of) > 1},
        blanks,
        notes,
    )


def head_tensor(matched: Matched, config: Mapping[str, Any] | None) -> str | None:
    """The head's weight, also of one that is the embedding and would get weights of its own."""
    tied = untied_head(matched.tensors, config)
    if tied is not None:
        return tied.name
    names = {n for c in matched.conversions.find(matched.head) for n, _ in c.sources}
    return next((n for n in names if n.endswith(WEIGHT) and "head" in n), None)


def _find(checkpoint: Checkpoint, skeleton: Skeleton) -> tuple[Mapping[str, TensorRef], Conversions]:
    """Stacks of experts whole where the model knows them by their names, else a matrix for each expert."""
    weights = find_weights(checkpoint, dequantize_recipe())
    model = skeleton.model
    found = find_conversions(model, weights.tensors, skeleton.dtype, checkpoint.config)
    foreign = [n for n in found.unexpected if len(weights.tensors[n].shape or ()) == 3]
    if not foreign:
        return weights.tensors, found
    whole, halves = frozenset(weights.tensors) - frozenset(foreign), holds_halves(checkpoint.config)
    split = recorded_weights(checkpoint, whole, None, None, halves=halves)
    return split.tensors, find_conversions(model, split.tensors, skeleton.dtype, checkpoint.config)


def _shared(names: Iterable[str], tied: Mapping[str, str], conversions: Conversions) -> dict[str, tuple[str, ...]]:
    """Parameters that have tensors of their own -> these, and others that share them: tied ones that the checkpoint has
    under one name only, whichever. Where it has both each is taken as it is."""
    found: dict[str, list[str]] = {}
    for name in names:
        partners = [tied[name]] if name in tied else [n for n, source in tied.items() if source == name]
        alone = name not in conversions.by_parameter
        home = next((n for n in partners if n in conversions.by_parameter), name) if alone else name
        found.setdefault(home, []).append(name)
    return {home: tuple(of) for home, of in found.items()}


def _block_of(name: str, blocks: str) -> int | None:
    if not name.startswith(f"{blocks}."):
        return None
    number = name[len(blocks) + 1 :].partition(".")[0]
    return int(number) if number.isdecimal() else None


def _text_prefixes(skeleton: Skeleton) -> tuple[str, ...]:
    """Of the decoder and the head: a tower for images has no part in text."""
    return (f"{skeleton.decoder}." if skeleton.decoder else "", *_head_names(skeleton.model))


def _head_names(model: Any) -> tuple[str, ...]:
    head = model.get_output_embeddings()
    return tuple(f"{n}." for n, m in model.named_modules() if m is head) if head is not None else ()


def _ends(model: Any, chosen: Mapping[str, Sequence[str]]) -> tuple[set[str], set[str]]:
    """Parameters of the embedding, and of the head; a tied one is in both."""
    table = model.get_input_embeddings()  # others, as of positions, are small
    starts = tuple(f"{n}." for n, m in model.named_modules() if m is table)
    front = {n for n, of in chosen.items() if any(name.startswith(starts) for name in of)}
    ends = _head_names(model)
    head = {n for n, of in chosen.items() if any(name.startswith(ends) for name in of)} if ends else set()
    return front, head


def _refuse_missing(needed: Iterable[str], conversions: Conversions, model: Any, label: str) -> None:
    missing = [n for n in needed if n not in conversions.by_parameter]
    if missing:
        raise CheckpointIncomplete(
            f"{label} has no tensor for {_listed(missing)}, which {type(model).__name__} needs: expected one for each; "
            "is it this model's checkpoint, or does transformers name it otherwise?"
        )


def _blanks(
    unexpected: Mapping[str, str], tensors: Mapping[str, TensorRef], skeleton: Skeleton
) -> tuple[tuple[str, ...], ...]:
    """Biases of Linear layers that have none, by block: old GPTQ checkpoints have zeros there."""
    found: list[list[str]] = [[] for _ in range(skeleton.count)]
    linear = {n for n, m in skeleton.model.named_modules() if isinstance(m, nn.Linear)}
    for name, key in unexpected.items():
        index, (module, _, leaf) = _block_of(key, skeleton.blocks), key.rpartition(".")
        lacking = leaf == BIAS and module in linear and not tensors[name].encoded
        if lacking and index is not None and index < skeleton.count:
            found[index].append(name)
    return tuple(map(tuple, found))


def _refuse_unexpected(unexpected: Mapping[str, str], skeleton: Skeleton, label: str) -> tuple[str, ...]:
    """Notes about what is left out."""
    model = skeleton.model
    ignored = [re.compile(p) for p in (*(model._keys_to_ignore_on_load_unexpected or ()), *COMPUTED)]
    left = [n for n in unexpected if not any(p.search(n) for p in ignored)]
    places = {n: _block_of(unexpected[n], skeleton.blocks) for n in left}
    wrong = [n for n, index in places.items() if index is not None and index < skeleton.count]
    if wrong:
        raise UnsupportedSource(
            f"{label} has {_listed(wrong)}, which {type(model).__name__} has no place for: expected tensors of the "
            "model alone; transformers cannot compute with them"
        )
    return (f"{len(left)} tensors have no part in the text model and were left out: {_listed(left)}.",) if left else ()


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
