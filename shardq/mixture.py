"""What there is to choose from for a mixture, and what was chosen.

An item is what must share one scheme (a fused group, the routed experts of a layer, or one matrix). Each of its options
has a cost in bits and a damage, and damages add up. mixture_choice.py finds the choice of least damage.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from shardq.errors import BadOption
from shardq.schemes import Scheme

WINDOW: Final = Fraction(5, 1000)  # of a target that the average may stay below it
TOLERANCE: Final = 2.0**-40  # of the damage: what fp64 may have lost when a choice is called the best
NO_OPTION: Final = 1 << 61  # bits of options that an item does not have


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store an item."""

    name: str  # of the scheme, as a layer config takes it
    scheme: Scheme | None  # None: kept in source precision


@dataclass(frozen=True, slots=True)
class Item:
    """Tensors that share one option. One with a single option is fixed: its bits count, and there is no choice."""

    name: str
    kind: str  # what it is, for tables: `down_proj`, `q_proj+k_proj+v_proj`
    modules: tuple[str, ...]
    weights: int  # numbers that it holds
    options: tuple[Option, ...]
    bits: tuple[int, ...]  # of all its tensors, for each option
    damages: tuple[float, ...]  # for each option; they add up over items

    def __post_init__(self) -> None:
        """Refuse what cannot be weighed. Raises BadOption."""
        if not len(self.options) == len(self.bits) == len(self.damages) >= 1:
            raise BadOption(f"{self.name} needs bits and a damage for each of its {len(self.options)} options")
        for o, bits, damage in zip(self.options, self.bits, self.damages, strict=True):
            if not 0 <= bits < NO_OPTION or not 0.0 <= damage < math.inf:
                raise BadOption(
                    f"{self.name} under {o.name}: {bits} bits, damage {damage}: expected finite numbers, none negative"
                )


@dataclass(frozen=True, slots=True)
class Mixture:
    """A choice, and how good it is."""

    choice: Mapping[str, Option]  # item -> its option, in the order of names
    budget_bits: int
    bits: int  # never more than the budget
    weights: int
    damage: float  # sum over items
    bound: float  # no choice within the budget has less damage than this; `damage` itself where that is proven

    @property
    def average_bits(self) -> float:
        """Bits for each weight; 0 where there is none."""
        return self.bits / self.weights if self.weights else 0.0

    @property
    def gap(self) -> float:
        """By how much of its damage, at most, another choice may be better; 0 where this one is proven to be best (but
        for the rounding of fp64: a part in 2^40)."""
        missing = self.damage - self.bound
        return missing / self.damage if missing > TOLERANCE * self.damage else 0.0

    @property
    def is_proven(self) -> bool:
        """True if no choice within the budget is better."""
        return self.gap == 0.0
