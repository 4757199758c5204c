"""Fixtures of the command line's tests: commands run in this process, and the demo model as a folder."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_hub_write
import pytest
from click.testing import CliRunner, Result

from shardq.cli.group import commands
from shardq.sources.demo import open_demo

Run = Callable[..., Result]
RunJson = Callable[..., Any]


@pytest.fixture(autouse=True)
def _detached_logs() -> Iterator[None]:
    """A command logs to the stderr of its test, which is gone after it."""
    yield
    logger = logging.getLogger("shardq")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def run() -> Run:
    """Runs a command: run("quantize", "demo", ...)."""
    return lambda *words: CliRunner().invoke(commands, [str(w) for w in words])


@pytest.fixture
def run_json(run: Run) -> RunJson:
    """Runs a command with --json and returns its document, after checking that stdout holds that and nothing else."""

    def run_and_parse(*words: object, exit_code: int = 0) -> Any:
        result = run(*words, "--json")
        assert result.exit_code == exit_code, result.output
        assert result.stdout.count("\n") == 1
        return json.loads(result.stdout)

    return run_and_parse


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model on disk; read only."""
    folder = tmp_path_factory.mktemp("source") / "demo-model"
    folder.mkdir()
    for name, data in open_demo().contents.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def demo_copy(demo_folder: Path, tmp_path: Path) -> Path:
    """The demo model on disk, to be damaged."""
    return Path(shutil.copytree(demo_folder, tmp_path / "damaged"))


@pytest.fixture(scope="session")
def finished_folder(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished output of the demo model; read only."""
    out = tmp_path_factory.mktemp("finished") / "demo-W4A16"
    result = CliRunner().invoke(commands, ["quantize", str(demo_folder), "-o", str(out), "--parallel", "1"])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="session")
def fake_hub() -> ModuleType:
    """tests/sources/fake_hub_write.py."""
    return fake_hub_write


@pytest.fixture
def hub(fake_hub: ModuleType, demo_folder: Path) -> Iterator[Any]:
    """A Hub on loopback that takes uploads; it has the demo model as org/model."""
    hub = fake_hub.WritableHub()
    repo = fake_hub.Repo()
    repo.commit({p.name: p.read_bytes() for p in demo_folder.iterdir()})
    hub.repos["org/model"] = repo
    yield hub
    hub.close()
