"""A mixture for a size: which scheme each group of modules gets, so that the whole has so many bits for a weight and
the least harm. Scores, chooses, and writes the choice as a layer config that people can read and change."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardq.checkpoint import Checkpoint
from shardq.decide import Decision, decide_weights
from shardq.errors import BadOption
from shardq.even import prefer_even
from shardq.headers import read_checkpoint
from shardq.layouts import find_layout
from shardq.layouts.base import Layout
from shardq.measured import Exponents, Measured
from shardq.mixture import Item, Mixture, Option
from shardq.mixture_choice import choose, find_budget
from shardq.mixture_file import (
    Group,
    find_kept,
    find_matrices,
    group_matrices,
    layer_config_text,
    make_items,
    parse_options,
)
from shardq.recipe import Recipe
from shardq.searching import choose_search, find_vectors
from shardq.sensitivity import weigh_modules
from shardq.sources.base import Source
from shardq.weights import Weights, find_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Mixed:
    """A choice, and the file that says it."""

    mixture: Mixture
    items: tuple[Item, ...]
    text: str  # for --layer-config
    sampled_bytes: int  # of the source, that were scored


@dataclass(frozen=True, slots=True)
class Open:
    """What there is to choose, before anything is scored."""

    checkpoint: Checkpoint
    recipe: Recipe
    weights: Weights
    decisions: tuple[Decision, ...]
    layout: Layout
    offered: tuple[Option, ...]
    groups: tuple[Group, ...]
    free: frozenset[str]  # modules that a choice is about

    def items(self, damages: "Mapping[str, Sequence[float]]", ignore_scale_bits: bool) -> tuple[Item, ...]:
        """For `choose`."""
        return make_items(self.groups, self.offered, damages, self.layout, self.recipe.scheme, ignore_scale_bits)

    def check(self, target_bits: float, ignore_scale_bits: bool) -> None:
        """Raises BadOption for a target that no choice reaches, whatever the damage is."""
        none = (0.0,) * len(self.offered)
        find_budget(self.items(dict.fromkeys(self.free, none), ignore_scale_bits), target_bits)


def open_choice(checkpoint: Checkpoint, recipe: Recipe, options: str) -> Open:
    """What `mix` chooses. Raises what planning raises, and BadOption where there is no choice."""
    weights = find_weights(checkpoint, recipe)
    decisions = decide_weights(weights, checkpoint, recipe)
    layout = find_layout(recipe.layout)
    offered = parse_options(options, layout)
    fuses = layout.fuses and not recipe.split_fused
    groups = group_matrices(find_matrices(decisions), checkpoint.config, fuses)
    free = frozenset(m.module for g in groups if not g.fixed for m in g.matrices)
    if not free:
        raise BadOption("--target-bits: the layer config leaves no module to choose for")
    return Open(checkpoint, recipe, weights, decisions, layout, offered, groups, free)


def mix(
    source: Source,
    recipe: Recipe,
    options: str,
    target_bits: float,
    ignore_scale_bits: bool = False,
    threads: int | None = None,
    measured: Measured | None = None,
) -> Mixed:
    """The best mixture of `options` ("W2A16G64,W4A16,W8A16") with `target_bits` for each weight that `recipe`
    quantizes.

    The recipe's own layer rules are fixed; its importance and search are those of the scores, and of the run that uses
    the file. Reads headers, and some rows of each matrix, or none where damage was `measured` by text; by other data
    the geometric mean of damage and score counts. The same file for any number of threads. Raises what planning raises,
    BadOption for a target that the options cannot reach, and what reading raises.
    """
    choice = open_choice(read_checkpoint(source), recipe, options)
    choice.check(target_bits, ignore_scale_bits)
    known = measured.of(sorted(choice.free), tuple(o.name for o in choice.offered)) if measured else None
    damages: Mapping[str, Sequence[float]] = {}
    sampled_bytes = 0
    if measured is None or measured.exponents.scores:
        damages, sampled_bytes = _score(source, choice, threads or os.cpu_count() or 1)
    if measured and known:
        damages = _join(damages, known, measured.exponents)
    items = choice.items(damages, ignore_scale_bits)
    promised = choice.items(known, ignore_scale_bits) if measured and known and not measured.exponents.scores else items
    mixture = prefer_even(items, choose(items, target_bits), promised)
    text = layer_config_text(
        items, mixture, choice.checkpoint.label, target_bits, not ignore_scale_bits, find_kept(choice.decisions),
        _tell(measured) if measured else "",
    )  # fmt: skip
    return Mixed(mixture, items, text, sampled_bytes)


def _join(
    scores: "Mapping[str, Sequence[float]]", damages: "Mapping[str, Sequence[float]]", by: Exponents
) -> dict[str, list[float]]:
    """Damages to their power, times scores to theirs, where these count. Both err by factors, for reasons of their own,
    so that a mean errs less. Scores grow with the fourth power of an error, damages with its square, as gradients know
    nothing of how a large error grows on its way."""
    powers = {m: [d**by.damage for d in of] for m, of in damages.items()}
    if not by.scores:
        return powers
    return {m: [s**by.scores * d for s, d in zip(scores[m], of, strict=True)] for m, of in powers.items()}


def _tell(measured: Measured) -> str:
    e = measured.exponents
    if e.scores:
        return f"{measured.how}; geometric mean with scores"
    return measured.how if e.damage == 1 else f"{measured.how}; to the power of {e.damage:g}"


def _score(source: Source, choice: Open, threads: int) -> tuple[dict[str, list[float]], int]:
    from shardq.scoring import Candidate, Subject, count_sampled, score_all  # brings numpy

    recipe, weights, decisions = choice.recipe, choice.weights, choice.decisions
    wanted = [d for d in decisions if d.tensor.module in choice.free and d.scheme]
    vectors, _ = find_vectors(wanted, recipe.importance, weights.importance)
    candidates = {
        weighed: tuple(
            Candidate(o.scheme, choose_search(o.scheme, recipe, recipe.importance, weighed) if o.scheme else None)
            for o in choice.offered
        )
        for weighed in (False, True)
    }
    factors = weigh_modules(d.tensor.module for d in decisions)
    subjects = [
        Subject(d.tensor, candidates[(n := d.tensor.name) in vectors], vectors.get(n), factors[d.tensor.module])
        for d in wanted
    ]
    harms = score_all(subjects, source, recipe.decode == "rounded", threads)
    return dict(harms), count_sampled(d.tensor for d in wanted)
