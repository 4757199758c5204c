"""A tuning that dies at any moment: the same command ends with the same bytes, and nothing else is left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

pytest.importorskip("transformers", reason="block mode needs transformers")

import tuned_models as models

import shardq
from shardq.errors import TaskFailed
from shardq.lock import FolderLock
from shardq.tune.driver import LOCK

HERE: Final = Path(__file__).parent

LIMIT_S: Final = 240.0
KILLED: Final = -9
WORDS: Final = (
    "--scheme", "W4A16G32", "--format", "compressed-tensors", "--iters", "2", "--dataset", "random", "--nsamples", "4",
    "--seqlen", "8", "--parallel", "1", "-q",
)  # fmt: skip
# Where runs into the same folder die, one after the other, and how each of them ends.
DEATHS: Final = (
    ("block 0 all", KILLED),
    ("block 1 tuner", TaskFailed.exit_code),
    ("file model.layers.1.safetensors all", KILLED),
    ("block 2 command", KILLED),
    ("packing all", KILLED),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(models.make_model("llama", tmp_path_factory.mktemp("model") / "source"))


def _run(source: Path, out: Path, die: str = "") -> int:
    """Ends when all processes of the command have."""
    command = [sys.executable, str(HERE / "dying_cli.py"), "tune", str(source), *WORDS, "-o", str(out)]
    env = {**os.environ, "DIE": die, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, start_new_session=True) as process:
        code = process.wait(LIMIT_S)
        left = [p for p in psutil.process_iter() if _group(p.pid) == process.pid]
        _, alive = psutil.wait_procs(left, LIMIT_S)
        assert alive == []
    return code


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


def _contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_command_that_is_killed_again_and_again_ends_with_the_same_bytes(source: Path, tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert _run(source, whole / "out") == 0
    for place, ending in DEATHS:
        assert _run(source, again / "out", place) == ending, place
        assert not (again / "out" / "config.json").exists(), place
    assert _run(source, again / "out") == 0
    assert _contents(again) == _contents(whole)
    assert len(list((whole / "out.tuned").glob("*.safetensors"))) == 3
    assert shardq.verify(again / "out", deep=True, source=source).problems == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"kinds": ["kill", "torn"]}, 44),
        ({"kinds": ["undone", "removed", "done", "mixed", "EIO"], "share": [0, 6]}, 30),
    ],
)
def test_fault_at_every_call_that_changes_a_file(
    options: dict[str, Any], least: int, source: Path, tmp_path: Path
) -> None:
    driver = HERE.parent / "pipeline" / "fault_driver.py"
    command = [sys.executable, str(driver), "tuning", str(source), str(tmp_path), json.dumps(options)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # every run is a fork
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert found["singles"] >= least
    assert found["calls"].count("replace") == 3 + 3  # blocks; identity, ids and manifest


def test_what_a_killed_run_had_not_finished_goes(source: Path, tmp_path: Path) -> None:
    """Also hidden states whose file still had a name; but not before the lock is there."""
    from shardq.tune.options import build_options

    out, options = (
        tmp_path / "out",
        build_options({"algorithm": "rtn", "dataset": "random", "nsamples": 1, "seqlen": 4}),
    )
    left = [
        out / n for n in (".hidden.abc_1230.tmp", ".model.layers.0.safetensors.0a1b2c3d.tmp", ".ids.npy.01234567.tmp")
    ]
    out.mkdir()
    for path in (*left, out / ".keep.tmp"):
        path.write_bytes(b"half")
    with FolderLock(out / LOCK), pytest.raises(shardq.errors.OutputLocked):
        shardq.tune_model(source, shardq.make_recipe("W4A16G32"), out, options=options)
    assert all(path.exists() for path in left)
    shardq.tune_model(source, shardq.make_recipe("W4A16G32"), out, options=options)
    assert not any(path.exists() for path in left)
    assert (out / ".keep.tmp").exists()
