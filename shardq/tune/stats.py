"""Statistics of a model's inputs, block by block: mean x_j**2 and mean x_j of what comes into every Linear layer, by
the names of the checkpoint's modules, for `quantize --importance` and for llama.cpp.

Source of the recipe: quality.md, section 6 D. Sums are in double precision; llama-imatrix adds in fp32.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from shardq.errors import UnsupportedSource
from shardq.importance_files import Provenance, join_names
from shardq.importance_files import write_importance as write_vectors
from shardq.tune.blocks import BlockModel
from shardq.tune.inputs import SECOND, Experts, Sums, column_sums, recording, squares
from shardq.tune.joining import Joint
from shardq.tune.matching import WEIGHT, head_tensor
from shardq.tune.spool import Spooling, in_memory
from shardq.weights import Weights, recorded_weights

if TYPE_CHECKING:
    import os

    from shardq.tune.data import Samples

Told = Callable[[int, int], None]  # blocks done, and all


@dataclass(frozen=True, slots=True)
class Moment:
    """Sums of squares and of values of one module's input."""

    squares: NDArray[np.float64]  # [columns]
    values: NDArray[np.float64]  # [columns]
    tokens: int  # that it saw; 0: none, and the sums are 0


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of a whole model."""

    modules: Mapping[str, Moment]  # by module of the checkpoint, in its order; of each expert its own
    routed: Mapping[str, tuple[int, ...]]  # prefix of experts -> tokens that the router gave each of them
    experts: Experts
    provenance: Provenance
    shapes: Mapping[str, tuple[int, ...]]  # of the modules' weights, but of a head that is the embedding
    config: Mapping[str, Any]  # config.json

    @property
    def never_hit(self) -> Mapping[str, tuple[int, ...]]:
        """Experts that the router gave no token, by their prefix."""
        found = {name: tuple(i for i, n in enumerate(of) if not n) for name, of in self.routed.items()}
        return {name: of for name, of in found.items() if of}


@torch.no_grad()
def collect(
    model: BlockModel, samples: "Samples", report: Told | None = None, experts: Experts = "all",
    spooling: Spooling | None = None,
) -> Statistics:  # fmt: skip
    """Run samples through a model, one block in memory, and count what comes into each matrix.

    `experts`: `all` shows each token to every expert, so that none stays unseen; `routed` counts as the model's own
    router has it, as llama-imatrix does. `spooling`: where hidden states lie; None: in memory. Raises
    UnsupportedSource for a form of experts that is not known, and what spooling and reading raise.
    """
    names = _Names(model)
    modules: dict[str, Moment] = {}
    routed: dict[str, tuple[int, ...]] = {}
    count = len(model.block_names)
    batch = model.embed(samples.ids, partial(spooling.make, copies=1) if spooling else in_memory)
    for index, name in enumerate(model.block_names):
        with model.block(index) as module:
            model.prefetch(index + 1)
            with recording(module, name, experts) as inputs:
                model.advance(module, batch, index)
        for parameter, sums in inputs.sums.items():
            modules |= names.moments(parameter, sums)
        for stacks, tokens in inputs.routed.items():
            routed[names.prefix(stacks)] = tuple(tokens.tolist())
        if report:
            report(index + 1, count)
    if head := names.head():
        total, middle = (np.zeros(batch.hidden.shape[-1]) for _ in range(2))
        for part in batch.split(1):
            last = model.before_head(part.states)
            total += squares(last)
            middle += column_sums(last)
        modules[head] = Moment(total, middle, samples.ids.numel())
    provenance = Provenance(
        samples.kind,
        samples.ids.numel(),
        samples.seed if samples.kind != "text" else None,
        model.checkpoint.label,
        model.checkpoint.commit,
        samples.label if samples.kind == "text" else "",
    )
    return Statistics(modules, routed, experts, provenance, names.shapes(modules), model.checkpoint.config or {})


class _Names:
    """Parameters of a model -> modules of its checkpoint."""

    def __init__(self, model: BlockModel) -> None:
        self._model, self._matched = model, model.matched
        self._weights: Weights = recorded_weights(model.checkpoint, frozenset(), None, None, halves=False)
        self._stacks = {s.tensor: s for s in self._weights.stacks} | {s.weight: s for s in self._weights.stacks}

    def moments(self, parameter: str, sums: Sums) -> Iterator[tuple[str, Moment]]:
        """Of each module that a parameter is made of. Raises UnsupportedSource for columns that are none of its."""
        if sums.squares.ndim == 1:
            for tensor in self._sources(parameter):
                yield (
                    tensor.removesuffix(WEIGHT),
                    Moment(self._checked(tensor, sums.squares), sums.values, int(sums.tokens)),
                )
            return
        found = zip(sums.squares, sums.values, sums.tokens.tolist(), strict=True)
        for expert, (own, middle, tokens) in enumerate(found):
            for module in self._experts(parameter)[expert]:
                yield module, Moment(own, middle, tokens)

    def prefix(self, stacks: str) -> str:
        """What the experts of a module are called: `a.mlp.experts`."""
        module = self._experts(f"{stacks}.{SECOND}")[0][0]
        return module.rpartition(".")[0].rpartition(".")[0]

    def shapes(self, modules: Iterable[str]) -> Mapping[str, tuple[int, ...]]:
        """Of the weights of those modules that have some of their own."""
        found = {m: self._weights.tensors.get(m + WEIGHT) for m in modules}
        return {m: t.shape for m, t in found.items() if t is not None and t.shape is not None}

    def head(self) -> str | None:
        """The head's module, also of one that is the embedding and would get weights of its own."""
        tensor = head_tensor(self._matched, self._model.checkpoint.config)
        return None if tensor is None else tensor.removesuffix(WEIGHT)

    def _sources(self, parameter: str) -> Sequence[str]:
        return [name for name, _ in self._matched.conversions.by_parameter[parameter].sources]

    def _checked(self, tensor: str, own: NDArray[np.float64]) -> NDArray[np.float64]:
        shape = self._matched.tensors[tensor].shape or ()
        if shape[-1:] != own.shape:
            raise UnsupportedSource(
                f"{tensor} {list(shape)} is not a matrix of {len(own)} inputs, as its module has it"
            )
        return own

    def _experts(self, parameter: str) -> list[list[str]]:
        """For each expert its modules of this parameter."""
        conversion = self._matched.conversions.by_parameter[parameter]
        sources = conversion.sources
        if isinstance(conversion.converter, Joint):
            numbers = range(conversion.converter.shape[0])
            pieces = conversion.converter.pieces
            return [[p.tensor.removesuffix(WEIGHT) for p in pieces if p.expert == i] for i in numbers]
        stack = self._stacks.get(sources[0][0])
        if stack is not None and stack.experts is not None:
            numbers = range(stack.experts)
            return [[f"{stack.prefix}.{i}.{p.projection}" for p in stack.parts] for i in numbers]
        by_pattern: dict[str, list[str]] = defaultdict(list)
        for name, pattern in sources:
            by_pattern[pattern].append(name.removesuffix(WEIGHT))
        return [list(of) for of in zip(*by_pattern.values(), strict=True)]


