"""Finished files of a job: their content in the place where the output will be, and a record of each."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from shardq.destinations.base import OnBytes, StoredFile
from shardq.errors import ChecksumMismatch, SourceUnreadable
from shardq.files.atomic import pwrite_all, reading, sync_way, writing
from shardq.lane import Lane, task_event
from shardq.nodes.folder import NO_LINKS, link_new, put_new
from shardq.nodes.job import Job

COPY_BYTES: Final = 4 << 20


class JobStorage:
    """Where a worker's finished files go: the destination's storage, or the job folder."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def upload(self, path: Path, file: StoredFile, on_bytes: OnBytes) -> None:
        """Store a finished file. In the job folder it appears whole, and once: whoever comes second leaves the first
        one's, which is equal. Raises RecipeChanged where a source shard was changed meanwhile, ChecksumMismatch,
        NotWritable, DiskFull, and what a destination's upload does."""
        planned = self._job.plan.files[self._job.record.files.index(file.name)]
        self._job.check_source(planned.shards)
        if self._job.destination:
            self._job.destination.upload(path, file, on_bytes)
        else:
            put_file(path, self._job.folder.ready / file.name, file, on_bytes)


def put_file(path: Path, target: Path, file: StoredFile, on_bytes: OnBytes) -> bool:
    """Give a finished file its name in the job folder by a link, or by a copy from another file system; False if it
    is there already. Raises ChecksumMismatch for a copy that is not as it was hashed, and for another file there."""
    on_bytes(0)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        new = False
        if not target.exists():
            try:
                os.link(path, target)  # no rename: `path` stays, as a run that is resumed looks for it
                sync_way(target.parent)
                new = True
            except FileExistsError:
                pass
            except OSError as error:
                if error.errno != errno.EXDEV and error.errno not in NO_LINKS:
                    raise
                new = _copy(path, target, file, on_bytes)
        if (size_bytes := target.stat().st_size) != file.size_bytes:
            raise ChecksumMismatch(
                f"{target} has {size_bytes} bytes, expected {file.size_bytes}: something else has written it; delete "
                "it and run again"
            )
    return new


def _copy(path: Path, target: Path, file: StoredFile, on_bytes: OnBytes) -> bool:
    temporary = target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp")
    digest, at = hashlib.sha256(), 0
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            with reading(path), path.open("rb") as source:
                while piece := source.read(COPY_BYTES):
                    with writing(temporary):
                        pwrite_all(fd, piece, at)
                    digest.update(piece)
                    at += len(piece)
                    on_bytes(len(piece))
            os.fsync(fd)
        finally:
            os.close(fd)
        if digest.hexdigest() != file.sha256:
            raise ChecksumMismatch(f"{path} is not as when it was hashed: check the disk, and run again")
        return link_new(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_record(job: Job, lane: Lane, file: str) -> None:
    """Say that a file is stored, and what was measured while it was made. Raises NotWritable, DiskFull."""
    sha256, size_bytes = lane.sealed[file]
    done = lane.finished.done
    tasks = [task_event(done[t.id]) for t in job.plan.tasks if file in t.files]
    record = {"file": file, "sha256": sha256, "size": size_bytes, "to": job.record.push_to, "tasks": tasks}
    path = job.folder.done / f"{job.unit(file)}.json"
    with writing(path):
        put_new(path, json.dumps(record, separators=(",", ":")).encode())


def journal_events(job: Job) -> Iterator[Mapping[str, Any]]:
    """What the journal of one run would say that had made all that has a record. Raises SourceUnreadable."""
    yield {"event": "start", "identity": job.record.identity}
    yield {"event": "stamps", "modified": job.record.stamps}
    for path in sorted(job.folder.done.glob("*.json")):
        try:
            with reading(path):
                record = json.loads(path.read_bytes())
            yield from record["tasks"]
            yield {"event": "sealed", "file": record["file"], "sha256": record["sha256"], "size": record["size"]}
            if record["to"]:
                yield {"event": "uploaded", "file": record["file"], "to": record["to"]}
        except (ValueError, TypeError, KeyError) as error:
            raise SourceUnreadable(
                f"{path} is no record of a finished file ({error}): delete it, and run `shardq worker` again"
            ) from error
