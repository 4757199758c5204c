"""Two tunings into one folder: the second is told who works there, and a dead one's lock is taken over."""

import os
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="block mode needs transformers")

import tuned_models as models

from shardq.errors import OutputLocked
from shardq.lock import FolderLock
from shardq.recipe import make_recipe
from shardq.sources import open_source
from shardq.tune.driver import LOCK, Place, tune_blocks
from shardq.tune.options import DataOptions, TuneOptions
from shardq.tune.result import TuneResult

OPTIONS = TuneOptions(algorithm="rtn", data=DataOptions("random", nsamples=2, seqlen=8))


def _tune(source: Path, out: Path) -> TuneResult:
    return tune_blocks(open_source(str(source)), make_recipe("W4A16G32", layout="fake"), OPTIONS, Place(out))


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    source, out = models.make_model("llama", tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    with FolderLock(out / LOCK):
        before = sorted(p.name for p in out.iterdir())
        with pytest.raises(OutputLocked, match=f"pid {os.getpid()}"):
            _tune(source, out)
        assert sorted(p.name for p in out.iterdir()) == before
    (out / LOCK).write_text('{"host": "gone", "pid": 1, "started": "long ago"}')  # of a run that was killed
    assert _tune(source, out).blocks == 3
    assert (out / LOCK).read_bytes() == b""
