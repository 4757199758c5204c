"""A fake Hub for each test with the demo model on it, and a client that is pointed at it and at an empty cache.

After each test: no request to the storage origin carried a token.
"""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_hub
import pytest

from shardq.sources.demo import open_demo
from shardq.sources.hub import open_hub
from shardq.sources.hub_errors import RetryPolicy

REPO = "acme/demo"


@pytest.fixture(scope="session")
def fake_hub_module() -> ModuleType:
    return fake_hub


@pytest.fixture
def hub(fake_hub_module: ModuleType) -> Iterator[Any]:
    hub = fake_hub_module.FakeHub()
    yield hub
    hub.close()
    assert not [s for s in hub.log if s.origin == "storage" and s.authorization is not None]


@pytest.fixture
def token(fake_hub_module: ModuleType, monkeypatch: pytest.MonkeyPatch, client_settings: Path) -> str:
    """The client is logged in, so that there is a token which might leak."""
    monkeypatch.setenv("HF_TOKEN", fake_hub_module.TOKEN)
    text: str = fake_hub_module.TOKEN
    return text


@pytest.fixture(scope="session")
def quick() -> RetryPolicy:
    return RetryPolicy(first_wait_s=0.001, longest_wait_s=0.002, timeout_s=5.0)


@pytest.fixture(scope="session")
def contents() -> dict[str, bytes]:
    files = dict(open_demo().contents)
    files["extra/notes.txt"] = b"notes"
    return files


@pytest.fixture
def repo(hub: Any, fake_hub_module: ModuleType, contents: dict[str, bytes]) -> Any:
    repo = fake_hub_module.Repo()
    repo.commit(contents)
    hub.repos[REPO] = repo
    return repo


@pytest.fixture
def source(hub: Any, repo: Any, quick: RetryPolicy) -> Any:
    return open_hub(REPO, endpoint=hub.url, retry=quick)


@pytest.fixture(autouse=True)
def client_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The Hub cache of this test; no token, no proxy, not offline."""
    from huggingface_hub import constants

    cache = tmp_path / "hub_cache"
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return cache
