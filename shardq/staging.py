"""The working folder of a run, and what an earlier run left in it.

    OUT/.shardq/lock            held while a run lives (see lock.py)
    OUT/.shardq/journal.jsonl   what is done (see journal.py)
    OUT/.shardq/source.json.zst the checkpoint's headers, kept only when source shards are deleted on the way
    OUT/.shardq/src/            fetched source shards
    OUT/.shardq/lent/           what streamed shards borrow of others (see loans.py)
    OUT/.shardq/part/           output files being written
    OUT/.shardq/ready/          output files that are complete, durable and hashed

Output files reach OUT itself only when all are ready, the index and config.json last; then .shardq goes away. So a
folder without config.json is unfinished, and one with shardq.json and without .shardq is finished.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

from shardq.errors import OutputOccupied, RecipeChanged
from shardq.figures import read_figures
from shardq.files.atomic import preallocate, pwrite_all, sync_folder, sync_way, writing
from shardq.journal import Journal, read_first
from shardq.plans import OutputFile, Plan
from shardq.tasks import Done, Task

WORK: Final = ".shardq"
PROVENANCE: Final = "shardq.json"
CONFIG: Final = "config.json"


@dataclass(frozen=True, slots=True)
class Progressed:
    """What the journal of an earlier run says, nothing if there was none."""

    tasks: Mapping[int, Done]
    sealed: Mapping[str, tuple[str, int]]  # file -> sha256, size
    uploaded: frozenset[str]  # sealed files that are in the destination's storage
    amax: Mapping[str, float]  # tensor -> largest magnitude
    lent: Mapping[tuple[str, str], str] = field(default_factory=dict)  # sha256 of what shards lend: see loans.Pair
    settled: frozenset[str] = frozenset()  # source shards of which all that was made is durable


class Staging:
    """Paths and journal of one output folder. Use only while its lock is held."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.work = out / WORK
        self.part = self.work / "part"
        self.ready = self.work / "ready"
        self.src = self.work / "src"
        self.lent = self.work / "lent"
        self.journal = self.work / "journal.jsonl"
        self.source_record = self.work / "source.json.zst"

    def make(self) -> None:
        """Make the folders. Raises NotWritable, DiskFull."""
        with writing(self.work):
            for folder in (self.part, self.ready, self.src):
                folder.mkdir(parents=True, exist_ok=True)

    def open(
        self, plan: Plan, modified: Mapping[str, int], restart: bool, destination: str | None
    ) -> tuple[Journal, Progressed]:
        """Replay the journal of a plan's run, or begin one. What was uploaded to `destination` need not be here.

        `modified` says when each shard of a source folder was last changed, in ns: what an earlier run made of a shard
        that has changed since is forgotten, as equal headers need not mean equal weights. Raises RecipeChanged, with
        the differing keys, when an earlier run had another identity and `restart` is false.
        """
        identity = plan.identity()
        journal, events = Journal.open(self.journal)
        if events and events[0]["identity"] != identity:
            if not restart:
                journal.close()
                raise RecipeChanged(changed_message(self.out, events[0]["identity"], identity))
            events = []
        if restart or not events:
            journal.close()
            self.discard()
            journal, _ = Journal.open(self.journal)
            journal.append({"event": "start", "identity": identity}, durable=True)
            events = []
        stamps = {"event": "stamps", "modified": modified}
        journal.append(stamps, durable=True)
        return journal, self.check_settled(self._progress([*events, stamps], plan, destination), plan, journal)

    def check_settled(self, before: Progressed, plan: Plan, journal: Journal) -> Progressed:
        """What is left of `before`, whose settled shards may have lost a file that they are in. That is recorded: when
        the file is there again, not all of them are in it."""
        gone = {f.name for f in plan.files if f.name not in before.sealed and not self.has_part(f)}
        lost = {t.shard for t in plan.tasks if t.files and (t.id not in before.tasks or not gone.isdisjoint(t.files))}
        if unsettled := before.settled & lost:
            journal.append({"event": "unsettled", "shards": sorted(unsettled)}, durable=True)
        return replace(before, settled=before.settled - unsettled)

    def refuse_other(self, identity: Mapping[str, Any]) -> None:
        """Raises RecipeChanged as `open` does, without changing anything."""
        journal, events = Journal.open(self.journal)
        journal.close()
        if events and events[0]["identity"] != identity:
            raise RecipeChanged(changed_message(self.out, events[0]["identity"], identity))

    def begun_identity(self) -> dict[str, Any] | None:
        """What an unfinished run here makes; None without one. Needs no lock."""
        event = read_first(self.journal)
        return event["identity"] if event and event["event"] == "start" else None

    def is_of(self, identity: Mapping[str, Any]) -> bool:
        """True if the run that left this working folder had `identity`, or did not get as far as saying so."""
        journal, events = Journal.open(self.journal)
        journal.close()
        return not events or bool(events[0]["identity"] == identity)

    def discard(self) -> None:
        """Remove everything that an earlier run left, published or not, except its lock. Raises NotWritable."""
        with writing(self.work):
            for path in self._published():
                path.unlink(missing_ok=True)
            sync_folder(self.out)
            shutil.rmtree(self.lent, ignore_errors=True)
            for folder in (self.part, self.ready, self.src):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True, exist_ok=True)
            for file in (self.journal, self.source_record):
                file.unlink(missing_ok=True)
            sync_folder(self.work)

    def begin(self, file: OutputFile) -> None:
        """Make a part of its final size, header first. Raises DiskFull, NotWritable."""
        path = self.part / file.name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                preallocate(fd, file.size_bytes, str(path))
                for offset, content in ((0, file.header), *file.fixed):
                    pwrite_all(fd, content, offset)
            finally:
                os.close(fd)

    def has_part(self, file: OutputFile) -> bool:
        """True if an earlier run has begun this part."""
        path = self.part / file.name
        return path.exists() and path.stat().st_size == file.size_bytes

    def trim_parts(self, wanted: Collection[str]) -> None:
        """Delete unfinished files other than the `wanted` ones."""
        for path in [p for p in self.part.rglob("*") if p.is_file()]:
            if path.relative_to(self.part).as_posix() not in wanted:
                with writing(path):
                    path.unlink()

    def trim_sources(self, wanted: Collection[str]) -> None:
        """Delete fetched source shards, whole or not, other than the `wanted` ones."""
        for path in [p for p in self.src.rglob("*") if p.is_file()]:
            name = path.relative_to(self.src).as_posix()
            if not any(name == w or name.startswith(w + ".") for w in wanted):
                with writing(path):
                    path.unlink()

    def drop_lent(self, shard: str | None = None) -> None:
        """Delete what a shard borrowed, or what all did. Raises NotWritable."""
        folder = self.lent / shard if shard else self.lent
        with writing(folder), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)

    def find(self, file: str) -> Path:
        """Where a sealed file is: in `ready`, or already in its place."""
        path = self.ready / file
        return path if path.exists() else self.out / file

    def drop(self, file: str) -> None:
        """Delete a sealed file that is uploaded. Raises NotWritable."""
        with writing(self.ready / file):
            (self.ready / file).unlink(missing_ok=True)

    def settle(self, file: str) -> None:
        """Move a finished part into `ready`; durable when this returns."""
        source, target = self.part / file, self.ready / file
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            sync_way(target.parent, self.ready)
            sync_folder(source.parent)

    def remove(self) -> None:
        """Remove the working folder: the output is complete. Raises NotWritable.

        The journal goes first: while it is there the run counts as unfinished, and resuming needs the rest.
        """
        with writing(self.work):
            self.journal.unlink(missing_ok=True)
            sync_folder(self.work)
            shutil.rmtree(self.work)
            sync_folder(self.out)

    def abandon(self) -> None:
        """Remove the working folder, and the output folder if it is then empty: the output is elsewhere."""
        self.remove()
        self.leave()

    def leave(self) -> None:
        """Remove the output folder if it is empty."""
        with contextlib.suppress(OSError):  # it holds something, or is not there
            self.out.rmdir()

    def _published(self) -> list[Path]:
        """What an earlier run has put, or was about to put, into the output folder; config.json first, so that the rest
        never loads."""
        names: set[str] = set()
        for folder in (self.out, self.ready, self.part):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # absent or damaged: not one of ours
                record = json.loads((folder / PROVENANCE).read_bytes())
                names |= {*record["files"], *record["others"]}
        inside = [n for n in names if not PurePosixPath(n).is_absolute() and ".." not in PurePosixPath(n).parts]
        return [self.out / n for n in sorted(inside, key=lambda n: (not _begins(n), n == PROVENANCE, n))]

    def _progress(self, events: list[dict[str, Any]], plan: Plan, destination: str | None) -> Progressed:
        shards_of = {f.name: f.shards for f in plan.files}
        amax: dict[str, float] = {}
        lent: dict[tuple[str, str], str] = {}
        modified: dict[str, int] = {}
        tasks: dict[int, Done] = {}
        sealed: dict[str, tuple[str, int]] = {}
        uploaded: set[str] = set()
        settled: set[str] = set()
        for e in events:
            if e["event"] == "task":
                if (measured := read_figures(e)) is not None:  # else it is done again, and so is its file
                    figures, losses = measured
                    tasks[e["id"]] = Done(e["id"], e["checksum"], figures, True, e.get("amax"), losses)
            elif e["event"] == "sealed":
                sealed[e["file"]] = (e["sha256"], e["size"])
                uploaded.discard(e["file"])
            elif e["event"] == "uploaded" and e["to"] == destination and e["file"] in sealed:
                uploaded.add(e["file"])
            elif e["event"] == "amax":
                amax[e["tensor"]] = e["value"]
            elif e["event"] == "settled":
                settled.add(e["shard"])
            elif e["event"] == "unsettled":
                settled -= set(e["shards"])
            elif e["event"] == "distrust":  # tasks that are done again in any case keep the files that are sealed
                tasks = {i: d for i, d in tasks.items() if _is_durable(plan.tasks[i], settled, sealed)}
            elif e["event"] == "lent":
                lent[e["to"], e["shard"]] = e["sha256"]
            elif e["event"] == "stamps":
                changed = {s for s, at in e["modified"].items() if modified.get(s, at) != at}
                tasks = {i: d for i, d in tasks.items() if changed.isdisjoint(plan.tasks[i].shards)}
                sealed = {f: v for f, v in sealed.items() if changed.isdisjoint(shards_of[f])}
                settled -= changed
                amax = {n: v for n, v in amax.items() if changed.isdisjoint(plan.weights.shards_of(n))}
                modified |= e["modified"]
        unmade = {f for t in plan.tasks if t.id not in tasks for f in t.files}
        sealed = {f: v for f, v in sealed.items() if f not in unmade and (f in uploaded or self._intact(f, v[1]))}
        for path in (p for p in self.ready.rglob("*") if p.is_file()):  # renamed, but the journal line was lost
            name = path.relative_to(self.ready).as_posix()
            if name not in sealed:
                with writing(path):
                    (self.part / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, self.part / name)
        return Progressed(tasks, sealed, frozenset(uploaded & sealed.keys()), amax, lent, frozenset(settled))

    def _intact(self, file: str, size: int) -> bool:
        """True if a sealed file is there, in `ready` or already in its place."""
        for path in (self.ready / file, self.out / file):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_size == size:
                    return True
        return False


