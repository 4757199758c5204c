"""Calibration data: texts, files, sets of the Hub, random ids or the model's own, as rows of equally many ids.

Source: AutoRound 0.16.1, `calib_dataset._get_dataset_impl` and `get_dataloader`. The same seed, length and count choose
the same samples as there from the same .json or .jsonl files, of one set or several; what differs is in
`data_choice.py`, `data_files.py` and `data_grammar.py`.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from shardq.errors import BadOption
from shardq.importance_files import DataKind
from shardq.tune.data_choice import Chosen, Row, choose, share
from shardq.tune.data_files import is_local, read_entry, read_local
from shardq.tune.data_grammar import RANDOM, SELF, DataSet, parse_datasets
from shardq.tune.data_hub import ALIASES, KNOWN, find_hub_set, read_hub_set
from shardq.tune.data_random import draw, permuted, shuffled
from shardq.tune.packages import import_torch
from shardq.tune.tokenizing import Tokenizer

if TYPE_CHECKING:
    import torch

KINDS: Final[dict[str, DataKind]] = {RANDOM: "random ids", SELF: "self-generated"}
TEXT: Final[DataKind] = "text"


@dataclass(frozen=True, slots=True)
class Samples:
    """What calibration runs through the model."""

    ids: "torch.Tensor"  # [n, seqlen] int64
    label: str  # of the data, without folders
    kind: DataKind
    dropped: int  # samples that were looked at and were too short, or more than half one token
    seed: int | None

    @property
    def tokens(self) -> int:
        """How many ids there are."""
        return int(self.ids.numel())


Sampler = Callable[[int, int, int], Samples]  # count, seqlen, seed -> the model's own tokens


def load_samples(
    data: str | Sequence[str] | Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    *,
    count: int,
    seqlen: int,
    seed: int,
    sampler: Sampler | None = None,
) -> Samples:
    """At most `count` samples of `seqlen` ids each: fewer where the data has no more, never none.

    `data` is a text of the grammar in `data_grammar.py`, or a list of texts, or of lists of ids, which are taken in
    their order. A text is cut at `seqlen`; one that has fewer ids is dropped. `sampler` makes what `self` stands for.
    Raises BadOption, SourceUnreadable, MissingPackage.
    """
    if count < 1 or seqlen < 1:
        raise BadOption(f"calibration needs at least one sample of one token, not {count} of {seqlen}")
    if not isinstance(data, str):
        entries = [read_entry(value, f"sample {number} of the list") for number, value in enumerate(data)]
        found = choose(entries, tokenizer, DataSet("of a list"), seqlen, count, seed)
        return _finish(found, "list", TEXT, seqlen, seed)
    asked = parse_datasets(data)
    load = _Loader(tokenizer, count, seqlen, seed, sampler)
    found = load.one(asked[0], count) if len(asked) == 1 else load.mix(asked)
    kinds = {KINDS.get(a.name, TEXT) for a in asked}
    kind: DataKind = kinds.pop() if len(kinds) == 1 else "unknown"
    return _finish(found, ",".join(_label(a.name) for a in asked), kind, seqlen, seed)


@dataclass(frozen=True, slots=True)
class _Loader:
    tokenizer: Tokenizer
    count: int
    seqlen: int
    seed: int
    sampler: Sampler | None

    def one(self, asked: DataSet, most: int | None) -> Chosen:
        """The rows of one set; at most its own number, or `most`."""
        limits = [n for n in (asked.samples, most) if n is not None]
        limit = min(limits) if limits else None
        if asked.name in KINDS:
            return Chosen(self._made(asked.name, self.count if limit is None else limit), 0)
        if _is_file(asked.name):
            if asked.splits:
                raise BadOption(f"dataset {_label(asked.name)}: a file has no splits; leave split away")
            entries = shuffled(read_local(asked.name), self.seed)
        else:
            row = find_hub_set(asked)
            asked = replace(asked, concat=asked.concat or row.concat)
            entries = read_hub_set(row, self.seed)
        return choose(entries, self.tokenizer, asked, self.seqlen, limit, self.seed)

    def mix(self, asked: Sequence[DataSet]) -> Chosen:
        """Rows of all sets in the proportions that are wanted, shuffled."""
        texts = {place: self.one(a, None) for place, a in enumerate(asked) if a.name not in KINDS}
        lengths = [
            len(texts[place].rows) if place in texts else a.samples or self.count for place, a in enumerate(asked)
        ]
        order = sorted(range(len(asked)), key=lengths.__getitem__)
        parts = share([lengths[place] for place in order], [asked[place].samples for place in order], self.count)
        rows: list[Row] = []
        for place, part in zip(order, parts, strict=True):
            rows += texts[place].rows[:part] if place in texts else self._made(asked[place].name, part)
        return Chosen(permuted(rows, self.seed)[: self.count], sum(t.dropped for t in texts.values()))

    def _made(self, name: str, count: int) -> list[Row]:
        """Rows that need no texts."""
        if count == 0:
            return []
        if name == RANDOM:
            return draw_rows(self.tokenizer, count, self.seqlen, self.seed)
        if self.sampler is None:
            raise BadOption("dataset self: the model samples it, and there is none here; give random, or a file")
        ids: list[Row] = self.sampler(count, self.seqlen, self.seed).ids.tolist()
        return ids


def draw_rows(tokenizer: Tokenizer, count: int, seqlen: int, seed: int) -> list[Row]:
    """[count][seqlen] ids, uniform over those that are neither special nor added to the vocabulary."""
    chosen = draw(len(tokenizer.regular), count * seqlen, seed).tolist()
    ids = [tokenizer.regular[place] for place in chosen]
    return [ids[begin : begin + seqlen] for begin in range(0, len(ids), seqlen)]


def _finish(found: Chosen, label: str, kind: DataKind, seqlen: int, seed: int) -> Samples:
    if not found.rows:
        raise BadOption(
            f"dataset {label}: no sample has {seqlen} tokens ({found.dropped} are too short, or mostly one token); ask "
            f"for shorter samples, or join them (:concat)"
        )
    torch = import_torch()
    return Samples(torch.tensor(found.rows, dtype=torch.int64), label, kind, found.dropped, seed)


def _label(name: str) -> str:
    """A name without folders; those of the Hub as they are."""
    return os.path.basename(os.path.normpath(name)) if _is_file(name) else name


def _is_file(name: str) -> bool:
    """True for a path, also of a folder; the known sets' names are theirs."""
    return is_local(name) and name not in KNOWN and name not in ALIASES
