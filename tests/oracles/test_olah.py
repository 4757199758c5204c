"""A Hub that nobody here wrote: olah serves a git repo as the Hub would, without lengths and without byte ranges."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardq.errors import HubTransfer
from shardq.headers import read_checkpoint
from shardq.sources.demo import open_demo
from shardq.sources.hub import ignore_bytes, open_hub
from shardq.sources.hub_errors import RetryPolicy

pytestmark = pytest.mark.oracle
LIMIT_S = 60.0
GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")


@pytest.fixture(scope="module")
def olah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the demo model as acme/demo; it asks the real Hub what an unnamed revision is."""
    command = shutil.which("olah-cli")
    if command is None or shutil.which("git") is None:
        pytest.skip("olah or git is not installed here; `nox -s oracles` installs olah")
    folder = tmp_path_factory.mktemp("olah")
    repo = folder / "mirrors" / "models" / "acme" / "demo"
    repo.mkdir(parents=True)
    for name, data in open_demo().contents.items():
        (repo / name).write_bytes(data)
    for words in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "all")):
        subprocess.run([*GIT, *words], cwd=repo, check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = folder / "olah.toml"
    config.write_text(
        f'[basic]\nhost = "127.0.0.1"\nport = {port}\nrepos-path = "{folder}/cache"\n'
        f'mirrors-path = ["{folder}/mirrors"]\n[accessibility]\noffline = true\n'
    )
    log = (folder / "log").open("wb")
    server = subprocess.Popen(
        [command, "--config", str(config), "--log-path", str(folder)], cwd=folder, stdout=log, stderr=log
    )
    try:
        ends_at = time.monotonic() + LIMIT_S
        while not _listens(port):
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < ends_at
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()
        log.close()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_olah_serves_what_is_read(olah: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    source = open_hub("acme/demo", "main", endpoint=olah, retry=RetryPolicy(failures=3, first_wait_s=0.01))
    demo = open_demo()
    assert {f.name: f.size_bytes for f in source.files()} == {n: len(d) for n, d in demo.contents.items()}
    checkpoint, expected = read_checkpoint(source), read_checkpoint(demo)
    assert checkpoint.tensors == expected.tensors
    assert [s.header_sha256 for s in checkpoint.shards] == [s.header_sha256 for s in expected.shards]
    for name, data in demo.contents.items():
        source.fetch(name, tmp_path / name, ignore_bytes)
        assert (tmp_path / name).read_bytes() == data


def test_part_far_from_the_beginning_is_refused(olah: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("shardq.sources.hub_transfer._MAX_SKIPPED_BYTES", 1 << 20)
    source = open_hub("acme/demo", "main", endpoint=olah)
    name = "model-00001-of-00003.safetensors"
    size = len(open_demo().contents[name])
    out = bytearray(1000)
    source.open_file(name, ignore_bytes).read_into(1000, memoryview(out))
    assert out == open_demo().contents[name][1000:2000]
    with pytest.raises(HubTransfer, match="ignores byte ranges"):
        source.open_file(name, ignore_bytes).read_into(size - 1000, memoryview(out))
