"""What a plan needs of disk, known before it runs."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final

from shardq.admission import FileCost, ShardCost, least_disk_bytes
from shardq.onepass import OnePass
from shardq.plans import OutputFile
from shardq.side_files import select_side_files

METADATA_BYTES: Final = 64 << 10  # config, card, lock
TENSOR_BYTES: Final = 512  # of ledger and index; measured: 200
TASK_BYTES: Final = 256  # of the journal; measured: 170


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
