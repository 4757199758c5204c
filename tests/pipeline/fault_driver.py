"""Runs a scene again and again, each time with a fault at another call that changes files, and after each fault again
until it is done. A process of its own: every run is a fork of it, and only that dies.

    python fault_driver.py SCENE CHECKPOINT FOLDER OPTIONS

OPTIONS is one JSON object, see `Options`. Prints one JSON object, see `Found`.
"""

import gc
import hashlib
import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final
from unittest.mock import patch

from crash_calls import DEADLY, KINDS, ONLY_WRITES, WRITES, Fault, Watch
from crash_disk import CUTS, Disk
from crash_scenes import SCENES, Scene

from shardq.errors import ShardqError
from shardq.files.direct import BLOCK_BYTES
from shardq.journal import Journal

WEIGHTS: Final = (".safetensors", ".gguf")
DONE, REFUSED, RAISED = 0, 10, 11  # exit codes of a run
HANGS_S: Final = 60  # the time after which a run is killed


@dataclass(frozen=True, slots=True)
class Options:
    """What to try."""

    kinds: Sequence[str] = KINDS
    share: tuple[int, int] = (0, 1)  # of the single faults begin with that one, take every that-many-th
    doubles: int = 0  # how many random double faults
    seed: int = 1  # of the order; shares of one sweep have the same
    double_seed: int = 1
    verify_every: int = 50  # cases
    forgotten: Sequence[str] = ()  # a bug to find: see `Watch`
    early_delete: bool = False  # a bug to find: a source shard goes before the journal says that it may
    direct: bool = False  # pieces of a few blocks go past the page cache, too
    enough: int = 1_000_000  # stop after so many findings


@dataclass(slots=True)
class Found:
    """What came of it."""

    calls: list[str] = field(default_factory=list)  # of an undisturbed run
    singles: int = 0
    doubles: int = 0
    verified: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Sweep:
    """All faults of one scene."""

    def __init__(self, scene: Scene, notes: Path, options: Options) -> None:
        """`notes` is a folder outside the disk."""
        self._scene, self._options = scene, options
        self._outcome, self._saved = notes / "outcome.json", notes / "disk.pickle"
        self._found = Found()
        self._expected: dict[str, str] = {}
        self._originals: dict[str, str] = {}

    def run(self) -> Found:
        """Every single fault of the share, then the double ones."""
        began = time.monotonic()
        self._reset()
        self._originals = {n: _hash(p) for n, p in self._scene.only_here.items()}
        code = self._run(None)
        assert code == DONE, f"the undisturbed run ended with {code}: {self._said()}"
        self._expected = contents(self._scene.out)
        self._found.calls = json.loads(self._outcome.read_text())["calls"]
        for faults in (*self._singles(), *self._doubles()):
            if len(self._found.wrong) >= self._options.enough:
                break
            self._try(faults)
        self._found.seconds = time.monotonic() - began
        return self._found

    def _singles(self) -> Iterator[tuple[Fault]]:
        kinds = self._options.kinds
        all_faults = [
            Fault(kind, call, seed=call)
            for call, name in enumerate(self._found.calls, start=1)
            for kind in kinds
            if name in WRITES or kind not in ONLY_WRITES
        ]
        random.Random(self._options.seed).shuffle(all_faults)  # a bug is found sooner, and shares are alike
        rest, divisor = self._options.share
        yield from ((f,) for f in all_faults[rest::divisor])

    def _doubles(self) -> Iterator[tuple[Fault, Fault]]:
        chance = random.Random(self._options.double_seed)
        for i in range(self._options.doubles):
            first, second = (
                Fault(chance.choice(self._options.kinds), chance.randint(1, len(self._found.calls)), seed=i)
                for _ in range(2)
            )
            yield first, second

    # --- one case -----------------------------------------------------------------------------------------------------

    def _try(self, faults: Sequence[Fault]) -> None:
        """Begin anew, fail at each fault, then run once more without."""
        self._reset()
        wrong: list[str] = []
        for fault in faults:
            code = self._run(fault)
            if code not in _endings(fault):
                wrong.append(f"{fault.kind} at {fault.call} ended with {code}: {self._said()}")
            wrong += self._look()
        code = self._run(None)
        if code != DONE:
            wrong.append(f"the next run ended with {code}: {self._said()}")
        elif contents(self._scene.out) != self._expected:
            wrong.append(f"the next run's output differs: {self._difference()}")
        else:
            wrong += self._after()
        if len(faults) == 1:
            self._found.singles += 1
        else:
            self._found.doubles += 1
        where = ", ".join(f"{f.kind} at {self._name(f)}" for f in faults)
        self._found.wrong += [f"{where}: {w}" for w in wrong]

    def _look(self) -> list[str]:
        """What is wrong between two runs."""
        there = contents(self._scene.out)
        wrong: list[str] = []
        shards = {n: h for n, h in self._expected.items() if n.endswith(WEIGHTS)}
        incomplete = [n for n, h in shards.items() if there.get(n) != h]
        begins = self._scene.begins
        for folder in _finished(there, begins):
            wrong += [f"{folder}{begins} beside incomplete {n}" for n in incomplete if n.startswith(folder)]
        for name, source in self._scene.only_here.items():
            kept = source.exists() and _hash(source) == self._originals[name]
            made = shards[name] in (there.get(name), there.get(f".shardq/ready/{name}")) if name in shards else True
            if not kept and not made:  # of shards without a file of their own the next run tells
                wrong.append(f"{name} is lost")
        return wrong

    def _after(self) -> list[str]:
        """What is wrong if the power goes when all is done, and now and then what `verify` says."""
        case = self._found.singles + self._found.doubles
        kind = CUTS[case % len(CUTS)]
        if case % self._options.verify_every == 0:
            self._found.verified += 1
            outs = [self._scene.out / f for f in _finished(self._expected, self._scene.begins)]
            if problems := [p for out in outs for p in self._scene.check(out)]:
                return [f"verify: {p}" for p in problems]
        Disk.load(self._saved, self._scene.disk).cut(kind, random.Random(case))
        if self._lasting(contents(self._scene.out)) != self._lasting(self._expected):
            return [f"a later power cut ({kind}) changes the output: {self._difference()}"]
        return []

    def _lasting(self, there: Mapping[str, str]) -> dict[str, str]:
        """Without what a power cut may bring back or take."""
        return {n: h for n, h in there.items() if "/.shardq/" not in f"/{n}" and n not in self._scene.passing}

    # --- one run ------------------------------------------------------------------------------------------------------

    def _reset(self) -> None:
        self._scene.prepare()
        self._saved.unlink(missing_ok=True)

    def _run(self, fault: Fault | None) -> int:
        """Exit code of a run, or minus the signal that ended it."""
        self._outcome.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            signal.alarm(HANGS_S)
            os._exit(self._run_here(fault))
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _run_here(self, fault: Fault | None) -> int:
        disk = Disk.load(self._saved, self._scene.disk)
        watch = Watch(disk, self._saved, fault, self._options.forgotten)
        watch.begin()
        if self._options.early_delete:
            delete_early(self._scene.only_here)
        if self._options.direct:
            patch("shardq.files.direct.LEAST_BYTES", BLOCK_BYTES).start()
        code, said = DONE, ""
        try:
            self._scene.run()
        except ShardqError as e:
            code, said = REFUSED, str(e)
        except Exception as e:
            logging.getLogger(__name__).exception("not an error of shardq")
            code, said = RAISED, repr(e)
        if watch.escaped:
            code, said = RAISED, f"unseen changes: {watch.escaped}"
        disk.save(self._saved)
        self._outcome.write_text(json.dumps({"calls": watch.calls, "said": said}))
        return code

    # --- words --------------------------------------------------------------------------------------------------------

    def _said(self) -> str:
        return str(json.loads(self._outcome.read_text())["said"]) if self._outcome.exists() else ""

    def _name(self, fault: Fault) -> str:
        calls = self._found.calls
        return f"call {fault.call} ({calls[fault.call - 1] if fault.call <= len(calls) else 'behind the last'})"

    def _difference(self) -> str:
        there = contents(self._scene.out)
        return ", ".join(sorted(n for n, _ in there.items() ^ self._expected.items())) or "none"


