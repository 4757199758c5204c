"""The Hub source against a fake Hub with the real client: listing, pinning, verified downloads, refusals."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shardq.errors import (
    BadOption,
    HubAccess,
    NotWritable,
    ShardqError,
    SourceUnreadable,
)
from shardq.headers import read_checkpoint
from shardq.sources.demo import open_demo
from shardq.sources.hub import open_hub
from shardq.sources.hub_dial import origin
from shardq.sources.hub_errors import RetryPolicy
from shardq.sources.hub_transfer import Link

QUICK = RetryPolicy(first_wait_s=0.001, longest_wait_s=0.002, timeout_s=5.0)
SHARD = "model-00002-of-00003.safetensors"
REPO = "acme/demo"


def ignore_bytes(count: int) -> None:
    del count


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    stats = {p: p.lstat() for p in folder.rglob("*")}
    return {str(p): (s.st_ino, s.st_size, s.st_mtime_ns) for p, s in stats.items()}


def test_listing_has_all_pages_sizes_and_hashes(source: Any, hub: Any, repo: Any, contents: dict[str, bytes]) -> None:
    assert source.label == REPO
    assert source.commit == repo.refs["main"]
    assert source.remote
    assert [f.name for f in source.files()] == sorted(contents)
    by_name = {f.name: f for f in source.files()}
    assert all(f.size_bytes == len(contents[f.name]) for f in source.files())
    assert by_name[SHARD].sha256 == hashlib.sha256(contents[SHARD]).hexdigest()
    assert by_name["config.json"].sha256 is None
    assert hub.seen("/tree/")
    assert all(f"/tree/{source.commit}" in s.path for s in hub.seen("/tree/"))


def test_subfolder_names_are_relative(hub: Any, repo: Any) -> None:
    source = open_hub(REPO, subfolder="extra", endpoint=hub.url, retry=QUICK)
    assert [f.name for f in source.files()] == ["notes.txt"]
    assert source.read("notes.txt", 0, 5) == b"notes"
    with pytest.raises(HubAccess, match="no such file or folder: folder nowhere"):
        open_hub(REPO, subfolder="nowhere", endpoint=hub.url, retry=QUICK)


def test_checkpoint_equals_the_local_one(source: Any) -> None:
    remote, local = read_checkpoint(source), read_checkpoint(open_demo())
    assert remote.tensors == local.tensors
    assert remote.shards == local.shards
    assert remote.config == local.config
    assert remote.commit == source.commit


def test_fetch_writes_the_file_and_reports_its_bytes(source: Any, contents: dict[str, bytes], tmp_path: Path) -> None:
    steps: list[int] = []
    umask = os.umask(0o027)
    try:
        sha256 = source.fetch(SHARD, tmp_path / "shard", steps.append)
    finally:
        os.umask(umask)
    assert (tmp_path / "shard").read_bytes() == contents[SHARD]
    assert sha256 == hashlib.sha256(contents[SHARD]).hexdigest()
    assert sum(steps) == len(contents[SHARD])
    assert (tmp_path / "shard").stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("shard")] == ["shard"]


def test_fetch_of_a_small_file_returns_its_hash(source: Any, contents: dict[str, bytes], tmp_path: Path) -> None:
    assert (
        source.fetch("config.json", tmp_path / "c", ignore_bytes) == hashlib.sha256(contents["config.json"]).hexdigest()
    )


def test_range_read_is_exact(source: Any, hub: Any, contents: dict[str, bytes]) -> None:
    assert source.read(SHARD, 1000, 1777) == contents[SHARD][1000:1777]
    assert hub.seen("/store/")[-1].range == "bytes=1000-1776"
    assert source.read(SHARD, 5, 5) == b""


def test_private_repo_opens_with_the_token_only(
    hub: Any, repo: Any, fake_hub_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.access = "private"
    with pytest.raises(HubAccess, match=r"no repo acme/demo for you.*HF_TOKEN"):
        open_hub(REPO, endpoint=hub.url, retry=QUICK)
    monkeypatch.setenv("HF_TOKEN", fake_hub_module.TOKEN)
    assert open_hub(REPO, endpoint=hub.url, retry=QUICK).read("config.json", 0, 1) == b"{"


def test_gated_repo_says_what_to_do(hub: Any, repo: Any, tmp_path: Path) -> None:
    repo.access = "gated"
    source = open_hub(REPO, endpoint=hub.url, retry=QUICK)  # its listing is public
    with pytest.raises(HubAccess, match=r"gated .*accept its terms"):
        source.fetch(SHARD, tmp_path / "shard", ignore_bytes)
    assert not list(tmp_path.glob("shard*"))
    with pytest.raises(HubAccess, match="gated"):
        read_checkpoint(source)


def test_missing_repo_and_revision_are_refused(hub: Any, repo: Any) -> None:
    with pytest.raises(HubAccess, match="no repo acme/nothing"):
        open_hub("acme/nothing", endpoint=hub.url, retry=QUICK)
    with pytest.raises(HubAccess, match="no revision 'v9'"):
        open_hub(REPO, revision="v9", endpoint=hub.url, retry=QUICK)


def test_unacceptable_repo_name_is_refused_without_a_request(hub: Any) -> None:
    with pytest.raises(HubAccess, match="cannot be the name"):
        open_hub("acme/de--mo", endpoint=hub.url, retry=QUICK)
    assert not hub.log


def test_revision_stays_pinned_when_main_moves(
    source: Any, hub: Any, repo: Any, contents: dict[str, bytes], tmp_path: Path
) -> None:
    old = source.commit
    repo.commit({**contents, SHARD: b"something else", "config.json": b"{}"})
    source.fetch(SHARD, tmp_path / "shard", ignore_bytes)
    assert (tmp_path / "shard").read_bytes() == contents[SHARD]
    assert source.read("config.json", 0, len(contents["config.json"])) == contents["config.json"]
    assert all(f"/resolve/{old}/" in s.path for s in hub.seen("/resolve/"))
    assert open_hub(REPO, endpoint=hub.url, retry=QUICK).commit != old
    assert open_hub(REPO, revision=old, endpoint=hub.url, retry=QUICK).commit == old


def test_cached_file_is_used_and_left_alone(
    source: Any, hub: Any, contents: dict[str, bytes], client_settings: Path
) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(REPO, SHARD, revision=source.commit, endpoint=hub.url, cache_dir=client_settings)
    before = snapshot(client_settings)
    hub.log.clear()
    path = source.local_path(SHARD)
    assert path is not None
    assert path.read_bytes() == contents[SHARD]
    assert source.read(SHARD, 0, 64) == contents[SHARD][:64]
    assert not hub.log
    read_checkpoint(source)
    assert not [s for s in hub.log if SHARD in s.path]
    assert source.local_path("model-00001-of-00003.safetensors") is None
    assert snapshot(client_settings) == before


def test_cached_file_of_a_wrong_size_is_not_used(source: Any, hub: Any, client_settings: Path) -> None:
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(REPO, SHARD, revision=source.commit, endpoint=hub.url, cache_dir=client_settings)
    Path(path).resolve().write_bytes(b"short")
    assert source.local_path(SHARD) is None


def test_unwritable_target_is_named(source: Any, tmp_path: Path) -> None:
    with pytest.raises(NotWritable, match="no_such_folder"):
        source.fetch(SHARD, tmp_path / "no_such_folder" / "shard", ignore_bytes)


def test_unreadable_token_file_is_named(source: Any, hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    (tmp_path / "token_folder").mkdir()
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token_folder"))
    with pytest.raises(SourceUnreadable, match=r"cannot read .*token_folder"):
        source.fetch(SHARD, tmp_path / "shard", ignore_bytes)
    with pytest.raises(SourceUnreadable, match=r"cannot read .*token_folder"):
        open_hub(REPO, endpoint=hub.url, retry=QUICK)


def test_origin_tells_scheme_host_and_port_apart() -> None:
    assert origin("https://Hub.example/a") == origin("https://hub.example:443/b?c")
    different = {"https://a.b", "http://a.b", "https://a.b:444", "https://c.a.b", "https://a.b.c"}
    assert len({origin(u) for u in different}) == 5
    assert Link("https://a.b", QUICK).origin != origin("https://a.b@evil.example/x")


RUN = """
import json, sys
from pathlib import Path
from shardq.errors import ShardqError
from shardq.headers import read_checkpoint
from shardq.sources import open_source
try:
    source = open_source(sys.argv[1])
    checkpoint = read_checkpoint(source)
    for shard in checkpoint.shards:
        if source.local_path(shard.name) is None:
            source.fetch(shard.name, Path(sys.argv[2]) / shard.name, lambda n: None)
    print(json.dumps([source.remote, source.label, source.commit, len(checkpoint.tensors)]))
