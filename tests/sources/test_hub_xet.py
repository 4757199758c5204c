"""Downloads through hf_xet from a store in a folder, in a process of their own: hf_xet starts threads."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shardq.errors import BadOption
from shardq.sources.hub import open_hub
from shardq.sources.hub_errors import RetryPolicy
from shardq.sources.hub_xet import XetOptions, xet_settings

pytestmark = [
    pytest.mark.usefixtures("token"),
    pytest.mark.skipif(importlib.util.find_spec("hf_xet") is None, reason="hf_xet is not installed here"),
]
SHARD = "model-00002-of-00003.safetensors"
REPO = "acme/demo"

UPLOAD = """
import sys
from hf_xet import XetSession
with XetSession().new_upload_commit(endpoint=sys.argv[1]) as commit:
    task = commit.start_upload_file(sys.argv[2])
print(task.result().xet_info.hash)
"""

FETCH = """
import json, sys
from pathlib import Path
from shardq.errors import ShardqError
from shardq.sources.hub import open_hub
from shardq.sources.hub_xet import XetOptions
source = open_hub(sys.argv[1], endpoint=sys.argv[2], xet=XetOptions(256 << 20))
steps = []
class Stop(Exception): pass
def count(n):
    steps.append(n)
    if sys.argv[5] == "stop": raise Stop
try:
    print(json.dumps([source.fetch(sys.argv[3], Path(sys.argv[4]), count), sum(steps)]))
except (ShardqError, Stop) as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def run(code: str, *arguments: str, home: Path) -> str:
    keep = {k: v for k, v in os.environ.items() if k in {"PATH", "PYTHONPATH", "HF_TOKEN"}}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        env={**keep, "HF_HOME": str(home)},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout


@pytest.fixture
def stored(hub: Any, repo: Any, contents: dict[str, bytes], tmp_path: Path) -> Path:
    """The folder of the store, with one shard in it."""
    file = tmp_path / "upload"
    file.write_bytes(contents[SHARD])
    hub.cas_url = f"local://{tmp_path}/cas"
    repo.xet_hashes[SHARD] = run(UPLOAD, hub.cas_url, str(file), home=tmp_path / "home").strip()
    return tmp_path / "cas"


def fetch(hub: Any, target: Path, how: str = "") -> list[Any]:
    result: list[Any] = json.loads(run(FETCH, REPO, hub.url, SHARD, str(target), how, home=target.parent / "home"))
    return result


def test_file_comes_through_xet(hub: Any, repo: Any, stored: Path, contents: dict[str, bytes], tmp_path: Path) -> None:
    assert fetch(hub, tmp_path / "shard") == [repo.sha256(contents[SHARD]), len(contents[SHARD])]
    assert (tmp_path / "shard").read_bytes() == contents[SHARD]
    assert [p.name for p in tmp_path.glob("shard*")] == ["shard"]
    assert not hub.seen("/store/")
    assert all(s.authorization for s in hub.seen("xet-read-token"))


def test_wrong_hash_is_set_aside(hub: Any, repo: Any, stored: Path, contents: dict[str, bytes], tmp_path: Path) -> None:
    changed = {**contents, SHARD: bytes(len(contents[SHARD]))}  # the listing promises what the store does not have
    repo.commit(changed)
    kind, message = fetch(hub, tmp_path / "shard")
    assert kind == "ChecksumMismatch"
    assert "2 times in a row" in message
    assert [p.name for p in tmp_path.glob("shard*")] == ["shard.bad"]


def test_stop_ends_it(hub: Any, stored: Path, tmp_path: Path) -> None:
    assert fetch(hub, tmp_path / "shard", "stop")[0] == "Stop"
    assert not (tmp_path / "shard").exists()


def test_lost_store_is_a_transfer_error(hub: Any, repo: Any, stored: Path, tmp_path: Path) -> None:
    repo.xet_hashes[SHARD] = "0" * 64
    kind, message = fetch(hub, tmp_path / "shard")
    assert kind == "HubTransfer"
    assert "leave --xet out" in message
    assert "\n" not in message


def test_budget_covers_all_buffers(hub: Any, repo: Any, quick: RetryPolicy, fake_hub_module: ModuleType) -> None:
    for budget in (128 << 20, 1 << 30, 64 << 30):
        settings = xet_settings(XetOptions(budget))
        in_flight = settings["client.ac_max_download_concurrency"] * (64 << 20)
        assert settings["reconstruction.download_buffer_limit"] + in_flight <= budget
        assert settings["reconstruction.download_buffer_size"] <= settings["reconstruction.download_buffer_limit"]
    with pytest.raises(BadOption, match="--xet needs 128 MiB"):
        open_hub(REPO, endpoint=hub.url, retry=quick, xet=XetOptions(1 << 20))
