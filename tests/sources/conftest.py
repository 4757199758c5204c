"""A fake Hub for each test, and a client that is pointed at it and at an empty cache."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def fake_hub_module() -> ModuleType:
    path = Path(__file__).with_name("fake_hub.py")
    spec = importlib.util.spec_from_file_location("shardq_fake_hub", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(fake_hub_module: ModuleType) -> Iterator[Any]:
    hub = fake_hub_module.FakeHub()
    yield hub
    hub.close()


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
