"""Damage that block mode has measured, in a file beside the output: of each module under each scheme it might get.

A JSON document: `identity`, all that decides the figures; `how`, for people; `options`, names of schemes in order; and
`damages`, module -> a figure for each option. `mixing` chooses by it, alone or with scores of its own. Needs no torch.
"""

import json
import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, get_args

from shardq.errors import BadOption, BadTuned, RecipeChanged
from shardq.files.atomic import reading, write_atomic
from shardq.importance_files import DataKind

FORMAT: Final = 1
SHOWN: Final = 3  # modules told before "and N more"


@dataclass(frozen=True, slots=True)
class Exponents:
    """What a choice is made by: damage to the one power times scores to the other."""

    damage: float
    scores: float  # 0: damage decides alone


# By the data that damage was measured with. In all rows what decides grows with the cube of an error, as large errors
# do more harm than their squares say. Figures are in bench/README.md.
EXPONENTS: Final[Mapping[DataKind, Exponents]] = MappingProxyType(
    {
        "text": Exponents(1.5, 0.0),  # what a model is made for: scores would add errors of their own
        "self-generated": Exponents(0.5, 0.5),  # a model is surer of its own tokens than of those of others
        "random ids": Exponents(0.5, 0.5),  # first layers look two to three times as sensitive as by text
        "unknown": Exponents(0.5, 0.5),  # several sets, of which some may be random ids
    }
)
NEAREST_BY_TEXT: Final = Exponents(1.0, 0.0)  # round-to-nearest's scales: no search has fitted their errors to the data


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured."""

    how: str  # in a few words
    options: tuple[str, ...]  # as `mixture.Option.name`
    damages: Mapping[str, tuple[float, ...]]  # module -> under each option; they add up over modules
    data: DataKind = "text"  # that it was measured with
    searched: bool = True  # scales were; else they are round-to-nearest's

    @property
    def exponents(self) -> Exponents:
        """What a mixture is chosen by."""
        return NEAREST_BY_TEXT if self.data == "text" and not self.searched else EXPONENTS[self.data]

    def of(self, modules: Iterable[str], options: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
        """Of these modules, in the order of `options`. Raises BadOption for what was not measured."""
        if missing := [o for o in options if o not in self.options]:
            raise BadOption(f"--options: the damage of {missing[0]} was not measured, but that of {self.options}")
        wanted = list(modules)
        check_modules(wanted, self.damages)
        places = [self.options.index(o) for o in options]
        return {m: tuple(self.damages[m][k] for k in places) for m in wanted}


def check_modules(wanted: Iterable[str], known: Container[str]) -> None:
    """Raises BadOption for modules that block mode knows no damage of."""
    if left := sorted(m for m in wanted if m not in known):
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        raise BadOption(
            f"the damage of {', '.join(left[:SHOWN])}{more} cannot be measured, as block mode does not run them as "
            "matrices: give them a rule in --layer-config, or choose by `quantize --target-bits` without --calibrate"
        )


def write_measured(path: Path, measured: Measured, identity: Mapping[str, Any]) -> None:
    """Raises DiskFull, NotWritable."""
    document = {
        "format": FORMAT,
        "identity": dict(identity),
        "how": measured.how,
        "options": measured.options,
        "damages": measured.damages,
        "data": measured.data,
        "searched": measured.searched,
    }
    write_atomic(path, json.dumps(document, sort_keys=True, indent=1).encode())


def read_measured(path: Path, identity: Mapping[str, Any]) -> Measured | None:
    """What is there already; None without a file. Raises RecipeChanged for one of another identity, BadTuned for one
    that is damaged, SourceUnreadable."""
    if not path.exists():
        return None
    with reading(path):
        raw = path.read_bytes()
    try:
        document = json.loads(raw)
        stored, options = dict(document["identity"]), tuple(map(str, document["options"]))
        damages = {str(m): tuple(map(float, of)) for m, of in document["damages"].items()}
        kind: DataKind = next(k for k in get_args(DataKind) if k == document["data"])
        found = Measured(str(document["how"]), options, damages, kind, bool(document["searched"]))
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        raise BadTuned(f"{path.name} is damaged ({error}): delete it, to measure again") from error
    wanted = json.loads(json.dumps(dict(identity)))
    if changed := sorted(k for k in stored.keys() | wanted.keys() if stored.get(k) != wanted.get(k)):
        raise RecipeChanged(
            f"{path} was measured otherwise ({', '.join(changed)}): delete it, or choose another output"
        )
    if not all(len(of) == len(options) and all(map(math.isfinite, of)) for of in damages.values()):
        raise BadTuned(f"{path.name} is damaged (a figure for each option is missing): delete it, to measure again")
    return found
