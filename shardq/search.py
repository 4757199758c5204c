"""How scales are chosen beyond round-to-nearest: what a search tries, and what it counts as an error.

A search needs no data. With importance (how much an error counts in each input column) it is better than
round-to-nearest at every width; without, errors are weighed by the weights themselves: a plain squared error makes
decoders worse than round-to-nearest, because it gives up the few large weights that matter most.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

from shardq.errors import BadOption

if TYPE_CHECKING:
    from shardq.importance_vectors import Ref
    from shardq.schemes import Scheme

Rule = Literal["least_squares", "auto_round"]
Objective = Literal["none", "square", "root"]
Kind = Literal["symmetric", "asymmetric", "powers", "small_floats"]
Signs = Literal["range", "both", "positive"]

MOST_CANDIDATES: Final = 256
MOST_SWEEPS: Final = 64


@dataclass(frozen=True, slots=True)
class Search:
    """One search. Of `low`, `high` and `candidates` integers without zero points make logarithmic steps of 1/scale
    (above 1: finer steps, and large weights are cut off); those with zero points or biases make even steps of the
    range; 4-bit floats under 8-bit scales try every scale that the format has between low and high times their own, and
    powers of two the one below and the one above, whatever these say.
    """

    low: float
    high: float
    candidates: int
    sweeps: int  # of codes, then scale by least squares, after the best candidate
    signs: Signs = "range"  # the extreme weight on the larger side of the range, or both ways, or scales above 0 only
    objective: Objective = "none"  # an error counts importance times 1, w^2, or sqrt(mean w^2 of the group + w^2)
    rule: Rule = "least_squares"  # auto_round: its own grid of 201 (2 bits: 181) scales, whatever the rest says
    centered: bool = False  # then scales, or biases of MLX, move, row by row, for a smaller mean error of the output

    def __post_init__(self) -> None:
        """Refuse what no kernel can do. Raises BadOption."""
        if not 0 < self.low <= 1 <= self.high < math.inf:
            raise BadOption(f"a search from {self.low} to {self.high} is impossible: expected 1 between them")
        if not 1 <= self.candidates <= MOST_CANDIDATES or not 0 <= self.sweeps <= MOST_SWEEPS:
            raise BadOption(
                f"a search of {self.candidates} candidates and {self.sweeps} sweeps is impossible: expected 1 to "
                f"{MOST_CANDIDATES} candidates and 0 to {MOST_SWEEPS} sweeps"
            )

    def factors(self, logarithmic: bool) -> tuple[float, ...]:
        """The candidates from low to high; the nearest to 1 is 1, so that round-to-nearest's own is among them."""
        steps = max(1, self.candidates - 1)
        shares = [i / steps for i in range(self.candidates)]
        if logarithmic:
            found = [self.low * (self.high / self.low) ** share for share in shares]
        else:
            found = [self.low + (self.high - self.low) * share for share in shares]
        nearest = min(range(self.candidates), key=lambda i: abs(math.log(found[i])))
        found[nearest] = 1.0
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Searches:
    """By tensor; one that is not named has round-to-nearest's own scales."""

    searches: Mapping[str, Search]
    vectors: "Mapping[str, Ref]"  # of those whose errors are weighed
    notes: tuple[str, ...] = ()  # what is odd about the importance


# By bits of a code. Ranges, candidates and sweeps were measured with errors weighed by importance: they reach 101 to
# 107 % of the least weighted error that 256 candidates of both signs find. The finer the codes, the nearer to 1.
SYMMETRIC: Final[Mapping[int, Search]] = MappingProxyType(
    {
        2: Search(0.45, 2.8, 13, 2, "both"),
        3: Search(0.6, 2.0, 11, 2),
        4: Search(0.6, 2.0, 9, 2),
        5: Search(0.8, 1.4, 9, 2),
        6: Search(0.9, 1.2, 9, 2),
        7: Search(0.9, 1.2, 9, 2),
        8: Search(0.95, 1.1, 9, 2),
    }
)
ASYMMETRIC: Final[Mapping[int, Search]] = MappingProxyType(
    {
        **dict.fromkeys((2, 3, 4), Search(0.4, 1.1, 8, 3)),
        **dict.fromkeys((5, 6), Search(0.7, 1.05, 8, 3)),
        **dict.fromkeys((7, 8), Search(0.85, 1.05, 8, 2)),
    }
)
POWERS: Final = Search(0.5, 2.0, 3, 0)
SMALL_FLOATS: Final = Search(0.5, 1.55, 14, 0)
AUTO_ROUND: Final = Search(0.25, 1.75, 201, 0, rule="auto_round")
_FLOAT_KINDS: Final[Mapping[str, Kind]] = MappingProxyType(
    {"e8m0": "powers", "e4m3fn": "small_floats", "e5m3": "small_floats"}
)


def kind_of(scheme: "Scheme") -> Kind | None:
    """What can be searched in a scheme: its integers' scales, these and zero points or biases, powers of two, or scales
    of 8 bits with a fraction; None: nothing, as where rows or whole tensors share a scale."""
    if scheme.group_rows != 1 or scheme.reach == "tensor" or scheme.block:
        return None
    if scheme.format.is_integer:
        return "symmetric" if scheme.symmetric else "asymmetric"
    return _FLOAT_KINDS.get(scheme.scale)


def default_search(scheme: "Scheme", weighted: bool) -> Search | None:
    """The search that measured best for a scheme, with importance (`weighted`) or without; None where there is none."""
    kind = kind_of(scheme)
    if kind is None:
        return None
    if kind == "small_floats":
        return SMALL_FLOATS
    found = POWERS if kind == "powers" else (SYMMETRIC if kind == "symmetric" else ASYMMETRIC)[scheme.bits]
    return found if weighted else replace(found, objective="root")


def describe_search(search: Search) -> dict[str, Any]:
    """Plain values, which `read_search` reads."""
    return asdict(search)


def read_search(values: Mapping[str, Any]) -> Search:
    """The inverse of `describe_search`. Raises TypeError, BadOption."""
    return Search(**values)
