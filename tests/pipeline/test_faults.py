"""What a run meets on its way: full disks, damaged weights, sources that change under it.

Nothing that looks finished is left, and once the cause is gone the same call completes.
"""

import errno
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import shardq
from shardq import Limits, Progress
from shardq.errors import (
    BudgetTooSmall,
    CorruptShard,
    DiskFull,
    NonFiniteWeight,
    NotWritable,
    OutputOccupied,
    SourceUnreadable,
)
from shardq.files.safetensors import read_header
from shardq.needs import disk_bytes
from shardq.onepass import OnePass

MakeCheckpoint = Callable[..., Path]
HERE = Path(__file__).parent
SECOND = "model-00002-of-00003.safetensors"


def looks_unfinished(out: Path) -> bool:
    return not out.exists() or {p.name for p in out.iterdir()} <= {".shardq"}


def at_start(action: Callable[[], object]) -> Callable[[Progress], None]:
    """Acts between planning and the first task."""

    def report(step: Progress) -> None:
        if step.stage == "start":
            action()

    return report


# --- the disk ------------------------------------------------------------------------------------------------------


def test_disk_too_small_for_the_plan_is_refused_before_the_work(
    checkpoint: Path, tmp_path: Path, one: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: _Usage(100_000))
        with pytest.raises(DiskFull, match=r"needs 0\.00 GB more and its disk has 0\.00 GB free"):
            shardq.quantize(checkpoint, output_dir=tmp_path / "out", limits=one)
    assert looks_unfinished(tmp_path / "out")
    shardq.quantize(checkpoint, output_dir=tmp_path / "out", limits=one)


