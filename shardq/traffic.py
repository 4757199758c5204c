"""What a plan needs of the network, and range mode beside it, known before it runs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from shardq.ahead import ahead_extents, ahead_memory_bytes
from shardq.loans import WINDOW_BYTES
from shardq.onepass import OnePass
from shardq.side_files import select_side_files
from shardq.spans import Span, cut_all

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
