"""A batch of twelve repos on a Hub (on loopback) with faults, killed five times: in the end twelve commits, those of
undisturbed runs; then there is nothing to do, which takes two requests for each."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import shardq
from shardq import Limits

LIMIT_S = 120.0  # for a run that takes a few seconds on an idle machine
IDLE_S = 5.0  # in which a batch without anything to do ends
MODELS = 12
# Requests at whose arrival the batch is killed: what, how many pass before, whether the server does it all the same
MOMENTS = [
    (r"^GET /api/models/org/m05/revision/", 0, True),
    (r"^GET /store/", 3, True),
    (r"^PUT /put/", 2, True),
    (r"^POST .*/commit/", 2, False),
    (r"^POST .*/commit/", 3, True),
]


class KillingLog(list[Any]):
    """A hub's log that calls `kill` when the next of some requests arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.kill: Callable[[], object] | None = None
        self._pattern, self._skip, self._act = "", 0, True

    def set(self, moment: tuple[str, int, bool], kill: Callable[[], object]) -> None:
        (self._pattern, self._skip, self._act), self.kill = moment, kill

    def append(self, seen: Any) -> None:
        super().append(seen)
        if self.kill is None or not re.search(self._pattern, f"{seen.method} {seen.path}"):
            return
        self._skip -= 1
        if self._skip < 0:
            kill, self.kill = self.kill, None
            kill()
            if not self._act:
                raise ConnectionAbortedError


@pytest.fixture
def names(push_hub: Any, writable_hub_module: ModuleType, make_checkpoint: Callable[..., Path]) -> list[str]:
    """Twelve repos, no two alike."""
    files = {p.name: p.read_bytes() for p in make_checkpoint(hidden=128, layers=2, mlp=False).iterdir()}
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    made = []
    for number in range(MODELS):
        weights = bytearray(files[shards[0]])
        weights[-2 * number - 1] ^= 0x80  # the sign of one weight
        repo = writable_hub_module.Repo()
        repo.commit({**files, shards[0]: bytes(weights)})
        made.append(f"m{number:02d}")
        push_hub.repos[f"org/{made[-1]}"] = repo
    return made


@pytest.fixture
def manifest(tmp_path: Path, names: list[str]) -> Path:
    path = tmp_path / "nightly.toml"
    models = "\n".join(f'[[model]]\nsource = "org/{name}"' for name in names)
    path.write_text(
        '[defaults]\npush_to = "me/{name}-{scheme}"\n[budget]\nparallel = 1\n'
        f'[retry]\nfirst_wait = "0.1s"\nlongest_wait = "0.5s"\n{models}\n'
    )
    return path


def expect(names: list[str], folder: Path) -> dict[str, dict[str, bytes]]:
    """What undisturbed runs make, by repo."""
    found = {}
    for name in names:
        out = folder / name
        shardq.quantize(f"org/{name}", output_dir=out, limits=Limits(parallel=1))
        found[f"me/{name}-W4A16"] = {p.name: p.read_bytes() for p in out.iterdir()}
    return found


def begin(manifest: Path) -> "subprocess.Popen[str]":
    words = [sys.executable, "-P", "-m", "shardq.cli", "batch", str(manifest)]
    return subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def add_faults(hub: Any, fake: ModuleType) -> None:
    """What passes within a run, and what ends one: content that is wrong twice."""
    tree = hub.files("org/m03")
    shard = hashlib.sha256(tree[min(n for n in tree if n.endswith(".safetensors"))]).hexdigest()
    hub.faults += [
        fake.Fault("status", r"/api/models/org/m01/tree/", status=503, headers={"Retry-After": "0"}),
        fake.Fault("drop", r"^/store/", at=900, skip=9),
        fake.Fault("corrupt", f"^/store/{shard}", at=700, times=2, skip=1),
        fake.Fault("status", r"^/org/m07/resolve/", status=429, headers={"Retry-After": "0"}),
    ]
    hub.write_faults += [
        fake.WriteFault("status", r"^/put/", status=500, headers={"Retry-After": "0"}, skip=2),
        fake.WriteFault("lose_reply", r"/commit/", method="POST", skip=5),
        fake.WriteFault("drop_put", r"^/put/", method="PUT", at=100, skip=6),
    ]


def test_twelve_repos_with_faults_and_five_kills(
    push_hub: Any, writable_hub_module: ModuleType, names: list[str], manifest: Path, tmp_path: Path
) -> None:
    expected = expect(names, tmp_path / "expected")
    push_hub.log = log = KillingLog()
    add_faults(push_hub, writable_hub_module)
    for moment in MOMENTS:
        run = begin(manifest)
        log.set(moment, lambda pid=run.pid: os.kill(pid, signal.SIGKILL))
        output, _ = run.communicate(timeout=LIMIT_S)
        assert run.returncode == -signal.SIGKILL, (moment, output)
    last = begin(manifest)
    output, _ = last.communicate(timeout=LIMIT_S)
    assert last.returncode == 0, output
    assert Counter(c.repo for c in push_hub.commits) == dict.fromkeys(expected, 1)
    for repo, files in expected.items():
        assert {n: d for n, d in push_hub.files(repo).items() if n != ".gitattributes"} == files, repo
    assert [f for f in (*push_hub.faults, *push_hub.write_faults) if f.times > 0] == []  # all of them came
    assert list((manifest.parent / "nightly.batch" / "work").iterdir()) == []

    push_hub.log = []
    began_s = time.monotonic()
    again = begin(manifest)
    output, _ = again.communicate(timeout=LIMIT_S)
    assert time.monotonic() - began_s < IDLE_S
    assert again.returncode == 0, output
    assert "12 of 12 outputs are up to date" in output
    assert len(push_hub.log) == 2 * MODELS, [s.path for s in push_hub.log]
    assert {s.method for s in push_hub.log} == {"GET"}
    assert len(push_hub.commits) == MODELS
