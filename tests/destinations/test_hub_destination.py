"""Uploads to a Hub on loopback: nothing is seen before the commit, everything after it, whatever fails on the way."""

import builtins
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shardq import destinations
from shardq.destinations.base import StoredFile
from shardq.destinations.hub import MAX_FILES, HubDestination, check_count
from shardq.destinations.hub_tree import git_hash
from shardq.errors import BadOption, ChecksumMismatch, HubAccess, HubTransfer
from shardq.sources.hub import open_hub
from shardq.sources.hub_errors import RetryPolicy

REPO = "org/quantized"
QUICK = RetryPolicy(failures=3, first_wait_s=0.01, longest_wait_s=0.02, timeout_s=5.0)
NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
CONTENT = {name: os.urandom(300_000) for name in NAMES}

Open = Callable[..., HubDestination]


def ignore(_count: int) -> None:
    pass


def stored_file(name: str, data: bytes) -> StoredFile:
    return StoredFile(name, len(data), hashlib.sha256(data).hexdigest())


FILES = [stored_file(name, data) for name, data in CONTENT.items()]


SMALL = {
    "config.json": b'{"a": 1}',
    "tokenizer.json": b'{"large": true}',  # the Hub wants it in storage
    "README.md": b'---\nlicense: "mit"\n---\n# card\n',
    "shardq.json": json.dumps({"files": dict.fromkeys(NAMES), "others": ["README.md", "config.json"]}).encode(),
}
ALL = {**CONTENT, **SMALL}


@pytest.fixture
def open_destination(hub: Any) -> Open:
    def make(branch: str | None = None, private: bool = False, xet: bool = False) -> HubDestination:
        return HubDestination(REPO, branch, private, hub.url, QUICK, xet)

    return make


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    for name, data in CONTENT.items():
        (tmp_path / name).write_bytes(data)
    return {name: tmp_path / name for name in NAMES}


def upload_all(destination: HubDestination, paths: dict[str, Path]) -> None:
    for file in FILES:
        destination.upload(paths[file.name], file, ignore)


def test_all_appears_at_once_and_reads_back(hub: Any, open_destination: Open, paths: dict[str, Path]) -> None:
    destination = open_destination()
    destination.prepare()
    counted = []
    for file in FILES:
        destination.upload(paths[file.name], file, counted.append)
        paths[file.name].unlink()  # the commit does not need it
    assert sum(counted) == sum(f.size_bytes for f in FILES)
    assert set(hub.files(REPO)) == {".gitattributes"}
    assert destination.provenance() is None
    assert not destination.holds(FILES, SMALL)

    commit = destination.commit(FILES, SMALL, "Quantize")

    assert [(c.oid, c.message) for c in hub.commits] == [(commit, "Quantize")]
    assert destination.holds(FILES, SMALL)
    assert destination.provenance() == json.loads(SMALL["shardq.json"])
    source = open_hub(REPO, endpoint=hub.url, retry=QUICK)
    assert source.commit == commit
    found = {f.name: source.read(f.name, 0, f.size_bytes) for f in source.files()}
    found.pop(".gitattributes")
    assert found == ALL


def test_parts_are_sent_one_by_one(hub: Any, open_destination: Open, paths: dict[str, Path]) -> None:
    hub.part_bytes = 99_999
    destination = open_destination()
    destination.prepare()
    upload_all(destination, paths)
    assert len(hub.seen(r"/part/", "PUT")) == 8
    destination.commit(FILES, SMALL, "Quantize")
    assert {**hub.files(REPO), ".gitattributes": b""} == {**ALL, ".gitattributes": b""}


def test_an_output_that_is_there_is_recognized(hub: Any, open_destination: Open, paths: dict[str, Path]) -> None:
    first = open_destination()
    first.prepare()
    upload_all(first, paths)
    commit = first.commit(FILES, SMALL, "Quantize")
    sent = len(hub.seen(r"/put/", "PUT"))

    again = open_destination()
    again.prepare()
    assert again.holds(FILES, SMALL)
    assert not again.holds(FILES, {**SMALL, "config.json": b'{"a": 2}'})
    assert not again.holds([StoredFile(NAMES[0], FILES[0].size_bytes, "0" * 64)], {})
    upload_all(again, paths)
    assert again.commit(FILES, SMALL, "Quantize") == commit
    assert len(hub.commits) == 1
    assert len(hub.seen(r"/put/", "PUT")) == sent


FAULTS = [
    ("status", r"objects/batch", "POST"),
    ("status", r"/put/", "PUT"),
    ("drop_put", r"/put/", "PUT"),
    ("lose_reply", r"/put/", "PUT"),
    ("reject_hash", r"/put/", "PUT"),
    ("status", r"/verify", "POST"),
    ("status", r"/preupload/", "POST"),
    ("status", r"/commit/", "POST"),
    ("lose_reply", r"/commit/", "POST"),
    ("drop_put", r"/commit/", "POST"),
    ("lose_reply", r"repos/create", "POST"),
]


