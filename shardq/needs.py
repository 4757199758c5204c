"""What a plan needs of disk and network, known before it runs."""

from dataclasses import dataclass
from itertools import groupby
from typing import Final

from shardq.admission import ShardCost, least_disk_bytes
from shardq.plans import Plan
from shardq.side_files import select_side_files
from shardq.spans import cut_spans

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


def shard_costs(plan: Plan, staged: bool) -> list[ShardCost]:
    """Disk of each shard in the order of the plan; `staged`: source shards are copied to the disk."""
    sizes = {s.name: s.size_bytes for s in plan.checkpoint.shards}
    return [ShardCost(f.shard, sizes[f.shard] if staged else 0, f.size_bytes) for f in plan.files]


def record_bytes(plan: Plan) -> int:
    """Disk for everything besides shards: ledger, index, journal, and the files copied from the source."""
    sides = sum(f.size_bytes for f in select_side_files(plan.checkpoint.side_files))
    return METADATA_BYTES + len(plan.decisions) * TENSOR_BYTES + len(plan.tasks) * TASK_BYTES + sides


def disk_bytes(plan: Plan, staged: bool, uploads: bool) -> int:
    """The smallest --max-disk. `uploads`: outputs are deleted once they are uploaded."""
    return least_disk_bytes(shard_costs(plan, staged), record_bytes(plan), uploads)


def count_requests(plan: Plan, stream: bool) -> Requests:
    """Headers and small files, then one request a shard, or one for each span in range mode."""
    shards = plan.checkpoint.shards
    small = len(select_side_files(plan.checkpoint.side_files)) + 2  # config and index
    bodies = len(shards)
    if stream:
        by_shard = {name: list(tasks) for name, tasks in groupby(plan.tasks, key=lambda t: t.shard)}
        bodies = sum(len(cut_spans(s.name, s.size_bytes, by_shard.get(s.name, []))) for s in shards)
    return Requests(hub=2 * len(shards) + small, storage=len(shards) + bodies)
