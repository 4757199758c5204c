"""Durable writes and exact reads, with the operating system failing on purpose."""

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from shardq.errors import CorruptShard, DiskFull, NotWritable, SourceUnreadable
from shardq.files import atomic
from shardq.files.atomic import (
    GATHERED_BYTES,
    explain_os_error,
    pread_exact,
    preallocate,
    pwrite_all,
    reading,
    sync_folder,
    sync_way,
    write_atomic,
    writing,
)


def failing(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def test_write_replaces_and_follows_the_umask(tmp_path: Path) -> None:
    target = tmp_path / "config.json"
    umask = os.umask(0o026)
    try:
        write_atomic(target, b"old")
        write_atomic(target, b"new content")
    finally:
        os.umask(umask)
    assert target.read_bytes() == b"new content"
    assert target.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [target]


def test_parts_follow_each_other_and_small_ones_are_written_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    pwrite = os.pwrite

    def count(fd: int, data: memoryview, offset: int) -> int:
        counts.append(len(data))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", count)
    sizes = (5, 0, GATHERED_BYTES - 6, 1, GATHERED_BYTES + 2, 0, 3)
    parts = [bytes([n]) * size for n, size in enumerate(sizes)]
    write_atomic(tmp_path / "x", *map(memoryview, parts))
    assert (tmp_path / "x").read_bytes() == b"".join(parts)
    assert counts == [GATHERED_BYTES - 1, 1, GATHERED_BYTES + 2, 3]


def test_write_syncs_file_then_renames_then_syncs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(fd: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(fd).st_mode)
        calls.append("fsync folder" if is_folder else "fsync file")
        fsync(fd)

    def note_replace(source: str, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_atomic(tmp_path / "x", b"1")
    assert calls == ["fsync file", "rename", "fsync folder"]


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, DiskFull),
        (errno.EDQUOT, DiskFull),
        (errno.EACCES, NotWritable),
        (errno.EIO, NotWritable),
    ],
)
def test_failed_write_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, expected: type[Exception]
) -> None:
    target = tmp_path / "index.json"
    target.write_bytes(b"old")

    def fail(*args: object) -> None:
        raise failing(code)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(expected, match=r"cannot write .*index\.json"):
        write_atomic(target, b"new")
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_bytes() == b"old"


def test_write_into_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotWritable, match=r"nowhere.*check the path"):
        write_atomic(tmp_path / "nowhere" / "x", b"")


def test_folder_sync_accepts_only_file_systems_that_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = iter([errno.EINVAL, errno.EIO])

    def fail(fd: int) -> None:
        raise failing(next(codes))

    monkeypatch.setattr(os, "fsync", fail)
    sync_folder(tmp_path)
    with pytest.raises(OSError, match="Input/output"):
        sync_folder(tmp_path)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:3], at))
    data = np.arange(10, dtype=np.uint16).reshape(2, 5)
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    try:
        pwrite_all(fd, data.data, 4)
        pwrite_all(fd, np.empty((0, 3), np.float32).data, 0)
        assert os.pread(fd, 100, 0) == bytes(4) + data.tobytes()
    finally:
        os.close(fd)


def test_short_reads_are_continued_and_end_of_file_is_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:4]], at))
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    try:
        out = bytearray(9)
        pread_exact(fd, memoryview(out), 1, "shard x, tensor t")
        assert out == b"123456789"
        pread_exact(fd, memoryview(b""), 99, "nothing")
        with pytest.raises(
            CorruptShard,
            match="shard x, tensor t is truncated: 1 of 9 bytes are missing at offset 10",
        ):
            pread_exact(fd, memoryview(out), 2, "shard x, tensor t")
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("failures", "code", "passes"),
    [(1, errno.EIO, True), (2, errno.EIO, False), (1, errno.ESTALE, False)],
)
def test_one_read_error_is_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int, code: int, passes: bool
) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    left = [failing(code)] * failures
    preadv = os.preadv

    def flaky(fd: int, views: list[memoryview], at: int) -> int:
        if left:
            raise left.pop()
        return preadv(fd, views, at)

    monkeypatch.setattr(os, "preadv", flaky)
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    out = bytearray(3)
    try:
        if passes:
            pread_exact(fd, memoryview(out), 0, "x")
            assert out == b"abc"
        else:
            with pytest.raises(SourceUnreadable, match="cannot read x"):
                pread_exact(fd, memoryview(out), 0, "x")
    finally:
        os.close(fd)


def test_preallocated_file_has_its_size_and_blocks(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(300_000))
    fd = os.open(path, os.O_RDWR)
    try:
        preallocate(fd, 200_000, "x")
        assert path.stat().st_size == 200_000
        assert path.stat().st_blocks * 512 >= 200_000
        preallocate(fd, 0, "x")
        assert path.stat().st_size == 0
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("code", "expected"), [(errno.EOPNOTSUPP, None), (errno.EINVAL, None), (errno.ENOSPC, DiskFull)]
)
def test_preallocation_falls_back_only_where_it_is_unsupported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, expected: type[Exception] | None
) -> None:
    def fail(fd: int, offset: int, size: int) -> None:
        raise failing(code)

    monkeypatch.setattr(os, "posix_fallocate", fail)
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    try:
        if expected is None:
            preallocate(fd, 5000, "x")
            assert os.fstat(fd).st_size == 5000
        else:
            with pytest.raises(expected, match=r"cannot write part x: .*free some space"):
                preallocate(fd, 5000, "part x")
    finally:
        os.close(fd)


def test_blocks_turn_system_errors_into_ours_and_nothing_else(tmp_path: Path) -> None:
    with (
        pytest.raises(SourceUnreadable, match="cannot read m: Permission denied; check its permissions"),
        reading("m"),
    ):
        raise failing(errno.EACCES)
    with pytest.raises(NotWritable, match="read-only"), writing(tmp_path):
        raise failing(errno.EROFS)
    with pytest.raises(KeyError), writing("m"):
        raise KeyError("a bug stays a bug")
    assert isinstance(explain_os_error(failing(errno.EFBIG), "m", writing=True), DiskFull)
    assert "see the reason" in str(explain_os_error(OSError("odd"), "m", writing=False))


def test_way_to_a_folder_is_synced_from_it_to_the_root_of_its_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    synced: list[str] = []
    monkeypatch.setattr(atomic, "sync_folder", synced.append)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == str(tmp_path.parent))
    sync_way(folder)
    assert synced == [str(p) for p in (folder, folder.parent, tmp_path, tmp_path.parent)]
    synced.clear()
    sync_way(folder, tmp_path)
    assert synced == [str(p) for p in (folder, folder.parent, tmp_path)]


def test_way_through_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        if path != str(tmp_path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(atomic, "sync_folder", refuse)
    sync_way(tmp_path)
    with pytest.raises(PermissionError):
        sync_way(tmp_path / "below")