# --- shardq's own form ---------------------------------------------------------------------------------------------


def write_importance(statistics: Statistics, path: "str | os.PathLike[str]") -> tuple[str, ...]:
    """Write importance_files.py's form: a vector for each module, modules with the same input together.

    Means of the inputs themselves come with it. An expert that no token has reached gets those of its layer's others.
    Returns the modules that no token came by, which are left out. Raises BadImportance, DiskFull, NotWritable.
    """
    found, absent = _means(statistics)
    groups: dict[tuple[str, bytes], list[str]] = defaultdict(list)
    for name, both in found.items():
        groups[name.rpartition(".")[0], both.tobytes()].append(name)
    shared = {join_names(names): found[names[0]] for names in groups.values()}
    vectors, means = ({name: both[i] for name, both in shared.items()} for i in (0, 1))
    write_vectors(path, vectors, statistics.provenance, means)
    return absent


def _mean(*members: Moment) -> NDArray[np.float64]:
    """[2, columns]: mean squares, and means, over all tokens of some."""
    total = sum(m.tokens for m in members)
    return np.stack([np.sum([m.squares for m in members], axis=0), np.sum([m.values for m in members], axis=0)]) / total


def _means(statistics: Statistics) -> tuple[dict[str, NDArray[np.float64]], tuple[str, ...]]:
    """`_mean` by name, the same vector of all experts under one with `*`."""
    found: dict[str, NDArray[np.float64]] = {}
    absent = []
    experts = _by_layer(statistics)
    for (prefix, leaf), names in experts.items():
        members = [statistics.modules[n] for n in names]
        seen = [_mean(m) for m in members if m.tokens]
        if not seen:
            absent += names
        elif all(m is seen[0] or np.array_equal(m, seen[0]) for m in seen) and len(seen) == len(names):
            found[f"{prefix}.*.{leaf}"] = seen[0]
        else:
            all_of_them = _mean(*members)
            found |= {n: _mean(m) if m.tokens else all_of_them for n, m in zip(names, members, strict=True)}
    inside = {n for names in experts.values() for n in names}
    for name, moment in statistics.modules.items():
        if name in inside:
            continue
        if moment.tokens and moment.squares.any():
            found[name] = _mean(moment)
        else:
            absent.append(name)
    return found, tuple(absent)


def _by_layer(statistics: Statistics) -> dict[tuple[str, str], list[str]]:
    """Modules of experts: prefix and projection -> one for each expert, in order."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in statistics.modules:
        before, _, leaf = name.rpartition(".")
        prefix, _, number = before.rpartition(".")
        if prefix in statistics.routed and number.isdecimal():
            found[prefix, leaf].append(name)
    return found