def _finished(there: Mapping[str, str], begins: str) -> list[str]:
    """The output folders that have the file that comes last, each with a slash behind it; "" for the folder itself."""
    names = [n for n in there if "/.shardq/" not in f"/{n}"]
    return [n.removesuffix(begins) for n in names if n == begins or n.endswith(f"/{begins}")]


def _endings(fault: Fault) -> set[int]:
    """The exit codes that a run may end with; it may also have ended before the call."""
    if fault.kind in DEADLY:
        return {DONE, -signal.SIGKILL}
    return {DONE} if fault.kind == "short" else {DONE, REFUSED}


def delete_early(sources: Mapping[str, Path]) -> None:
    """The bug that matters most, in this process."""
    append = Journal.append

    def late(journal: Journal, event: Mapping[str, object], durable: bool) -> None:
        name = {"sealed": event.get("file"), "settled": event.get("shard")}.get(str(event["event"]))
        if path := sources.get(str(name)):
            path.unlink(missing_ok=True)
        append(journal, event, durable)

    patch.object(Journal, "append", late).start()


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, with its hash; the working folder counts, too."""
    return {p.relative_to(folder).as_posix(): _hash(p) for p in folder.rglob("*") if p.is_file()}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(scene: str, original: Path, folder: Path, options: Options) -> None:
    """Sweep one scene."""
    logging.disable(logging.WARNING)  # a torn journal is what this is about
    made = SCENES[scene](folder / "disk", original)
    made.prepare()
    made.run()  # loads every module before the forks
    gc.disable()  # a collection in a fork copies all pages
    print(json.dumps(asdict(Sweep(made, folder, options).run())))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), replace(Options(), **json.loads(sys.argv[4])))
