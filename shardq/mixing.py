"""A mixture for a size: which scheme each group of modules gets, so that the whole has so many bits for a weight and
the least harm. Scores, chooses, and writes the choice as a layer config that people can read and change."""

import os
from dataclasses import dataclass

from shardq.decide import Decision, decide_weights
from shardq.errors import BadOption
from shardq.headers import read_checkpoint
from shardq.layouts import find_layout
from shardq.mixture import Item, Mixture, Option, choose
from shardq.mixture_file import (
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


@dataclass(frozen=True, slots=True)
class Mixed:
    """A choice, and the file that says it."""

    mixture: Mixture
    items: tuple[Item, ...]
    text: str  # for --layer-config
    sampled_bytes: int  # of the source, that were scored


def mix(
    source: Source,
    recipe: Recipe,
    options: str,
    target_bits: float,
    ignore_scale_bits: bool = False,
    threads: int | None = None,
) -> Mixed:
    """The best mixture of `options` ("W2A16G64,W4A16,W8A16") with `target_bits` for each weight that `recipe`
    quantizes.

    The recipe's own layer rules are fixed; its importance and search are those of the scores, and of the run that uses
    the file. Reads headers, and some rows of each matrix. The same file for any number of threads. Raises what planning
    raises, BadOption for a target that the options cannot reach, and what reading raises.
    """
    checkpoint = read_checkpoint(source)
    weights = find_weights(checkpoint, recipe)
    decisions = decide_weights(weights, checkpoint, recipe)
    layout = find_layout(recipe.layout)
    offered = parse_options(options, layout)
    fuses = layout.fuses and not recipe.split_fused
    groups = group_matrices(find_matrices(decisions), checkpoint.config, fuses)
    free = {m.module for g in groups if not g.fixed for m in g.matrices}
    if not free:
        raise BadOption("--target-bits: the layer config leaves no module to choose for")
    threads = threads or os.cpu_count() or 1
    damages, sampled_bytes = _score(source, recipe, decisions, weights, free, offered, threads)
    items = make_items(groups, offered, damages, layout, recipe.scheme, ignore_scale_bits)
    mixture = choose(items, target_bits)
    text = layer_config_text(items, mixture, checkpoint.label, target_bits, not ignore_scale_bits, find_kept(decisions))
    return Mixed(mixture, items, text, sampled_bytes)


def _score(
    source: Source,
    recipe: Recipe,
    decisions: tuple[Decision, ...],
    weights: Weights,
    free: set[str],
    offered: tuple[Option, ...],
    threads: int,
) -> tuple[dict[str, list[float]], int]:
    from shardq.scoring import Candidate, Subject, count_sampled, score_all  # brings numpy

    wanted = [d for d in decisions if d.tensor.module in free and d.scheme]
    vectors, _ = find_vectors(wanted, recipe.importance, weights.importance)
    candidates = {
        weighed: tuple(
            Candidate(o.scheme, choose_search(o.scheme, recipe, recipe.importance, weighed) if o.scheme else None)
            for o in offered
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
