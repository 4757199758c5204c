"""One pass over a source for one or more outputs: their plans' tasks, bundled by the source bytes that they read."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from shardq.checkpoint import Checkpoint, TensorRef
from shardq.errors import BadOption
from shardq.plans import Plan
from shardq.tasks import SPAN_BYTES, Bundle, Member

if TYPE_CHECKING:
    from shardq.carry import Goal
    from shardq.loans import Loan

BOND_BYTES = 2 * SPAN_BYTES  # farther apart, range mode does not bring tensors together


@dataclass(frozen=True)
class OnePass:
    """The plans of a run. All are of the same checkpoint, and so have the same cut."""

    plans: tuple[Plan, ...]

    def __post_init__(self) -> None:
        """Raises BadOption for outputs of other weights: where one keeps a stack of experts that another splits, or
        splits it otherwise."""
        first, *others = self.plans
        for plan in others:
            if plan.weights.tensors.keys() != first.weights.tensors.keys():
                name = min(plan.weights.tensors.keys() ^ first.weights.tensors.keys())
                raise BadOption(
                    f"{name} is a weight of its own for some outputs only, as with --ignore of a stack of experts: "
                    "make those in a run of their own"
                )
            if turned := set(plan.weights.stacks) - set(first.weights.stacks):
                raise BadOption(
                    f"layouts {first.recipe.layout} and {plan.recipe.layout} give gate_proj and up_proj other rows of "
                    f"{min(s.tensor for s in turned)}: make those in a run of their own"
                )

    @property
    def checkpoint(self) -> Checkpoint:
        """What all plans are of."""
        return self.plans[0].checkpoint

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        """The weights that all plans are of."""
        return self.plans[0].weights.tensors

    def shards_of(self, tensor: str) -> frozenset[str]:
        """The source shards that a weight is made of."""
        return frozenset(self.plans[0].weights.shards_of(tensor))

    @property
    def rounds(self) -> bool:
        """True if decoded rows are rounded to the type of their weight."""
        return self.plans[0].recipe.decode == "rounded"

    @cached_property
    def goals(self) -> "Mapping[str, Goal]":
        """Tensors whose largest scale is wanted in place of their largest magnitude."""
        found: dict[str, Goal] = {}
        for plan in self.plans:
            found |= {n: plan.goals[n] for n in plan.reaches if n in plan.goals}
        return found

    @cached_property
    def bundles(self) -> tuple[Bundle, ...]:
        """All work; ids are positions."""
        bonds = self._bonds()
        lanes = range(len(self.plans))
        return tuple(
            Bundle(
                tasks[0].id,
                tuple(Member(lane, task) for lane, task in zip(lanes, tasks, strict=True)),
                bonds.get(tasks[0].tensor, ""),
            )
            for tasks in zip(*(p.tasks for p in self.plans), strict=True)
        )

    @cached_property
    def reaches(self) -> Mapping[str, frozenset[str]]:
        """Tensor -> all whose largest magnitudes some output needs to quantize it."""
        found: dict[str, frozenset[str]] = {}
        for plan in self.plans:
            for name, reach in plan.reaches.items():
                found[name] = found.get(name, frozenset()) | frozenset(reach)
        return found

    @property
    def source_bytes(self) -> int:
        """Bytes of all source tensors."""
        return self.plans[0].source_bytes

    @cached_property
    def loans(self) -> "Mapping[str, tuple[Loan, ...]]":
        """What each shard borrows of others when it is streamed."""
        if not any(task.encoded for bundle in self.bundles for task in bundle.rows_tasks):
            return {}
        from shardq.loans import plan_loans
        from shardq.spans import cut_all

        return plan_loans(cut_all(self))

    @cached_property
    def work_bytes(self) -> int:
        """Source bytes of all bundles: less, where companions are read beside the codes that they belong to."""
        return sum(b.source_bytes for b in self.bundles)

    @property
    def records(self) -> int:
        """Source tensors, counted for each output."""
        return sum(len(p.decisions) for p in self.plans)

    @property
    def largest_task_bytes(self) -> int:
        """Memory of the largest bundle."""
        return max((b.cost_bytes for b in self.bundles), default=0)

    def _bonds(self) -> dict[str, str]:
        """Tensor -> the group that waits for its largest magnitude, within a shard."""
        bonds: dict[str, str] = {}
        for name, reach in self.reaches.items():
            bonds[name] = f"{self.tensors[name].shard}:{min(reach)}"
        return bonds


def bond_extents(bundles: Sequence[Bundle]) -> dict[str, tuple[int, int]]:
    """The source bytes of those bundles that wait for each other and are near enough to be brought together."""
    extents: dict[str, tuple[int, int]] = {}
    for b in bundles:
        if b.bond:
            begin, end = b.extent
            low, high = extents.get(b.bond, (begin, end))
            extents[b.bond] = min(low, begin), max(high, end)
    members = Counter(b.bond for b in bundles if b.bond)
    return {k: (low, high) for k, (low, high) in extents.items() if members[k] > 1 and high - low <= BOND_BYTES}
