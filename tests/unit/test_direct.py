"""Writes and reads past the page cache: the same bytes as through it, whatever the disk does."""

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from shardq.arena import Arena, reserve
from shardq.files import direct
from shardq.files.direct import (
    BLOCK_BYTES,
    FAST_BYTES_PER_S,
    LEAST_BYTES,
    ROOM_BYTES,
    TRIAL_BYTES,
    DirectDisk,
    aligned_bytes,
    whole_blocks,
)
from shardq.slabs import DiskSlab, open_slab
from shardq.source_bytes import SourceBytes
from shardq.tasks import Workplace

SIZE = 6 << 20
FLAG = getattr(os, "O_DIRECT", 0)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file of ones."""
    (tmp_path / "file").write_bytes(b"\1" * SIZE)
    fd = os.open(tmp_path / "file", os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch, fd: int) -> list[int]:
    """Sizes of what goes past the cache from now on; skips where the file system has no such way."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | FLAG)
        os.preadv(fd, [aligned_bytes(BLOCK_BYTES)], 0)
    except OSError as error:
        pytest.skip(f"this file system has no O_DIRECT: {error}")
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~FLAG)
    if not FLAG:
        pytest.skip("needs O_DIRECT")
    sizes: list[int] = []
    write, read = os.pwrite, os.preadv

    def is_direct(fd: int) -> bool:
        return fcntl.fcntl(fd, fcntl.F_GETFL) & FLAG != 0

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        sizes.extend([data.nbytes] if is_direct(fd) else [])
        return write(fd, data, offset)

    def preadv(fd: int, rooms: list[memoryview], offset: int) -> int:
        sizes.extend([rooms[0].nbytes] if is_direct(fd) else [])
        return read(fd, rooms, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "preadv", preadv)
    return sizes


def noise(size_bytes: int, shift: int = 0) -> NDArray[np.uint8]:
    """Memory that begins `shift` bytes behind a block."""
    data = aligned_bytes(whole_blocks(size_bytes + shift + 1))[shift : shift + size_bytes]
    data[:] = np.random.default_rng(size_bytes).integers(0, 256, size_bytes, np.uint8)
    return data


def content(fd: int) -> bytes:
    return os.pread(fd, 2 * SIZE, 0)


EXTENTS = [
    (0, 0), (5, 1), (4095, 2), (0, BLOCK_BYTES), (0, LEAST_BYTES), (1, LEAST_BYTES), (4095, LEAST_BYTES + BLOCK_BYTES),
    (BLOCK_BYTES, ROOM_BYTES), (77, ROOM_BYTES + 5), (12288, SIZE - 12288), (9, 2 * ROOM_BYTES + 4105), (3, SIZE - 3),
]  # fmt: skip


@pytest.mark.parametrize("shift", [0, 8, 4090])
@pytest.mark.parametrize(("offset", "size"), EXTENTS)
def test_write_changes_what_it_is_given_and_nothing_else(fd: int, offset: int, size: int, shift: int) -> None:
    data = noise(size, shift)
    DirectDisk().write(fd, data, offset)
    assert content(fd) == b"\1" * offset + data.tobytes() + b"\1" * (SIZE - offset - size)
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & FLAG == 0


def test_whole_blocks_go_past_the_cache_and_ends_through_it(fd: int, passed: list[int]) -> None:
    disk = DirectDisk()
    disk.write(fd, noise(3 * BLOCK_BYTES), 0)  # too few
    assert passed == []
    disk.write(fd, noise(LEAST_BYTES + 2 * BLOCK_BYTES, shift=100), 100)  # in memory as in the file: no copy
    assert passed == [LEAST_BYTES + BLOCK_BYTES]
    disk.write(fd, noise(ROOM_BYTES + LEAST_BYTES), 2 * BLOCK_BYTES)
    assert passed[1:] == [ROOM_BYTES + LEAST_BYTES]
    disk.write(fd, noise(ROOM_BYTES + BLOCK_BYTES, shift=8), 0)
    assert passed[2:] == [ROOM_BYTES, BLOCK_BYTES]


