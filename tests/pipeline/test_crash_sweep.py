"""A fault at every call that changes a file, alone or with a second one in the run that follows: nothing is lost,
nothing half done looks finished, and the same call completes the output to the same bytes.

And the sweep sees the bugs that it is there for."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
DRIVER = HERE / "fault_driver.py"
CUTS = ("undone", "removed", "done", "mixed")  # as in crash_disk.py
LIMIT_S = 240.0
SHARES = 2  # driver processes at a time

Sweep = Callable[..., list[dict[str, Any]]]

# What a sweep has to find: the scene, and the options that put it in.
BUGS = {
    "file fsync of the seal": ("eating", {"forgotten": ["_make_durable"]}),
    "folder fsync of settle": ("eating", {"forgotten": ["sync_folder<Staging.settle"]}),
    "fsync of the journal": ("eating", {"forgotten": ["Journal.append"]}),
    "fsync of write_atomic": ("eating", {"forgotten": ["write_atomic"]}),
    "folder fsync of publish": ("eating", {"forgotten": ["sync_folder<publish"]}),
    "delete before the journal line": ("eating", {"early_delete": True}),
    "file fsync of a settled shard": ("gguf", {"forgotten": ["settle_files"]}),
    "folder fsync of a settled shard": ("gguf", {"forgotten": ["sync_folder<Worker._settle"]}),
    "delete before it is settled": ("gguf", {"early_delete": True, "kinds": ["removed"]}),
}


@pytest.fixture
def sweep(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Sweep:
    """sweep(scene, *options, first=): what `fault_driver.py` finds, one process for each of the options, all at a time;
    with `first` none goes on when one has found something."""

    def run(scene: str, *options: dict[str, Any], first: bool = False) -> list[dict[str, Any]]:
        source = make_checkpoint(layers=2, mlp=False, attention="o")
        begun: list[subprocess.Popen[str]] = []
        for i, words in enumerate(options):
            folder = tmp_path / f"process{i}"
            folder.mkdir()
            command = [sys.executable, str(DRIVER), scene, str(source), str(folder), json.dumps(words)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            begun.append(subprocess.Popen(command, text=True, start_new_session=True, **pipes))
        found: list[dict[str, Any]] = []
        with ThreadPoolExecutor(len(begun)) as pool:
            for ended in as_completed([pool.submit(finish, process) for process in begun]):
                found.append(ended.result())
                if first and found[-1]["wrong"]:
                    for process in begun:
                        stop(process)
                    break
        return found

    return run


def finish(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """What a driver prints."""
    out, messages = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, messages
    printed: dict[str, Any] = json.loads(out)
    return printed


def stop(process: "subprocess.Popen[str]") -> None:
    """End a driver, and the run that is under way."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scene", "part", "doubles"),
    [
        ("eating", 1, 120),
        ("nested", 8, 20),
        ("fetching", 4, 40),
        ("keeping", 8, 20),
        ("several", 40, 10),
        ("gguf parts", 10, 20),
        ("gguf", 24, 8),
        ("gguf fetching", 40, 6),
        ("gguf beside", 120, 6),
    ],
)
def test_fault_at_every_call(sweep: Sweep, scene: str, part: int, doubles: int) -> None:
    """`part`: of the faults of a scene that is much like the others, one in so many."""
    share = SHARES * part
    words = {"doubles": doubles // SHARES}
    found = sweep(scene, *({**words, "share": [i, share], "double_seed": i} for i in range(SHARES)))
    assert [w for f in found for w in f["wrong"]] == []
    assert len(found[0]["calls"]) > 100
    assert sum(f["singles"] for f in found) > 7 * len(found[0]["calls"]) / part
    assert sum(f["doubles"] for f in found) == doubles
    assert all(f["verified"] for f in found)


@pytest.mark.slow
@pytest.mark.parametrize(("scene", "part", "doubles"), [("eating", 4, 20), ("fetching", 12, 10)])
def test_fault_at_a_write_past_the_page_cache(sweep: Sweep, scene: str, part: int, doubles: int) -> None:
    share = SHARES * part
    words = {"doubles": doubles // SHARES, "direct": True}
    found = sweep(scene, *({**words, "share": [i, share], "double_seed": i} for i in range(SHARES)))
    assert [w for f in found for w in f["wrong"]] == []
    assert sum(f["singles"] for f in found) > 7 * len(found[0]["calls"]) / part


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_found(sweep: Sweep, bug: str) -> None:
    scene, options = BUGS[bug]
    words = {"kinds": CUTS, "enough": 1, **options}
    found = sweep(scene, *({**words, "share": [i, SHARES]} for i in range(SHARES)), first=True)
    assert any(f["wrong"] for f in found)


@pytest.mark.parametrize("scene", ["eating", "fetching", "gguf parts"])
def test_no_change_escapes_the_sweep(make_checkpoint: Callable[..., Path], tmp_path: Path, scene: str) -> None:
    """The C library sees the same calls as the sweep, native code included."""
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs Linux and a C compiler")
    shim, log = tmp_path / "shim.so", tmp_path / "log"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(shim), str(HERE / "crash_shim.c"), "-ldl"]
    built = subprocess.run(command, check=False, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    source = make_checkpoint(layers=2, mlp=False, attention="o")
    done = subprocess.run(
        [sys.executable, str(HERE / "crash_trace.py"), scene, str(source), str(tmp_path), str(log)],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    followed = Counter(name for name in json.loads(done.stdout) if name != "fsync")  # waiting changes nothing
    assert Counter(line.split()[0] for line in log.read_text().splitlines()) == followed
    assert followed.total() > 80
