"""Which samples of a set are taken, and how many of each set of a mix.

Source: AutoRound 0.16.1, `calib_dataset._get_dataset_impl`. Other than there:
- joined samples (`concat`) are there, and full also with tokenizers that put special tokens around a text: AutoRound's
  code for them would make those shorter and then drop them, but it fails before that, on every set;
- of several sets without `num` beside one with it, each gets its full share;
- what a chat template begins with the token of a beginning does not get a second one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from shardq.errors import BadOption, SourceUnreadable
from shardq.tune.data_files import Conversation, Entry, Running
from shardq.tune.data_grammar import DataSet
from shardq.tune.data_random import shuffled
from shardq.tune.tokenizing import Tokenizer

BATCH: Final = 64  # entries that are encoded at once

Row = list[int]


@dataclass(frozen=True, slots=True)
class Chosen:
    """Rows of one set, all of the same length, and how many entries were looked at in vain."""

    rows: list[Row]
    dropped: int


def choose(
    entries: Sequence[Entry], tokenizer: Tokenizer, asked: DataSet, seqlen: int, most: int | None, seed: int
) -> Chosen:
    """The first `most` samples (None: all) of entries that are in order already, each of `seqlen` ids.

    Windows of running text are shuffled, piece after piece being read until there are enough. Raises BadOption,
    SourceUnreadable.
    """
    rows: list[Row] = []
    rest: Row = []  # of joined samples
    dropped = 0
    for batch in _batches(entries):
        candidates = _encode(batch, tokenizer, asked, seqlen)
        if asked.concat:
            candidates, rest = _join(candidates, rest, tokenizer, seqlen)
        good = [row for row in candidates if len(row) == seqlen and not _is_monotonous(row)]
        rows += good
        dropped += len(candidates) - len(good)
        if most is not None and len(rows) >= most:
            break
    if any(isinstance(e, Running) for e in entries):
        rows = shuffled(rows, seed)
    return Chosen(rows[:most], dropped)


def share(lengths: Sequence[int], wanted: Sequence[int | None], count: int) -> list[int]:
    """How many samples of each set a mix of `count` takes: what is wanted, and of the others equal parts of the rest.

    Sets are in order of their lengths, the shortest first, so that the longer make up for what the shorter lack.
    """
    named = sum(w for w in wanted if w is not None)
    used = named if named <= count else 0  # AutoRound's rule: too many are all taken, and cut after shuffling
    left = sum(w is None for w in wanted)
    taken = []
    for length, want in zip(lengths, wanted, strict=True):
        part = (count - used) // left if want is None else want
        if want is None:
            left -= 1
            used += min(part, length)
        taken.append(min(part, length))
    return taken


def _batches(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Entries in their order, many short or one long at a time."""
    batch: list[Entry] = []
    for entry in entries:
        batch.append(entry)
        if len(batch) == BATCH or isinstance(entry, Running):
            yield batch
            batch = []
    if batch:
        yield batch


def _encode(entries: Sequence[Entry], tokenizer: Tokenizer, asked: DataSet, seqlen: int) -> list[Row]:
    """The ids of each entry, cut at `seqlen`; of running text, windows, of which the last may be short."""
    texts = [_text(e, tokenizer, asked) for e in entries if not isinstance(e, tuple | Running)]
    encoded = iter((tokenizer.encode_rendered if asked.chat else tokenizer.encode)(texts, seqlen) if texts else [])
    rows: list[Row] = []
    for entry in entries:
        if isinstance(entry, Running):
            rows += _windows(entry, tokenizer, asked, seqlen)
        elif isinstance(entry, tuple):
            rows.append(_checked(entry, tokenizer, asked)[:seqlen])
        else:
            rows.append(next(encoded))
    return rows


def _text(entry: str | Conversation, tokenizer: Tokenizer, asked: DataSet) -> str:
    if not asked.chat:
        return entry.text() if isinstance(entry, Conversation) else entry
    if tokenizer.template is None:
        raise BadOption(f"dataset {asked.name}: {tokenizer.label} has no chat template; leave apply_chat_template away")
    messages = entry.messages if isinstance(entry, Conversation) else ({"role": "user", "content": entry},)
    if asked.system_prompt and all(m["role"] != "system" for m in messages):
        messages = ({"role": "system", "content": asked.system_prompt}, *messages)
    return tokenizer.template.render(messages)


def _windows(entry: Running, tokenizer: Tokenizer, asked: DataSet, seqlen: int) -> list[Row]:
    if asked.chat:
        raise BadOption(f"dataset {asked.name}: running text has no messages; leave apply_chat_template away")
    size = _room(tokenizer, seqlen)
    (ids,) = tokenizer.encode_plain([entry.text])
    return [tokenizer.wrap(ids[begin : begin + size]) for begin in range(0, len(ids), size)]


def _join(rows: Sequence[Row], rest: Row, tokenizer: Tokenizer, seqlen: int) -> tuple[list[Row], Row]:
    """Rows of `seqlen` ids from shorter ones, and what is left: the special tokens are around the whole."""
    size = _room(tokenizer, seqlen)
    joined = rest + [i for row in rows for i in _bare(row, tokenizer)]
    full = len(joined) - len(joined) % size
    return [tokenizer.wrap(joined[begin : begin + size]) for begin in range(0, full, size)], joined[full:]


def _bare(row: Row, tokenizer: Tokenizer) -> Row:
    """A row without the special tokens around it."""
    prefix, suffix = tokenizer.prefix, tokenizer.suffix
    begin = len(prefix) if tuple(row[: len(prefix)]) == prefix else 0
    end = len(row) - (len(suffix) if suffix and tuple(row[-len(suffix) :]) == suffix else 0)
    return row[begin:end]


def _room(tokenizer: Tokenizer, seqlen: int) -> int:
    if seqlen <= tokenizer.around:
        raise BadOption(f"samples of {seqlen} tokens: {tokenizer.label} puts {tokenizer.around} around a text")
    return seqlen - tokenizer.around


def _checked(ids: tuple[int, ...], tokenizer: Tokenizer, asked: DataSet) -> Row:
    if ids and max(ids) >= tokenizer.limit:
        raise SourceUnreadable(
            f"dataset {asked.name}: id {max(ids)}, but {tokenizer.label} has ids below {tokenizer.limit}"
        )
    return list(ids)


def _is_monotonous(row: Row) -> bool:
    """True where the last token is more than half of a sample: padding, or a text that says nothing."""
    return len(row) > 2 and row.count(row[-1]) > len(row) // 2
