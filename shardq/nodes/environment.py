"""Which of how many workers a process is: as the user says, or as the scheduler that started it does."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from shardq.errors import BadOption


@dataclass(frozen=True, slots=True)
class Rank:
    """Worker `index` of `count`, from 0: where it begins. It decides nothing else."""

    index: int
    count: int | None  # None: nobody says how many there are

    @property
    def least_count(self) -> int:
        """So many workers at least."""
        return self.count or self.index + 1

    def order(self, files: int) -> list[int]:
        """Positions of files in the order in which this worker wants them: all of them, its own share first."""
        share = self.index / self.count if self.count else _halves(self.index)
        first = int(share * files)
        return [*range(first, files), *range(first)]


def _halves(index: int) -> float:
    """0, 1/2, 1/4, 3/4, 1/8, ...: numbers that are far apart however many are taken (van der Corput's sequence)."""
    return sum((index >> bit & 1) / (2 << bit) for bit in range(index.bit_length()))


@dataclass(frozen=True, slots=True)
class Scheduler:
    """Environment variables of a scheduler; not all say how many workers there are."""

    name: str
    index: str
    count: str | None
    first: str | None = None  # holds the smallest index, where that may not be 0


SCHEDULERS: Final = (  # the first that is there counts
    Scheduler("SLURM job array", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    Scheduler("Kubernetes indexed Job", "JOB_COMPLETION_INDEX", None),
    Scheduler("torchrun and MPI launchers", "RANK", "WORLD_SIZE"),
    Scheduler("SLURM tasks of srun", "SLURM_PROCID", "SLURM_NTASKS"),
)
ALONE: Final = Rank(0, 1)


def find_rank(word: str | None, environment: Mapping[str, str]) -> Rank:
    """The rank of this process: `word` is i/N from 0, as in 3/8. Raises BadOption."""
    if word is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", word)
        if not match or int(match[1]) >= int(match[2]):
            raise BadOption(f"--worker {word}: expected i/N with i from 0 to N-1, as in 0/8 for the first of eight")
        return Rank(int(match[1]), int(match[2]))
    for s in SCHEDULERS:
        if s.index in environment:
            return _rank_of(s, environment)
    return ALONE


def _rank_of(s: Scheduler, environment: Mapping[str, str]) -> Rank:
    """Steps between indices (as in --array=0-30:2) only make shares uneven."""
    try:
        index = int(environment[s.index]) - int(environment.get(s.first or "", "0"))
        count = int(environment[s.count]) if s.count and s.count in environment else None
    except ValueError as error:
        raise BadOption(
            f"{s.index}={environment[s.index]} of a {s.name} is no number ({error}); say --worker i/N"
        ) from error
    return Rank(max(0, index), None if count is None else max(count, index + 1))
