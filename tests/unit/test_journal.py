"""Journal: what was appended comes back, and damage only ever cuts the end off."""

import errno
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardq.errors import DiskFull, NotWritable
from shardq.journal import Journal

EVENTS: list[dict[str, Any]] = [
    {"event": "start", "identity": {"version": "0.1.0", "source": "org/name"}},
    {"event": "fetched", "shard": "model-1.safetensors", "sha256": "ab" * 32},
    {"event": "task", "id": 7, "checksum": "00ff", "sse": 0.25, "name": "päth.\u2028.\ud800\n"},
    {"event": "sealed", "file": "model-1.safetensors", "size": 4, "sha256": "cd" * 32},
    {"event": "freed", "shard": "model-1.safetensors"},
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=8,
)


def write(path: Path, events: list[dict[str, Any]]) -> bytes:
    journal, before = Journal.open(path)
    assert before == []
    with journal:
        for i, event in enumerate(events):
            journal.append(event, durable=i % 2 == 0)
    return path.read_bytes()


def read(path: Path) -> list[dict[str, Any]]:
    journal, events = Journal.open(path)
    journal.close()
    return events


def test_events_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, EVENTS)
    assert read(path) == EVENTS
    journal, _ = Journal.open(path)
    with journal:
        journal.append({"event": "more"}, durable=True)
    assert read(path) == [*EVENTS, {"event": "more"}]


def test_line_is_crc_and_compact_json(tmp_path: Path) -> None:
    content = write(tmp_path / "journal.jsonl", [{"event": "freed", "shard": "é"}])
    text = b'{"event":"freed","shard":"\\u00e9"}'
    assert content == f"{zlib.crc32(text):08x} ".encode() + text + b"\n"


@settings(max_examples=50, deadline=None)
@given(event=st.dictionaries(st.text(), JSON))
def test_any_json_object_survives(event: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "journal.jsonl")
        journal, _ = Journal.open(path)
        with journal:
            journal.append(event, durable=False)
        assert read(path) == [event]


def test_truncation_at_every_byte_leaves_a_prefix(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    content = write(path, EVENTS)
    for size_bytes in range(len(content) + 1):
        path.write_bytes(content[:size_bytes])
        whole_lines = content[:size_bytes].count(b"\n")
        assert read(path) == EVENTS[:whole_lines]
        assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[:whole_lines])


def test_flipped_bit_at_every_byte_leaves_what_is_before(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    content = write(path, EVENTS)
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        assert read(path) == EVENTS[: content[:position].count(b"\n")]


@pytest.mark.parametrize("text", [b"[1]", b"7", b"{", b"\xff", b""])
def test_line_that_is_no_object_ends_the_replay(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    good = write(path, EVENTS)
    path.write_bytes(good + f"{zlib.crc32(text):08x} ".encode() + text + b"\n" + good)
    assert read(path) == EVENTS
    assert path.read_bytes() == good


def test_append_after_a_torn_tail_continues_there(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(write(path, EVENTS)[:-3])
    journal, events = Journal.open(path)
    with journal:
        journal.append({"event": "again"}, durable=True)
    assert events == EVENTS[:-1]
    assert read(path) == [*EVENTS[:-1], {"event": "again"}]


@pytest.mark.parametrize("written_bytes", [0, 5, 40])
def test_full_disk_loses_only_the_event_that_did_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_bytes: int
) -> None:
    path = tmp_path / "journal.jsonl"
    journal, _ = Journal.open(path)
    pwrite = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        pwrite(fd, bytes(data)[:written_bytes], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with journal:
        journal.append(EVENTS[0], durable=True)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(DiskFull, match=r"journal\.jsonl"):
                journal.append(EVENTS[1], durable=True)
        crashed = tmp_path / "crashed.jsonl"
        crashed.write_bytes(path.read_bytes())
        assert read(crashed) == EVENTS[:1]
        journal.append({"event": "x"}, durable=False)
    assert read(path) == [EVENTS[0], {"event": "x"}]


def test_durable_events_and_a_new_name_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def record(fd: int) -> None:
        synced.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", record)
    journal, _ = Journal.open(tmp_path / "journal.jsonl")
    with journal:
        assert set(synced) == {"folder"}  # and those on the way to it
        synced.clear()
        journal.append(EVENTS[2], durable=False)
        assert synced == []
        journal.append(EVENTS[1], durable=True)
        assert synced == ["file"]


def test_what_is_read_back_is_written_again_and_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind an fsync that failed, the system may hold pages that it will never write."""
    path = tmp_path / "journal.jsonl"
    journal, _ = Journal.open(path)
    with journal:
        for event in EVENTS:
            journal.append(event, durable=False)
    done: list[bytes | str] = []
    pwrite, fsync = os.pwrite, os.fsync

    def note_pwrite(fd: int, data: bytes, offset: int) -> int:
        done.append(bytes(data))
        return pwrite(fd, data, offset)

    def note_fsync(fd: int) -> None:
        done.append("fsync")
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", note_pwrite)
        patch.setattr(os, "fsync", note_fsync)
        Journal.open(path)[0].close()
    assert done == [path.read_bytes(), "fsync"]
    assert read(path) == EVENTS


def test_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotWritable, match="nowhere"):
        Journal.open(tmp_path / "nowhere" / "journal.jsonl")


def test_closed_journal_takes_no_event(tmp_path: Path) -> None:
    journal, _ = Journal.open(tmp_path / "journal.jsonl")
    journal.close()
    journal.close()
    with pytest.raises(NotWritable):
        journal.append(EVENTS[0], durable=True)
