"""What a plan needs of disk and network, known before it runs."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from shardq.admission import ShardCost, least_disk_bytes
from shardq.ahead import count_windows
from shardq.onepass import OnePass
from shardq.side_files import select_side_files
from shardq.spans import Span, cut_all

METADATA_BYTES: Final = 64 << 10  # config, card, lock
TENSOR_BYTES: Final = 512  # of ledger and index; measured: 200
TASK_BYTES: Final = 256  # of the journal; measured: 170
WINDOW_S: Final = 300  # the Hub counts requests in windows of this length
ANONYMOUS_REQUESTS: Final = 3000  # that resolve a file, in a window; from the Hub's documentation of its limits
TOKEN_REQUESTS: Final = 5000  # the same with the token of a free account


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests of a run that reads its source from the Hub, if nothing has to be repeated."""

    hub: int  # that resolve a file's address and count against the Hub's limit
    storage: int  # that bring bytes


def shard_costs(work: OnePass, staged: bool, sealed: Sequence[Collection[str]] = ()) -> list[ShardCost]:
    """Disk of each shard in the order of the plan, of those that are needed for files other than the `sealed` ones of
    each output; `staged`: source shards are copied to the disk."""
    shards = work.checkpoint.shards
    order = {s.name: number for number, s in enumerate(shards)}
    output, until, needed = dict.fromkeys(order, 0), dict(order), set[str]()
    for lane, plan in enumerate(work.plans):
        for file in plan.files:
            if sealed and file.name in sealed[lane]:
                continue
            output[file.shards[0]] += file.size_bytes
            last = max(order[s] for s in file.shards)
            needed.update(file.shards)
            for s in file.shards:
                until[s] = max(until[s], last)
    left = [s for s in shards if s.name in needed]
    place = {s.name: number for number, s in enumerate(left)}
    ends = {order[s.name]: place[s.name] for s in left}
    return [
        ShardCost(s.name, s.size_bytes if staged else 0, output[s.name], ends[until[s.name]] - place[s.name])
        for s in left
    ]


def record_bytes(work: OnePass) -> int:
    """Disk for everything besides shards: ledger, index, journal, and the files copied from the source."""
    sides = sum(f.size_bytes for f in select_side_files(work.checkpoint.side_files))
    one = METADATA_BYTES + len(work.plans[0].decisions) * TENSOR_BYTES + len(work.bundles) * TASK_BYTES + sides
    return len(work.plans) * one


def disk_bytes(work: OnePass, staged: bool, uploads: bool) -> int:
    """The smallest --max-disk. `uploads`: outputs are deleted once they are uploaded."""
    return least_disk_bytes(shard_costs(work, staged), record_bytes(work), uploads)


def count_requests(work: OnePass, stream: bool) -> Requests:
    """Headers and small files, then one request a shard, or one for each span in range mode, and those of tensors that
    range mode reads ahead: of these fewer, where a shard comes in time to be measured for the next one."""
    shards = work.checkpoint.shards
    small = len(select_side_files(work.checkpoint.side_files)) + 2  # config and index
    spans = cut_all(work) if stream else {}
    bodies = sum(map(len, spans.values())) if stream else len(shards)
    ahead = _read_ahead(work, [s for own in spans.values() for s in own])
    windows = sum(count_windows(work.tensors[n]) for n in ahead)
    return Requests(hub=2 * len(shards) + small + len(ahead), storage=len(shards) + bodies + windows)


def ahead_bytes(work: OnePass) -> int:
    """Bytes that range mode reads twice: tensors that others in another piece wait for."""
    spans = [s for own in cut_all(work).values() for s in own]
    return sum(work.tensors[n].size_bytes for n in _read_ahead(work, spans))


def _read_ahead(work: OnePass, spans: Iterable[Span]) -> set[str]:
    """Tensors of which a piece needs the magnitude before all of them has come with it and the pieces before it."""
    ahead: set[str] = set()
    for span in spans:
        for name in {n for b in span.bundles for n in work.reaches.get(b.tensor, ())}:
            t = work.tensors[name]
            if t.shard != span.shard or t.begin + t.size_bytes > span.end:
                ahead.add(name)
    return ahead
