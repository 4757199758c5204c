"""Opens the account of disk of a run, with what an earlier one left."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from shardq.admission import Admission
from shardq.lane import Lane
from shardq.limits import Limits
from shardq.needs import record_bytes, shard_costs
from shardq.onepass import OnePass
from shardq.plans import OutputFile
from shardq.space import check_space


@dataclass(frozen=True, slots=True)
class Account:
    """What shards and files may take."""

    admission: Admission
    owners: Mapping[tuple[int, str], str]  # number of a lane, file -> the shard that it begins with

    def begun_files(self, lane: int) -> list[str]:
        """Files of a lane that are counted, as the shards that they begin with are begun."""
        begun = set(self.admission.begun)
        return [name for (number, name), owner in self.owners.items() if number == lane and owner in begun]

    def release(self, lane: int, file: OutputFile) -> None:
        """A file of a lane is off the disk."""
        self.admission.release(self.owners[lane, file.name], file.size_bytes)


def open_account(
    work: OnePass, lanes: Sequence[Lane], staged: Mapping[str, int], over: Collection[str], limits: Limits, remote: bool
) -> Account:
    """`staged`: disk that each source shard takes; `over`: shards that need not come any more. Raises BudgetTooSmall,
    DiskFull."""
    uploads = any(lane.uploader for lane in lanes) and not limits.keep_local
    made, held = [lane.made for lane in lanes], [lane.held for lane in lanes]
    todo = [
        replace(cost, staged_bytes=staged[cost.name])
        for cost in shard_costs(work, staged=False, made=made, proven=over, held=held)
    ]
    owners = {(f.lane, f.name): cost.name for cost in todo for f in cost.files}
    kept, waiting = record_bytes(work), dict[str, int]()
    for lane in lanes:
        for name, file in lane.files.items():
            owner = owners.setdefault((lane.number, name), file.shards[0])
            is_made = name in made[lane.number] or set(file.shards) <= set(over)
            if is_made and (name not in lane.uploaded or limits.keep_local):
                waiting[owner] = waiting.get(owner, 0) + file.size_bytes
    if not uploads:
        kept += sum(waiting.values())
        waiting = {}
    hurried = not remote and not any(lane.uploader for lane in lanes)
    admission = Admission(todo, kept, waiting, limits.max_disk_bytes, uploads, hurried)
    check_space(work, [x.staging for x in lanes], todo, uploads, limits.delete_source)
    return Account(admission, owners)