except ShardqError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def run_client(settings: dict[str, str], text: str, target: Path) -> list[Any]:
    keep = {k: v for k, v in os.environ.items() if k in {"PATH", "PYTHONPATH", "LANG"}}
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN, text, str(target)],
        env={**keep, **settings},
        cwd=target,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    result: list[Any] = json.loads(done.stdout)
    return result


def test_client_settings_come_from_the_environment(
    hub: Any, repo: Any, fake_hub_module: ModuleType, contents: dict[str, bytes], tmp_path: Path
) -> None:
    repo.access = "private"
    home, target = tmp_path / "home", tmp_path / "target"
    target.mkdir()
    online = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": fake_hub_module.TOKEN}
    sha = repo.refs["main"]
    assert run_client(online, f"hf://{REPO}@main", target) == [
        True,
        REPO,
        sha,
        len(read_checkpoint(open_demo()).tensors),
    ]
    for name in (n for n in contents if n.endswith(".safetensors")):
        assert (target / name).read_bytes() == contents[name]
    assert not list(home.rglob("*.safetensors"))


def test_offline_opens_a_cached_snapshot_only(
    hub: Any, repo: Any, client_settings: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants, snapshot_download

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubAccess, match="offline"):
        open_hub(REPO, endpoint=hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    snapshot_download(REPO, endpoint=hub.url, cache_dir=client_settings)
    before = snapshot(client_settings)
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    source = open_hub(REPO)
    assert (source.label, source.commit, source.remote) == (REPO, repo.refs["main"], False)
    assert read_checkpoint(source).tensors == read_checkpoint(open_demo()).tensors
    with pytest.raises(HubAccess, match="no complete snapshot of acme/demo at v2"):
        open_hub(REPO, revision="v2")
    assert not hub.log
    assert snapshot(client_settings) == before


def test_two_revisions_contradict() -> None:
    from shardq.sources import open_source

    with pytest.raises(BadOption, match="two revisions"):
        open_source("acme/demo@v1", revision="v2")


def test_every_refusal_is_one_line(hub: Any, repo: Any, fake_hub_module: ModuleType) -> None:
    repo.access = "gated"
    gated = open_hub(REPO, endpoint=hub.url, retry=QUICK)
    for call in (
        lambda: gated.read(SHARD, 0, 8),
        lambda: gated.read("nothing.txt", 0, 8),
        lambda: open_hub("acme/nothing", endpoint=hub.url, retry=QUICK),
        lambda: open_hub(REPO, revision="v9", endpoint=hub.url, retry=QUICK),
    ):
        with pytest.raises(ShardqError) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert "signature" not in str(caught.value)