@pytest.mark.parametrize(("kind", "path", "method"), FAULTS)
def test_a_passing_fault_costs_time_only(
    hub: Any, fake: ModuleType, open_destination: Open, paths: dict[str, Path], kind: str, path: str, method: str
) -> None:
    fault = fake.WriteFault(kind, path, method, at=1000 if "put" in path else 10)
    hub.write_faults.append(fault)
    destination = open_destination()
    destination.prepare()
    counted = []
    for file in FILES:
        destination.upload(paths[file.name], file, counted.append)
    commit = destination.commit(FILES, SMALL, "Quantize")
    assert fault.times == 0
    assert sum(counted) == sum(f.size_bytes for f in FILES)
    assert [c.oid for c in hub.commits] == [commit]
    assert {n: d for n, d in hub.files(REPO).items() if n != ".gitattributes"} == ALL


PART_FAULTS = [
    ("status", r"/part/", "PUT", 503),
    ("status", r"/part/", "PUT", 403),  # the address has expired
    ("drop_put", r"/part/", "PUT", 0),
    ("status", r"/complete/", "POST", 500),
    ("lose_reply", r"/complete/", "POST", 0),
]


@pytest.mark.parametrize(("kind", "path", "method", "status"), PART_FAULTS)
def test_a_passing_fault_of_a_part(
    hub: Any,
    fake: ModuleType,
    open_destination: Open,
    paths: dict[str, Path],
    kind: str,
    path: str,
    method: str,
    status: int,
) -> None:
    hub.part_bytes = 100_000
    fault = fake.WriteFault(kind, path, method, status=status, skip=1 if "part" in path else 0, at=50_000)
    hub.write_faults.append(fault)
    destination = open_destination()
    destination.prepare()
    counted: list[int] = []
    destination.upload(paths[NAMES[0]], FILES[0], counted.append)
    assert fault.times == 0
    assert sum(counted) == FILES[0].size_bytes
    assert hub.objects[FILES[0].sha256] == CONTENT[NAMES[0]]


def test_a_lasting_fault_ends_in_one_line(
    hub: Any, fake: ModuleType, open_destination: Open, paths: dict[str, Path]
) -> None:
    destination = open_destination()
    destination.prepare()
    hub.write_faults.append(fake.WriteFault("status", r"/put/", times=100))
    with pytest.raises(HubTransfer, match=r"model-00001.*gave up after 3 failures.*503") as caught:
        destination.upload(paths[NAMES[0]], FILES[0], ignore)
    assert "\n" not in str(caught.value)
    assert "signature" not in str(caught.value)


@pytest.mark.parametrize("part_bytes", [None, 100_000])
def test_refused_content_is_no_passing_fault(
    hub: Any, fake: ModuleType, open_destination: Open, paths: dict[str, Path], part_bytes: int | None
) -> None:
    hub.part_bytes = part_bytes
    destination = open_destination()
    destination.prepare()
    hub.write_faults.append(fake.WriteFault("reject_hash", r"/(put|part)/", "PUT", times=100))
    with pytest.raises(ChecksumMismatch, match=r"model-00001.*2 times in a row.*BadDigest"):
        destination.upload(paths[NAMES[0]], FILES[0], ignore)


def test_verification_that_fails_is_no_passing_fault(
    hub: Any, fake: ModuleType, open_destination: Open, paths: dict[str, Path]
) -> None:
    class Forgetful(dict[str, bytes]):
        def __setitem__(self, key: str, value: bytes) -> None:
            pass

    hub.objects = Forgetful()
    destination = open_destination()
    destination.prepare()
    hub.write_faults.append(fake.WriteFault("status", r"/verify", "POST", status=422, times=100))
    with pytest.raises(ChecksumMismatch, match=r"2 times in a row.*verification answers 422"):
        destination.upload(paths[NAMES[0]], FILES[0], ignore)


def test_a_file_that_has_changed_is_refused(hub: Any, open_destination: Open, paths: dict[str, Path]) -> None:
    destination = open_destination()
    destination.prepare()
    data = bytearray(CONTENT[NAMES[0]])
    data[5] ^= 1
    paths[NAMES[0]].write_bytes(data)
    with pytest.raises(ChecksumMismatch, match="2 times in a row"):
        destination.upload(paths[NAMES[0]], FILES[0], ignore)
    paths[NAMES[0]].write_bytes(data[:-1])
    with pytest.raises(ChecksumMismatch, match="299999 bytes, expected 300000"):
        destination.upload(paths[NAMES[0]], FILES[0], ignore)
    assert FILES[0].sha256 not in hub.objects


