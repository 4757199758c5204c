"""The status file of a batch: where each entry stands. JSON, replaced as a whole, so that whoever looks sees all of it.

What is done is decided by the destinations' own records; the file adds what these cannot say: failures, when an entry
is tried again, and what collections have. Without it a batch asks, and goes on.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from shardq.errors import BadOption
from shardq.files.atomic import reading, write_atomic, writing
from shardq.version import VERSION

NAME: Final = "status.json"
FORMAT: Final = 1
State = Literal["waiting", "running", "done", "failed"]


@dataclass(frozen=True, slots=True)
class Trouble:
    """What went wrong."""

    type: str  # class of errors.py, or one of schedule.py's words
    message: str


@dataclass(frozen=True, slots=True)
class Standing:
    """Where an entry stands."""

    state: State
    source: str = ""
    commit: str | None = None  # of the source
    subfolder: str | None = None
    recipe: str = ""  # what `identify` says
    output: str = ""
    pushed_commit: str | None = None
    attempts: int = 0  # that failed, since the last success
    next_try: float | None = None  # seconds since 1970
    error: Trouble | None = None
    seconds: float = 0.0  # that the last attempt took
    collection: str | None = None  # that has the repo
    changed: str = ""  # UTC


class StatusFile:
    """The standings of all entries, by label, each change on the disk when `put` returns."""

    def __init__(self, path: Path, manifest: str, labels: Iterable[str]) -> None:
        """Read what an earlier run has left of these entries; others are forgotten. Raises BadOption for a file that is
        no status file, SourceUnreadable."""
        self._path, self._manifest = path, manifest
        before = read_status(path)
        self._standings = {label: before[label] for label in labels if label in before}

    def get(self, label: str) -> Standing | None:
        """None for an entry that nothing is known of."""
        return self._standings.get(label)

    def put(self, standings: Mapping[str, Standing]) -> None:
        """Change some entries. Raises NotWritable, DiskFull."""
        self._standings.update(standings)
        document = {
            "format": FORMAT,
            "shardq": VERSION,
            "manifest": self._manifest,
            "updated": now_text(),
            "entries": {label: asdict(s) for label, s in self._standings.items()},
        }
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n")


def read_status(path: Path) -> dict[str, Standing]:
    """The standings in a file, none without one. Raises BadOption, SourceUnreadable."""
    if not path.exists():
        return {}
    with reading(path):
        data = path.read_bytes()
    try:
        document = json.loads(data)
        found, standings = document["format"], {k: _standing(entry) for k, entry in document["entries"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadOption(f"{path} is no status file of a batch ({error!r}): move it away, and run again") from error
    if found != FORMAT:
        raise BadOption(f"{path} has format {found!r}, expected {FORMAT}: move it away, and run again")
    return standings


def _standing(entry: Mapping[str, Any]) -> Standing:
    known = {f.name for f in fields(Standing)}
    values = {k: v for k, v in entry.items() if k in known}
    error = values.pop("error", None)
    return Standing(**values, error=Trouble(error["type"], error["message"]) if error else None)


def now_text() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