def test_pieces_that_share_blocks_may_be_written_at_the_same_time(fd: int) -> None:
    """None loses what another has written into the same block."""
    step = LEAST_BYTES + 2 * BLOCK_BYTES + 777
    data = noise(step * 18)
    for _ in range(4):
        os.pwrite(fd, bytes(SIZE), 0)
        threads = [threading.Thread(target=write_every, args=(os.dup(fd), data, step, first, 3)) for first in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert content(fd)[: data.size] == data.tobytes()


def write_every(fd: int, data: NDArray[np.uint8], step: int, first: int, stride: int) -> None:
    """Every third piece, by a descriptor of its own."""
    own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR) if os.path.exists("/proc/self/fd") else fd
    disk = DirectDisk()
    for at in range(first * step, data.size, stride * step):
        disk.write(own, data[at : at + step], at)
    os.close(own)
    if own != fd:
        os.close(fd)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_file_system_that_takes_the_flag_and_refuses_the_write(
    fd: int, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    write, refused = os.pwrite, 0

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        nonlocal refused
        if fcntl.fcntl(fd, fcntl.F_GETFL) & FLAG:
            refused += 1
            raise OSError(code, os.strerror(code))
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    disk, data = DirectDisk(), noise(LEAST_BYTES * 2)
    for offset in (0, 4096):
        disk.write(fd, data, offset)
        assert content(fd)[offset : offset + data.size] == data.tobytes()
    assert refused <= 1, "it is asked once"


def test_file_system_that_refuses_the_flag(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fcntl.fcntl

    def refuse(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & FLAG:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return plain(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    data = noise(LEAST_BYTES)
    DirectDisk().write(fd, data, 0)
    assert content(fd)[: data.size] == data.tobytes()
    assert DirectDisk().read(fd, aligned_bytes(LEAST_BYTES), 0) == 0


def test_write_that_ends_early_goes_on_the_common_way(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        return write(fd, data[:BLOCK_BYTES] if fcntl.fcntl(fd, fcntl.F_GETFL) & FLAG else data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    data = noise(LEAST_BYTES * 3)
    DirectDisk().write(fd, data, 7)
    assert content(fd)[7 : 7 + data.size] == data.tobytes()


def test_full_disk_is_an_error(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space left"):
        DirectDisk().write(fd, noise(LEAST_BYTES), 0)
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & FLAG == 0


def test_slow_disk_is_written_through_the_cache(fd: int, passed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0

    def slow() -> float:
        nonlocal now_s
        now_s += 1
        return now_s

    monkeypatch.setattr(direct.time, "monotonic", slow)
    disk, data = DirectDisk(), noise(ROOM_BYTES)
    for _ in range(TRIAL_BYTES // ROOM_BYTES + 3):
        disk.write(fd, data, 0)
    assert sum(passed) == TRIAL_BYTES
    assert disk.read(fd, aligned_bytes(LEAST_BYTES), 0) == 0
    assert content(fd)[: data.size] == data.tobytes()


def test_disk_that_is_fast_on_the_average_stays(fd: int, passed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def now_s() -> float:
        """Every fourth write takes a while."""
        nonlocal calls
        calls += 1
        return 3 * ROOM_BYTES / FAST_BYTES_PER_S if calls % 8 == 0 else 0.0

    monkeypatch.setattr(direct.time, "monotonic", now_s)
    disk, data = DirectDisk(), noise(ROOM_BYTES)
    count = 3 * TRIAL_BYTES // ROOM_BYTES
    for _ in range(count):
        disk.write(fd, data, 0)
    assert len(passed) == count


def test_read_gives_what_there_is(fd: int, passed: list[int]) -> None:
    data = noise(SIZE)
    os.pwrite(fd, data, 0)
    os.ftruncate(fd, SIZE - 5000)
    disk, room = DirectDisk(), aligned_bytes(LEAST_BYTES)
    assert disk.read(fd, room, BLOCK_BYTES) == room.size
    assert np.array_equal(room, data[BLOCK_BYTES:][: room.size])
    assert disk.read(fd, room, SIZE - 2 * BLOCK_BYTES) == 2 * BLOCK_BYTES - 5000
    assert disk.read(fd, room, 2 * SIZE) == 0
    assert disk.read(fd, room[:BLOCK_BYTES], 0) == 0, "a small piece is read the common way"


def test_read_that_fails_is_left_to_the_common_way(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(fd: int, rooms: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", preadv)
    assert DirectDisk().read(fd, aligned_bytes(LEAST_BYTES), 0) == 0


@pytest.mark.parametrize("begin", [0, 2, 4096, 4098, 5001, 8190])
@pytest.mark.parametrize("alignment", [1, 2, 4])
def test_tiles_from_the_disk_are_those_of_the_file(fd: int, begin: int, alignment: int) -> None:
    data = noise(SIZE)
    os.pwrite(fd, data, 0)
    buffer, room = np.empty(1 << 20, np.uint8), aligned_bytes(ROOM_BYTES)
    size = SIZE - begin - 100
    with open_slab(fd, begin, size, buffer, alignment, "x", (DirectDisk(), room)) as slab:
        for at in range(0, size, buffer.size):
            tile = slab.tile(at, min(buffer.size, size - at))
            assert np.array_equal(tile, data[begin + at :][: tile.size])
            assert tile.ctypes.data % alignment == 0


def test_only_what_was_fetched_is_read_past_the_cache(tmp_path: Path) -> None:
    """A folder beside that of downloads is another one, even if its name begins as that one's does."""
    paths = {name: tmp_path / name for name in ("src/a", "src/deep/a", "src2/a", "src.old/a", "a")}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(8))

    def fetched(folder: str) -> list[str]:
        place = Workplace({name: str(path) for name, path in paths.items()}, (), True, None, folder)
        source, found = SourceBytes(place, DirectDisk()), []
        for name in paths:
            with source.open(name, 0, 8, np.empty(8, np.uint8), 1, "x") as slab:
                found += [name] if isinstance(slab, DiskSlab) else []
        return found

    assert fetched(f"{tmp_path}/src") == fetched(f"{tmp_path}/src/") == ["src/a", "src/deep/a"]
    assert fetched("") == []


@pytest.mark.parametrize("offset", [0, 8, 100, 4092, 12_345_678])
def test_arrays_lie_in_memory_as_in_their_file(offset: int) -> None:
    """Where their elements do; what is taken behind them is aligned as ever."""
    arena = Arena()
    arena.reset(reserve(((1,), np.uint8), ((77,), np.float16), ((10,), np.float64)) + BLOCK_BYTES)
    arena.take((1,), np.uint8)
    array, behind = arena.take((77,), np.float16, offset), arena.take((10,), np.float64)
    assert (array.ctypes.data - offset) % BLOCK_BYTES == 0
    assert behind.ctypes.data % 64 == 0
    assert behind.ctypes.data >= array.ctypes.data + array.nbytes
    assert arena.take((0,), np.float64, offset + 1).flags.aligned