def _is_durable(task: Task, settled: Collection[str], sealed: Collection[str]) -> bool:
    """True if what a task made is on the disk, or if it is done again without a look at what is there."""
    return task.shard in settled or any(f in sealed for f in task.files)


def _begins(name: str) -> bool:
    """True for a file without which nothing loads."""
    return name == CONFIG or name.endswith(".gguf")


def check_folder(out: Path, source: Path | None) -> None:
    """Refuse an output folder that holds something else, or that is the source. Raises OutputOccupied, NotWritable."""
    if source is not None:
        real, there = out.resolve(), source.resolve()
        if real == there or there in real.parents or real in there.parents:
            raise OutputOccupied(
                f"output folder {out} is, holds or lies in the source folder {source}: choose another --output-dir"
            )
    with writing(out):
        if out.exists() and not out.is_dir():
            raise OutputOccupied(f"{out} is a file: choose another --output-dir")
        names = sorted(p.name for p in out.iterdir()) if out.exists() else []
    if names and WORK not in names and PROVENANCE not in names:
        raise OutputOccupied(
            f"output folder {out} holds something else ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''}): "
            "choose another --output-dir or empty it"
        )


def changed_message(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The message of RecipeChanged for a folder whose identity is `old`."""
    return (
        f"{out} holds a run with other parameters; these differ: {differing(old, new)}. Repeat the earlier command to "
        "resume it, use --restart to discard it, or choose another --output-dir"
    )


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The keys of two identities that differ, with both values, shortened."""
    keys = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))

    def short(value: object) -> str:
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "..."

    return "; ".join(f"{k} (was {short(old.get(k))}, now {short(new.get(k))})" for k in keys)
