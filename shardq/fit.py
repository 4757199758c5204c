"""Inverse planning: recipes whose weights fit into given memory, from most to fewest bits.

Weights are what a plan says that files hold. A share of the memory is left for what else a server keeps there: caches
of keys and values, activations, and its own buffers.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shardq.checkpoint import Checkpoint
from shardq.errors import BadOption, ShardqError
from shardq.mixture_file import make_option, option_bits
from shardq.plans import Plan, make_plan
from shardq.recipe import Recipe
from shardq.recipe_file import words_of
from shardq.serving.judge import judge
from shardq.serving.served import served_of_plan
from shardq.sizes import parse_size

RESERVE: Final = 0.2  # share that is left: servers take about a tenth of a GPU for themselves, and caches the rest
FOR_ALL: Final = (
    "FP8_DYNAMIC", "W8A16", "W6A16", "NVFP4A16", "MXFP4A16", "W4A16G64", "W4A16", "W3A16", "W2A16G64", "W2A16",
)  # fmt: skip
FOR_MEMORY: Final = ("gguf:q8_0", "gguf:q6_k", "gguf:q5_k_m", "gguf:q4_k_m", "gguf:q3_k_m", "gguf:q2_k")
MIXED: Final = frozenset({"W2A16G64", "W4A16", "W8A16"})  # presets that a mixture is made of, one layout holds them all
LEAST_STEP: Final = 0.1  # bits that a mixture must be better by than what fits without
_SPACE: Final = re.compile(r"(?:(\d+)\s*[xX×]\s*)?(.+)")


@dataclass(frozen=True, slots=True)
class Space:
    """Memory for weights: of some equal devices, or of one machine."""

    devices: int
    each_bytes: int
    reserve: float

    @property
    def usable_bytes(self) -> int:
        """For weights, on all devices together."""
        return int(self.devices * self.each_bytes * (1 - self.reserve))


@dataclass(frozen=True, slots=True)
class Proposal:
    """One recipe."""

    title: str
    recipe: Recipe  # of a mixture its default
    weights_bytes: int
    bits: float  # for a weight of the model, what is kept included
    fits: bool
    engines: tuple[str, ...] = ()  # that load it on all devices, as far as headers tell; of a mixture that is not known
    quantized: int = 0  # weights that get codes
    coded_bytes: float = 0.0  # of all that is written of them
    target_bits: float | None = None  # of a mixture
    options: str = ""


@dataclass(frozen=True, slots=True)
class Fit:
    """What was found."""

    space: Space
    source_bytes: int
    proposals: tuple[Proposal, ...]  # most bytes first
    refused: tuple[tuple[str, ShardqError], ...]  # scheme, and why the model cannot have it

    @property
    def source_fits(self) -> bool:
        """True if the source need not be quantized."""
        return self.source_bytes <= self.space.usable_bytes

    @property
    def best(self) -> Proposal | None:
        """The first that fits, and is smaller than the source."""
        return next((p for p in self.proposals if p.fits and p.weights_bytes < self.source_bytes), None)


def parse_space(text: str, reserve: float | None) -> Space:
    """From `4x80G`, four devices, or `512G`; `reserve`: by default a fifth. Raises BadOption."""
    reserve = RESERVE if reserve is None else reserve
    found = _SPACE.fullmatch(text.strip())
    each = parse_size(found[2] if found else text, "--fit")
    devices = int(found[1]) if found and found[1] else 1
    if devices < 1:
        raise BadOption(f"--fit {text!r}: expected at least one device")
    if not 0 <= reserve < 1:
        raise BadOption(f"--fit-reserve {reserve}: expected a share of the memory, from 0 to below 1, as 0.2")
    assert each is not None
    return Space(devices, each, reserve)


def usual_schemes(space: Space) -> tuple[str, ...]:
    """What is tried when the user names no scheme: on one machine's memory files of llama.cpp too."""
    return FOR_ALL if space.devices > 1 else (*FOR_ALL, *FOR_MEMORY)


def find_fit(checkpoint: Checkpoint, recipes: Sequence[Recipe], space: Space, check: Callable[[Plan], object]) -> Fit:
    """Plan each recipe, and mixtures between those that fit and those that do not. `check` may refuse a plan.

    Raises BadOption for a checkpoint of which only an index is known, and what the recipes raise if all are refused.
    """
    proposals: list[Proposal] = []
    refused: list[tuple[str, ShardqError]] = []
    weights = 0
    for recipe in recipes:
        try:
            plan = make_plan(checkpoint, recipe)
            check(plan)
        except ShardqError as error:
            refused.append((recipe.scheme_name, error))
            continue
        if not plan.files:
            raise BadOption("--fit needs shapes: of this checkpoint only an index is known")
        weights = weights or sum(t.numel for t in plan.weights.tensors.values())
        size = plan.output_bytes
        title = f"{recipe.scheme_name}@{recipe.layout}"
        engines = tuple(v.engine for v in judge(served_of_plan(plan), space.devices) if v.answer != "no")
        fits, coded = size <= space.usable_bytes, _count_quantized(plan)
        proposals.append(Proposal(title, recipe, size, 8 * size / weights, fits, engines, *coded))
    if not proposals:
        raise refused[0][1]
    source_bytes = sum(t.size_bytes for t in checkpoint.tensors.values())
    if mixture := _find_mixture(proposals, min(space.usable_bytes, source_bytes), weights):
        proposals.append(mixture)
    proposals.sort(key=lambda p: (-p.weights_bytes, p.title))
    return Fit(space, source_bytes, tuple(proposals), tuple(refused))


def recipe_words(p: Proposal) -> dict[str, Any]:
    """The words of a proposal, as a recipe file has them."""
    if p.target_bits is None:
        return words_of(p.recipe)
    return {**words_of(p.recipe), "target_bits": p.target_bits, "options": p.options}


def _find_mixture(proposals: Sequence[Proposal], usable_bytes: int, weights: int) -> Proposal | None:
    """A mixture that fills what is left above the largest integers that fit, with the smallest that do not."""
    plain = [p for p in proposals if p.recipe.preset in MIXED and p.recipe.scheme.is_adjustable]
    small = (p for p in plain if p.weights_bytes <= usable_bytes)
    below = max(small, key=lambda p: p.weights_bytes, default=None)
    if below is None:
        return None
    larger = (p for p in plain if p.weights_bytes > usable_bytes and p.recipe.layout == below.recipe.layout)
    above = min(larger, key=lambda p: p.weights_bytes, default=None)
    if above is None:
        return None
    kept_bytes = below.weights_bytes - below.coded_bytes
    target = math.floor(100 * 8 * (usable_bytes - kept_bytes) / below.quantized) / 100
    if target < 8 * below.coded_bytes / below.quantized + LEAST_STEP:
        return None
    size = int(kept_bytes + below.quantized * target / 8)
    options = f"{below.recipe.preset},{above.recipe.preset}"
    title = f"{target:g} bits of {options}@{below.recipe.layout}"
    return Proposal(title, below.recipe, size, 8 * size / weights, True, target_bits=target, options=options)


def _count_quantized(plan: Plan) -> tuple[int, float]:
    """Weights that get codes, and the bytes of all that is written of them; of files of llama.cpp nothing."""
    if plan.gguf:
        return 0, 0.0
    weights = bits = 0
    for d in plan.decisions:
        t = d.tensor
        if d.scheme and t.dtype and t.shape:
            weights += t.numel
            bits += option_bits(make_option(d.scheme), t.dtype, t.shape, plan.layout)
    return weights, bits / 8