def test_a_file_is_read_once_and_not_hashed(
    open_destination: Open, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = open_destination()
    destination.prepare()
    read_bytes = 0
    pread = os.pread

    def count(fd: int, size: int, offset: int) -> bytes:
        nonlocal read_bytes
        data = pread(fd, size, offset)
        read_bytes += len(data)
        return data

    def refuse(*_args: object) -> None:
        raise AssertionError("hashed, or opened another way")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pread", count)
        patched.setattr(builtins, "open", refuse)
        patched.setattr("huggingface_hub.utils.sha.sha_fileobj", refuse)
        destination.upload(paths[NAMES[0]], FILES[0], ignore)
    assert read_bytes == FILES[0].size_bytes


def test_the_librarys_xet_client_is_used_when_asked_for(
    hub: Any, open_destination: Open, paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hf_xet")

    def refuse(*_args: object) -> None:
        raise AssertionError("hashed")

    monkeypatch.setattr("huggingface_hub.utils.sha.sha_fileobj", refuse)
    hub.xet_folder = tmp_path / "xet"
    destination = open_destination(xet=True)
    destination.prepare()
    counted: list[int] = []
    destination.upload(paths[NAMES[0]], FILES[0], counted.append)
    assert sum(counted) == FILES[0].size_bytes
    kept = [p for p in hub.xet_folder.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in kept) > FILES[0].size_bytes
    assert hub.seen(r"/put/", "PUT") == []


def test_dropped_uploads_are_reported(hub: Any, open_destination: Open, paths: dict[str, Path]) -> None:
    destination = open_destination()
    destination.prepare()
    upload_all(destination, paths)
    assert destination.stored(FILES) == set(NAMES)
    hub.collect_garbage()
    assert destination.stored(FILES) == set()
    with pytest.raises(HubAccess, match=r"refuses the commit \(400: LFS pointer of model-00001"):
        destination.commit(FILES, SMALL, "Quantize")
    destination.upload(paths[NAMES[0]], FILES[0], ignore)
    assert destination.stored(FILES) == {NAMES[0]}
    assert hub.commits == []


def test_the_token_stays_at_the_hub(hub: Any, fake: ModuleType, open_destination: Open, paths: dict[str, Path]) -> None:
    hub.part_bytes = 200_000
    destination = open_destination()
    destination.prepare()
    upload_all(destination, paths)
    destination.commit(FILES, SMALL, "Quantize")
    at_storage = [s for s in hub.log if s.origin == "storage"]
    assert {s.method for s in at_storage} == {"PUT"}
    assert all(s.authorization is None for s in at_storage)
    assert fake.TOKEN not in str([s.path for s in hub.log])


def test_repo_and_branch_are_made(hub: Any, open_destination: Open, paths: dict[str, Path]) -> None:
    destination = open_destination("w4", private=True)
    assert destination.label == f"{REPO}@w4"
    destination.prepare()
    assert hub.repos[REPO].access == "private"
    upload_all(destination, paths)
    destination.commit(FILES, SMALL, "Quantize")
    assert set(hub.files(REPO)) == {".gitattributes"}
    assert set(ALL) < set(hub.files(REPO, "w4"))
    again = open_destination("w4", private=True)
    again.prepare()
    assert again.holds(FILES, SMALL)
    assert not open_destination(private=True).holds(FILES, SMALL)


def test_a_public_repo_is_not_taken_for_a_private_one(hub: Any, open_destination: Open) -> None:
    hub.add_repo(REPO)
    with pytest.raises(HubAccess, match="public already"):
        open_destination(private=True).prepare()


@pytest.mark.parametrize("there", [True, False])
def test_a_token_that_may_only_read(
    hub: Any, fake: ModuleType, open_destination: Open, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    if there:
        hub.add_repo(REPO)
    monkeypatch.setenv("HF_TOKEN", fake.READ_TOKEN)
    with pytest.raises(HubAccess, match=r"refuses .*403.*token's rights") as caught:
        open_destination().prepare()
    assert fake.READ_TOKEN not in str(caught.value)


def test_no_token(open_destination: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubAccess, match="no token"):
        open_destination().prepare()


def test_offline(open_destination: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubAccess, match="offline"):
        open_destination().prepare()


@pytest.mark.parametrize("name", ["plain", "a/b/c", "org/--bad..name"])
def test_names_that_no_repo_can_have(hub: Any, name: str) -> None:
    with pytest.raises(HubAccess, match="cannot be the name of a Hub repo"):
        HubDestination(name, endpoint=hub.url, retry=QUICK).prepare()


def test_the_card_is_checked_by_the_hub(open_destination: Open) -> None:
    destination = open_destination()
    destination.check_card("---\nlicense: mit\n---\n")
    with pytest.raises(HubAccess, match=r"refuses README.md \(400: \"license\" must be a string\)"):
        destination.check_card("---\nlicense: [1]\n---\n")


def test_too_many_files_for_one_commit() -> None:
    check_count(MAX_FILES)
    with pytest.raises(HubAccess, match="25001 weight files"):
        check_count(MAX_FILES + 1)


def test_the_hash_that_git_gives() -> None:
    assert git_hash(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object


@pytest.mark.parametrize(
    ("text", "label"),
    [("org/name", "org/name"), ("hf://org/name", "org/name"), ("org/name@main", "org/name"), ("a/b@w4", "a/b@w4")],
)
def test_names_of_destinations(text: str, label: str) -> None:
    assert destinations.open_destination(text).label == label


def test_a_branch_without_a_name() -> None:
    with pytest.raises(BadOption, match="without a branch"):
        destinations.open_destination("org/name@")
