"""The job folder: what is where, and the job as it was begun.

    JOB/job.json           what is made, and how; written once, by whoever comes first
    JOB/source.json.zst    the source's headers, as whoever came first has read them
    JOB/claims/            who works on which file (claims.py)
    JOB/work/              the staging folders of workers (slots.py)
    JOB/done/00003.json    the record of a finished file (records.py)
    JOB/output/            the output; finished files wait in its .shardq/ready
    JOB/complete.json      written when the output is complete

Every file appears whole, by a link or a rename, and none is changed.
"""

import errno
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from shardq.errors import OutputOccupied, SourceUnreadable
from shardq.files.atomic import pwrite_all, reading, sync_way, write_atomic, writing
from shardq.staging import Staging

FORMAT: Final = 1
NO_LINKS: Final = frozenset({errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EMLINK, errno.EOPNOTSUPP})


@dataclass(frozen=True, slots=True)
class JobRecord:
    """What all workers of a job agree on."""

    format: int
    fingerprint: str  # of the plan
    identity: Mapping[str, Any]  # of the plan, key by key
    files: tuple[str, ...]  # of the plan; their positions are the numbers of the units
    stamps: Mapping[str, int]  # when each shard of a source folder was last changed, in ns
    push_to: str | None  # label of the destination
    stale_s: float  # a claim that was not renewed for so long is taken over
    words: tuple[str, ...]  # of the command line that began it: source, recipe and destination


@dataclass(frozen=True, slots=True)
class JobFolder:
    """Paths, and the few files that are about the whole job."""

    path: Path

    @property
    def headers(self) -> Path:
        """The source's headers (checkpoint_record.py)."""
        return self.path / "source.json.zst"

    @property
    def claims(self) -> Path:
        """The folder of claims."""
        return self.path / "claims"

    @property
    def work(self) -> Path:
        """The folder of workers' staging folders."""
        return self.path / "work"

    @property
    def done(self) -> Path:
        """The folder of records of finished files."""
        return self.path / "done"

    @property
    def output(self) -> Path:
        """The output folder."""
        return self.path / "output"

    @property
    def ready(self) -> Path:
        """Where finished files wait."""
        return Staging(self.output).ready

    def make(self, record: JobRecord, headers: bytes) -> JobRecord:
        """Begin a job, or join it if another was first; the record that is there then.

        Raises OutputOccupied for a folder that holds something else, NotWritable, DiskFull.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if (there := self.read()) is not None:
                return there
            ours = {self.headers.name, "job.json", "claims", "work", "done"}
            if other := sorted(p.name for p in self.path.iterdir() if p.name not in ours and p.name[0] != "."):
                raise OutputOccupied(
                    f"job folder {self.path} holds something else ({', '.join(other[:4])}): choose another --job"
                )
            for folder in (self.claims, self.work, self.done):
                folder.mkdir(exist_ok=True)
            put_new(self.headers, headers)
            put_new(self.path / "job.json", json.dumps(asdict(record), indent=1).encode())
        made = self.read()
        assert made is not None
        return made

    def read(self) -> JobRecord | None:
        """The record of a job; None if the folder has none. Raises SourceUnreadable for one that is damaged."""
        path = self.path / "job.json"
        try:
            with reading(path):
                try:
                    data = path.read_bytes()
                except (FileNotFoundError, NotADirectoryError):
                    return None
            values = json.loads(data)
            if values["format"] != FORMAT:
                raise SourceUnreadable(
                    f"{path} has format {values['format']}, expected {FORMAT}: use the shardq that began the job"
                )
            return JobRecord(**{**values, "files": tuple(values["files"]), "words": tuple(values["words"])})
        except (ValueError, TypeError, KeyError) as error:
            raise SourceUnreadable(f"{path} is no record of a job ({error}): choose another --job") from error

    def completed(self) -> dict[str, Any] | None:
        """What the worker that ended the job left to say; None before."""
        with suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads((self.path / "complete.json").read_bytes())
            return found
        return None

    def complete(self, commit: str | None) -> None:
        """The output is complete. Raises NotWritable."""
        write_atomic(self.path / "complete.json", json.dumps({"commit": commit}).encode())


def put_new(path: Path, data: bytes) -> bool:
    """Put `data` at `path`, whole and durably, unless something is there: then False. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            pwrite_all(fd, data, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        return link_new(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def link_new(source: Path, target: Path) -> bool:
    """Give a whole file a second name in the same file system, unless that name is taken: then False.

    Where a file system has no links the file is moved, and of two that come at once the second one's stays: they are
    equal. Raises OSError.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if target.exists():
            return False
        os.replace(source, target)
    sync_way(target.parent)
    return True
