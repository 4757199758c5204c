"""Shades of a heat map of errors, in the page and in the card's picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shardq.html_report.grid import Grid, errors_of

STEPS: Final = 9  # shades of a heat map


@dataclass(frozen=True, slots=True)
class Shades:
    """From the least error to the largest, on a scale of logarithms."""

    least: float
    most: float

    def step(self, error: float) -> int:
        """0 to STEPS - 1."""
        if error <= 0 or self.most <= self.least:
            return 0
        share = math.log(max(error, self.least) / self.least) / math.log(self.most / self.least)
        return min(STEPS - 1, max(0, int(share * STEPS)))


def find_shades(grids: Sequence[Grid]) -> Shades | None:
    """None where nothing has an error above zero."""
    errors = [e for e in errors_of(grids) if e > 0]
    return Shades(min(errors), max(errors)) if errors else None