def test_full_disk_in_a_worker(checkpoint: Path, tmp_path: Path, one: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    plain, calls = os.pwrite, 0

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(DiskFull, match="No space left on device; free some space"):
            shardq.quantize(checkpoint, output_dir=out, limits=one)
    assert looks_unfinished(out)
    shardq.quantize(checkpoint, output_dir=out, limits=one)
    assert shardq.verify(out, deep=True, source=checkpoint).problems == ()


def test_file_size_limit_ends_with_the_code_of_a_full_disk(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-P", str(HERE / "limited_cli.py"), "quantize", str(checkpoint), "-o", str(out)]
    env = {**os.environ, "FILE_LIMIT_BYTES": "50000"}
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == DiskFull.exit_code, done.stderr
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    assert looks_unfinished(out)


@pytest.mark.parametrize("free", ["", str(1 << 40)], ids=["seen", "unseen"])
def test_file_system_that_is_too_small(checkpoint: Path, tmp_path: Path, free: str) -> None:
    """256 KiB, in a mount of the command's own; `unseen`: other writers take the space after the check."""
    disk = tmp_path / "disk"
    disk.mkdir()
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=256k none {shlex.quote(str(disk))}"
    try:
        can = subprocess.run([*inside, mount], check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        can = False
    if not can:
        pytest.skip("this machine does not let its users mount")
    command = [sys.executable, "-P", str(HERE / "limited_cli.py"), "quantize", str(checkpoint), "-o", str(disk / "out")]
    text = f"{mount} && {shlex.join(command)}; code=$?; ls -A {shlex.quote(str(disk / 'out'))}; exit $code"
    env = {**os.environ, "FREE_BYTES": free}
    done = subprocess.run([*inside, text], env=env, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == DiskFull.exit_code, done.stderr
    assert "Traceback" not in done.stderr
    assert ("No space left on device" if free else "more and its disk has") in done.stderr
    assert done.stdout.split() == [".shardq"]


def test_output_below_a_file(checkpoint: Path, tmp_path: Path, one: Limits) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotWritable, match="a part of the path is not a folder"):
        shardq.quantize(checkpoint, output_dir=tmp_path / "file" / "out", limits=one)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_without_permission(checkpoint: Path, tmp_path: Path, one: Limits) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(NotWritable, match="check its permissions"):
        shardq.quantize(checkpoint, output_dir=tmp_path / "locked" / "out", limits=one)


def test_output_folder_that_holds_something_else(checkpoint: Path, tmp_path: Path, one: Limits) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputOccupied, match=r"thesis\.tex"):
        shardq.quantize(checkpoint, output_dir=tmp_path, limits=one)


@pytest.mark.parametrize("below", [(), ("out",), ("..",)], ids=["is", "in", "around"])
def test_output_at_the_source(
    make_checkpoint: MakeCheckpoint, one: Limits, contents: Callable[[Path], dict[str, str]], below: Sequence[str]
) -> None:
    source = make_checkpoint(layers=1)
    before = contents(source.parent)
    with pytest.raises(OutputOccupied, match="is, holds or lies in the source folder"):
        shardq.quantize(source, output_dir=source.joinpath(*below), limits=one)
    assert contents(source.parent) == before


def test_memory_cap_below_the_need(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetTooSmall, match="--max-ram 50 MB is too small for 2 workers"):
        shardq.quantize(checkpoint, output_dir=tmp_path / "out", limits=Limits(parallel=2, max_ram_bytes=50_000_000))
    assert not (tmp_path / "out").exists()


def test_disk_cap_below_the_need(checkpoint: Path, tmp_path: Path) -> None:
    size = disk_bytes(OnePass((shardq.plan(checkpoint),)), staged=False, uploads=False)
    with pytest.raises(BudgetTooSmall, match="--max-disk"):
        shardq.quantize(checkpoint, output_dir=tmp_path / "out", limits=Limits(parallel=1, max_disk_bytes=size - 1))
    shardq.quantize(checkpoint, output_dir=tmp_path / "out", limits=Limits(parallel=1, max_disk_bytes=size))


# --- the source ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "shown"), [(0x7FC0, "nan"), (0x7F80, "inf"), (0xFF80, "-inf")])
def test_weight_that_is_not_finite(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, one: Limits, bits: int, shown: str
) -> None:
    source, out = make_checkpoint(), tmp_path / "out"
    tensor = next(t for t in read_header(source / SECOND).tensors if t.name.endswith("1.mlp.up_proj.weight"))
    row, column = 300, 77
    weights = np.memmap(source / SECOND, np.uint8, "r+")
    at = tensor.begin + (row * tensor.shape[1] + column) * 2
    weights[at : at + 2] = np.frombuffer(np.uint16(bits).tobytes(), np.uint8)
    weights.flush()
    with pytest.raises(NonFiniteWeight) as refusal:
        shardq.quantize(source, output_dir=out, limits=one)
    where = f"model.layers.1.mlp.up_proj.weight in {SECOND} holds {shown} at row 300, column 77"
    assert str(refusal.value).startswith(where)
    assert "--ignore model.layers.1.mlp.up_proj" in str(refusal.value)
    assert looks_unfinished(out)


@pytest.mark.parametrize("parallel", [1, 2])
def test_source_shard_cut_after_planning(make_checkpoint: MakeCheckpoint, tmp_path: Path, parallel: int) -> None:
    source, out = make_checkpoint(), tmp_path / "out"
    whole = (source / SECOND).read_bytes()
    cut = at_start(lambda: os.truncate(source / SECOND, len(whole) // 2))
    with pytest.raises(CorruptShard, match=f"in {SECOND} is truncated"):
        shardq.quantize(source, output_dir=out, limits=Limits(parallel=parallel), report=cut)
    assert looks_unfinished(out)
    (source / SECOND).write_bytes(whole)
    shardq.quantize(source, output_dir=out, limits=Limits(parallel=parallel))
    assert shardq.verify(out, deep=True, source=source).problems == ()


@pytest.mark.parametrize("stage", ["start", "work"])
def test_source_shard_deleted_on_the_way(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, one: Limits, stage: str
) -> None:
    source, out = make_checkpoint(), tmp_path / "out"
    shard, aside = source / "model-00003-of-00003.safetensors", tmp_path / "aside"

    def report(step: Progress) -> None:
        if step.stage == stage and not aside.exists():
            shard.rename(aside)

    with pytest.raises(SourceUnreadable, match=shard.name):
        shardq.quantize(source, output_dir=out, limits=one, report=report)
    assert looks_unfinished(out)
    aside.rename(shard)
    shardq.quantize(source, output_dir=out, limits=one)
    assert shardq.verify(out, deep=True, source=source).problems == ()


def test_source_is_never_written_to(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, one: Limits, contents: Callable[[Path], dict[str, str]]
) -> None:
    source = make_checkpoint()
    before = contents(source)
    for path in source.iterdir():
        path.chmod(0o400)
    source.chmod(0o500)
    shardq.quantize(source, output_dir=tmp_path / "out", limits=one)
    source.chmod(0o700)
    assert contents(source) == before


class _Usage:
    """What shutil.disk_usage returns."""

    def __init__(self, free: int) -> None:
        self.free = free
