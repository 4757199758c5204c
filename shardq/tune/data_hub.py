"""Calibration texts from sets of the Hub, through the package datasets; a row for each set that AutoRound knows.

Source: AutoRound 0.16.1, `calib_dataset.py`: names, splits, columns, and how each set is shuffled and cut.
Two of its sets are not here: github-code-clean is a script, which datasets refuses from version 4 on, and audiocaps
comes from elsewhere. Other sets of the Hub, which AutoRound refuses, are read by the rule of `OTHER`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from shardq.errors import BadOption, SourceUnreadable
from shardq.tune.data_files import Entry, read_entry
from shardq.tune.data_grammar import DataSet
from shardq.tune.data_random import shuffled
from shardq.tune.packages import import_tuning_package


@dataclass(frozen=True, slots=True)
class HubSet:
    """How one set is read. All of its texts are shuffled by the seed."""

    repo: str
    columns: tuple[str, ...] = ("text",)  # whose texts are a sample
    joint: str = ""  # between them
    config: str | None = None
    splits: tuple[str, ...] = ("train",)  # one after the other, where none is asked for
    allowed: tuple[str, ...] = ()  # () is any
    rows: int | None = None  # so many from a stream, shuffled in its buffer; None: all, shuffled at once
    again: bool = False  # shuffled once more, as a list; with `rows` None the only time
    concat: bool = False  # always


PILE: Final = HubSet("NeelNanda/pile-10k", allowed=("train",))
FINEWEB: Final = HubSet("HuggingFaceFW/fineweb-edu", config="sample-10BT", allowed=("train",), rows=10_000)
CODE: Final = HubSet(
    "nvidia/OpenCodeInstruct", ("input", "output"), "\n\n", allowed=("train",), rows=10_000, again=True, concat=True
)
CHAT: Final = HubSet(
    "HuggingFaceH4/ultrachat_200k",
    ("messages",),
    splits=("train_sft",),
    allowed=("train_sft", "test_sft", "train_gen", "test_gen"),
    rows=20_000,
)
CHINESE: Final = HubSet("BAAI/CCI3-HQ", allowed=("train",), rows=10_000)
ULTRA: Final = HubSet("openbmb/Ultra-FineWeb", ("content",), splits=("en",), allowed=("en", "zh"), rows=20_000)
TITLES: Final = HubSet("madao33/new-title-chinese", ("content",), allowed=("train",))
PROGRAMS: Final = HubSet(
    "google-research-datasets/mbpp", ("text", "code"), splits=("train", "validation", "test"), again=True
)
KNOWN: Final = {s.repo: s for s in (PILE, FINEWEB, CODE, CHAT, CHINESE, ULTRA, TITLES, PROGRAMS)}
ALIASES: Final = {
    "pile-10k": PILE.repo,
    "fineweb-edu": FINEWEB.repo,
    "opencode-instruct": CODE.repo,
    "ultrachat_200k": CHAT.repo,
    "CCI3-HQ": CHINESE.repo,
    "Ultra-FineWeb": ULTRA.repo,
    "new-title-chinese": TITLES.repo,
    "mbpp": PROGRAMS.repo,
}
REFUSED: Final = {
    "github-code-clean": "it is a script, which the package datasets runs no more",
    "audiocaps": "its texts are not on the Hub",
}
OTHER: Final = HubSet("", ("text", "content", "messages", "code"), rows=10_000)  # the first column that is there


def find_hub_set(asked: DataSet) -> HubSet:
    """The row for a name, with the splits that are asked for. Raises BadOption."""
    name = asked.name
    for refused, reason in REFUSED.items():
        if name.rpartition("/")[2] == refused:
            raise BadOption(f"dataset {name}: {reason}; give a file of it instead")
    repo = ALIASES.get(name, name)
    row = KNOWN.get(repo) or replace(OTHER, repo=repo)
    if repo.count("/") != 1:
        raise BadOption(
            f"dataset {name!r}: no such file, and no known set; known are random, self, {', '.join(ALIASES)}, "
            f"OWNER/NAME of the Hub, and paths of .json, .jsonl, .txt, .md"
        )
    wrong = [s for s in asked.splits if row.allowed and s not in row.allowed]
    if wrong:
        raise BadOption(f"dataset {name}: no split {wrong[0]!r}; it has {', '.join(row.allowed)}")
    return replace(row, splits=asked.splits or row.splits)


def read_hub_set(row: HubSet, seed: int) -> list[Entry]:
    """Texts of a set, shuffled. Raises MissingPackage without datasets, SourceUnreadable."""
    package = import_tuning_package("datasets", f"dataset {row.repo} of the Hub (a local file needs no package)")
    found: list[Entry] = []
    for split in row.splits:
        try:
            found += [_read_row(r, row) for r in _rows(package.load_dataset, row, split, seed)]
        except SourceUnreadable:
            raise
        except Exception as error:  # the package raises what its readers and its network do
            raise SourceUnreadable(
                f"dataset {row.repo}, split {split}: {type(error).__name__}: {error}; without a network, give a file"
            ) from error
    return shuffled(found, seed) if row.again else found


def _rows(load: Callable[..., Any], row: HubSet, split: str, seed: int) -> Iterator[Mapping[str, Any]]:
    named = {} if row.config is None else {"name": row.config}
    if row.rows is not None:
        return iter(load(row.repo, split=split, streaming=True, **named).shuffle(seed=seed).take(row.rows))
    whole = load(row.repo, split=split, **named)
    return iter(whole if row.again else whole.shuffle(seed=seed))


def _read_row(values: Mapping[str, Any], row: HubSet) -> Entry:
    where = f"dataset {row.repo}"
    columns: Sequence[str] = row.columns
    if row.repo not in KNOWN:
        columns = [c for c in row.columns if c in values][:1]
    missing = [c for c in columns if c not in values]
    if missing or not columns:
        raise SourceUnreadable(
            f"{where}: expected a column {' or '.join(missing or row.columns)}, found {list(values)}"
        )
    if columns[0] == "messages":
        return read_entry(values["messages"], where)
    return row.joint.join(str(values[c]) for c in columns)
