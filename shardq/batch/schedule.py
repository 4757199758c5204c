"""When an entry of a batch is tried again. Delays depend on the number of failures alone: two runs of the same history
wait alike."""

from dataclasses import dataclass
from typing import Final, Literal

from shardq.errors import (
    BudgetTooSmall,
    ChecksumMismatch,
    DiskFull,
    HubAccess,
    HubTransfer,
    Interrupted,
    KernelUnavailable,
    MissingPackage,
    NotWritable,
    OutputLocked,
    OutputOccupied,
    RecipeChanged,
    ShardqError,
    SourceUnreadable,
    TaskFailed,
    Terminated,
)

# passing: tried again in the same run; outside: somebody must do something, and the next run looks whether they have;
# settled: source, recipe and version decide it, and until one of them changes it is not tried again.
Kind = Literal["passing", "outside", "settled"]
FACTOR: Final = 4.0  # from one wait to the next

_PASSING: Final = (HubTransfer, ChecksumMismatch, OutputLocked, DiskFull, TaskFailed, Interrupted, Terminated)
_OUTSIDE: Final = (
    HubAccess, NotWritable, BudgetTooSmall, OutputOccupied, RecipeChanged, KernelUnavailable, MissingPackage,
    SourceUnreadable,
)  # fmt: skip
_KINDS: Final[dict[str, Kind]] = {
    **{e.__name__: "passing" for e in _PASSING},
    **{e.__name__: "outside" for e in _OUTSIDE},
    **{e.__name__: "settled" for e in ShardqError.__subclasses__() if e not in (*_PASSING, *_OUTSIDE)},
}
CRASHED: Final = "Crashed"  # the process of an entry was killed, or died
BUG: Final = "Bug"  # it raised what is no ShardqError


@dataclass(frozen=True, slots=True)
class Patience:
    """How often, and how long apart."""

    attempts: int = 4  # in one run
    first_wait_s: float = 60.0
    longest_wait_s: float = 3600.0

    def wait_s(self, failures: int) -> float:
        """Seconds after so many failures in a row: 60, 240, 960, 3600, 3600, ..."""
        return min(self.longest_wait_s, self.first_wait_s * FACTOR ** min(failures - 1, 60))


def kind_of(error: str) -> Kind:
    """What to do about an error of this class."""
    if error == CRASHED:
        return "passing"
    return "outside" if error == BUG else _KINDS[error]
