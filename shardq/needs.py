"""What a plan needs of disk and network, known before it runs."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from shardq.admission import FileCost, ShardCost, least_disk_bytes
from shardq.ahead import ahead_extents, ahead_memory_bytes
from shardq.loans import WINDOW_BYTES
from shardq.onepass import OnePass
from shardq.plans import OutputFile
from shardq.side_files import select_side_files
from shardq.spans import Span, cut_all

METADATA_BYTES: Final = 64 << 10  # config, card, lock
TENSOR_BYTES: Final = 512  # of ledger and index; measured: 200
TASK_BYTES: Final = 256  # of the journal; measured: 170
WINDOW_S: Final = 300  # the Hub counts requests in windows of this length
# Requests in a window that resolve a file, by who asks: the Hub's documentation of its limits, of September 2025.
REQUEST_LIMITS: Final[Mapping[str, int]] = {
    "anonymous": 3000, "token": 5000, "pro": 12_000, "team": 20_000, "enterprise": 50_000,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests of a run that reads its source from the Hub, if nothing has to be repeated."""

    hub: int  # that resolve a file's address and count against the Hub's limit
    storage: int  # that bring bytes


def shard_costs(
    work: OnePass,
    staged: bool,
    made: Sequence[Collection[str]] = (),
    proven: Collection[str] = (),
    held: Sequence[Collection[str]] = (),
) -> list[ShardCost]:
    """Disk of each shard in the order of the plan, of those that are needed for files other than the `made` ones of
    each output; `staged`: source shards are copied to the disk; `proven`: shards that need not come (proofs.py);
    `held`: files of each output that are on the disk from the beginning."""
    shards = work.checkpoint.shards
    order = {s.name: number for number, s in enumerate(shards)}
    until, files, needed = dict(order), dict[str, list[tuple[int, OutputFile, int]]](), set[str]()
    left_to_make = [
        (lane, file, coming)
        for lane, plan in enumerate(work.plans)
        for file in plan.files
        if (coming := [s for s in file.shards if s not in proven]) and not (made and file.name in made[lane])
    ]
    needed.update(*(coming for _, _, coming in left_to_make))
    left = [s for s in shards if s.name in needed]
    for lane, file, coming in left_to_make:
        first = left[0].name if held and file.name in held[lane] else coming[0]
        files.setdefault(first, []).append((lane, file, max(order[s] for s in coming)))
    apart = [coming for lane, _, coming in left_to_make if not work.plans[lane].settles]
    together = {t.shards & needed for p in work.plans if p.settles for t in p.tasks if t.files}
    for group in (*apart, *together):
        last = max((order[s] for s in group), default=0)
        until |= {s: max(until[s], last) for s in group}
    place = {s.name: number for number, s in enumerate(left)}
    ends = {order[s.name]: place[s.name] for s in left}
    lent = {s.name: sum(loan.disk_bytes for loan in work.loans.get(s.name, ())) for s in left}

    def hold(shard: str, last: int) -> int:
        return max(0, ends.get(last, place[shard]) - place[shard])

    return [
        ShardCost(
            s.name,
            s.size_bytes if staged else 0,
            sum(file.size_bytes for _, file, _ in files.get(s.name, ())),
            hold(s.name, until[s.name]),
            lent[s.name],
            tuple(
                FileCost(lane, file.name, file.size_bytes, hold(s.name, last))
                for lane, file, last in files.get(s.name, ())
            ),
        )
        for s in left
    ]


def record_bytes(work: OnePass) -> int:
    """Disk for everything besides shards: ledger, index, journal, and the files copied from the source."""
    sides = sum(f.size_bytes for f in select_side_files(work.checkpoint.side_files))
    lines = len(work.bundles) + sum(map(len, work.loans.values()))
    one = METADATA_BYTES + len(work.plans[0].decisions) * TENSOR_BYTES + lines * TASK_BYTES + sides
    return len(work.plans) * one


def disk_bytes(work: OnePass, staged: bool, uploads: bool, streamed: bool = False) -> int:
    """The smallest --max-disk. `uploads`: outputs are deleted once they are uploaded; `streamed`: range mode, which
    keeps of the source what shards borrow of others."""
    costs = shard_costs(work, staged)
    if streamed:
        costs = [replace(c, staged_bytes=c.lent_bytes) for c in costs]
    return least_disk_bytes(costs, record_bytes(work), uploads)


def count_requests(work: OnePass, stream: bool) -> Requests:
    """Headers and small files, then one request a shard, or one for each span in range mode, and those of what shards
    borrow and of tensors that range mode reads ahead: of these fewer, where a shard comes in time to be measured for
    the next one."""
    shards = work.checkpoint.shards
    small = len(select_side_files(work.checkpoint.side_files)) + 2  # config and index
    spans = cut_all(work) if stream else {}
    bodies = sum(map(len, spans.values())) if stream else len(shards)
    ahead = [ahead_extents(work.tensors[n]) for n in _read_ahead(work, [s for own in spans.values() for s in own])]
    loans = [loan for own in work.loans.values() for loan in own] if stream else []
    addresses = sum(len({shard for shard, _, _ in extents}) for extents in ahead) + len(loans)
    windows = sum(map(len, ahead)) + sum(len(loan.requests) for loan in loans)
    return Requests(hub=2 * len(shards) + small + addresses, storage=len(shards) + bodies + windows)


def requests_s(requests: int, limit: int) -> int:
    """The least seconds that so many requests take: all but the last window's worth wait for windows to end."""
    return (max(1, requests) - 1) // limit * WINDOW_S


def ahead_bytes(work: OnePass) -> int:
    """Bytes that range mode reads twice: tensors that others in another piece wait for."""
    spans = [s for own in cut_all(work).values() for s in own]
    return sum(end - begin for n in _read_ahead(work, spans) for _, begin, end in ahead_extents(work.tensors[n]))


def lent_bytes(work: OnePass) -> int:
    """Bytes that range mode reads twice: what shards borrow of others."""
    return sum(loan.read_bytes for own in work.loans.values() for loan in own)


def extra_memory_bytes(work: OnePass) -> int:
    """Memory for what range mode reads twice, at a time."""
    spans = [s for own in cut_all(work).values() for s in own]
    ahead = max((ahead_memory_bytes(work.tensors[n]) for n in _read_ahead(work, spans)), default=0)
    return ahead + (WINDOW_BYTES if work.loans else 0)


def _read_ahead(work: OnePass, spans: Iterable[Span]) -> set[str]:
    """Tensors of which a piece needs the magnitude before all of them has come with it and the pieces before it."""
    ahead: set[str] = set()
    for span in spans:
        for name in {n for b in span.bundles for n in work.reaches.get(b.tensor, ())}:
            t = work.tensors[name]
            if t.shard != span.shard or t.begin + t.size_bytes > span.end:
                ahead.add(name)
    return ahead
