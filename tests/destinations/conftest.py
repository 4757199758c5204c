"""A Hub on loopback that can be written to, and a client with a token and an empty cache."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_hub
import fake_hub_write
import pytest


@pytest.fixture(scope="session")
def fake_base() -> ModuleType:
    return fake_hub


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    return fake_hub_write


@pytest.fixture
def hub(fake: ModuleType) -> Iterator[Any]:
    hub = fake.WritableHub()
    yield hub
    hub.close()


@pytest.fixture(autouse=True)
def client_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake: ModuleType) -> None:
    """A token that may write, no proxy, an empty cache, not offline."""
    from huggingface_hub import constants

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HF_TOKEN", fake.TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
