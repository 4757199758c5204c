"""`shardq quantize --push-to` against a Hub on loopback, as a user runs it: what is refused, and before what."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shardq import errors

REPO = "me/quantized"
LIMIT_S = 120.0  # for anything that takes a second on an idle machine
Shardq = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def shardq(hub: Any, fake_hub: ModuleType, tmp_path: Path) -> Shardq:
    """shardq(*words, settings={}): the command in a process of its own, with a token that may write."""
    away = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_HUB_OFFLINE", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"}
    inherited = {name: value for name, value in os.environ.items() if name.upper() not in away}
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}

    def run(*words: object, settings: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-P", "-m", "shardq.cli", *map(str, words)],
            env={**inherited, **here, "HF_TOKEN": fake_hub.TOKEN, **(settings or {})},
            cwd=tmp_path, check=False, capture_output=True, text=True, timeout=LIMIT_S,
        )  # fmt: skip

    return run


def assert_refused(
    result: "subprocess.CompletedProcess[str]", error: type[errors.ShardqError], hub: Any, out: Path
) -> None:
    """One line that says why, its exit code, no request for a weight, and nothing written anywhere."""
    assert result.returncode == error.exit_code, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert [s.path for s in hub.seen("/store/") if s.range is None or s.begin > 0] == []
    assert hub.seen("/put/", "PUT") == []
    assert hub.commits == []
    assert not out.exists()


@pytest.mark.parametrize("exists", [False, True], ids=["new repo", "old repo"])
@pytest.mark.parametrize("token", ["", "hf_read_only_token", "hf_expired"], ids=["none", "read only", "unknown"])
def test_token_that_may_not_write_is_refused(
    hub: Any, fake_hub: ModuleType, shardq: Shardq, tmp_path: Path, token: str, exists: bool
) -> None:
    if exists:
        hub.add_repo(REPO)
    words = ("quantize", "org/model", "-o", tmp_path / "out", "--push-to", REPO, "--parallel", 1)
    result = shardq(*words, settings={"HF_TOKEN": token})
    assert_refused(result, errors.HubAccess, hub, tmp_path / "out")
    assert REPO in result.stderr
    assert "hf auth login" in result.stderr
    assert exists or REPO not in hub.repos


def test_offline_is_refused(hub: Any, shardq: Shardq, demo_folder: Path, tmp_path: Path) -> None:
    words = ("quantize", demo_folder, "-o", tmp_path / "out", "--push-to", REPO)
    result = shardq(*words, settings={"HF_HUB_OFFLINE": "1"})
    assert_refused(result, errors.HubAccess, hub, tmp_path / "out")
    assert "HF_HUB_OFFLINE" in result.stderr
    assert hub.log == []


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin"])
def test_repo_of_somebody_else_is_refused(hub: Any, shardq: Shardq, tmp_path: Path, name: str) -> None:
    hub.add_repo(REPO)
    hub.edit(REPO, {name: b"{}"})
    result = shardq("quantize", "org/model", "-o", tmp_path / "out", "--push-to", REPO)
    assert_refused(result, errors.OutputOccupied, hub, tmp_path / "out")
    assert name in result.stderr
    assert "--branch" in result.stderr


def test_source_is_no_destination(hub: Any, shardq: Shardq, tmp_path: Path) -> None:
    result = shardq("quantize", "org/model", "-o", tmp_path / "out", "--push-to", "org/model")
    assert_refused(result, errors.OutputOccupied, hub, tmp_path / "out")


def test_public_repo_is_not_taken_for_a_private_one(hub: Any, shardq: Shardq, tmp_path: Path) -> None:
    hub.add_repo(REPO)
    result = shardq("quantize", "org/model", "-o", tmp_path / "out", "--push-to", REPO, "--private")
    assert_refused(result, errors.HubAccess, hub, tmp_path / "out")


@pytest.mark.parametrize(
    ("error", "words", "reason"),
    [
        (errors.BadOption, ["--private"], "--push-to"),
        (errors.BadOption, ["--branch", "int4"], "--push-to"),
        (errors.BadOption, ["--keep-local"], "--push-to"),
        (errors.BadOption, ["--push-to", REPO, "--delete-source"], "--keep-local"),
        (errors.HubAccess, ["--push-to", "quantized"], "org/name"),
        (errors.HubAccess, ["--push-to", "me/quantized/int4"], "org/name"),
    ],
)
def test_words_without_meaning_are_refused_before_any_request(
    hub: Any, shardq: Shardq, demo_folder: Path, tmp_path: Path, error: type[errors.ShardqError], words: list[str],
    reason: str,
) -> None:  # fmt: skip
    result = shardq("quantize", demo_folder, "-o", tmp_path / "out", *words)
    assert_refused(result, error, hub, tmp_path / "out")
    assert reason in result.stderr
    assert hub.log == []


def test_pushed_repo_verifies_and_the_second_run_says_that_it_is_done(hub: Any, shardq: Shardq, tmp_path: Path) -> None:
    words = ("quantize", "org/model", "-o", tmp_path / "out", "--push-to", REPO, "--branch", "int4", "--json")
    first = shardq(*words, "--parallel", 1)
    assert first.returncode == 0, first.stderr
    assert not json.loads(first.stdout)["already_done"]
    assert [(c.repo, c.branch) for c in hub.commits] == [(REPO, "int4")]
    assert not (tmp_path / "out").exists()
    again = shardq(*words)
    assert json.loads(again.stdout)["already_done"]
    assert len(hub.commits) == 1
    verified = shardq("verify", f"{REPO}@int4", "--deep", "--source", "org/model")
    assert verified.returncode == 0, verified.stderr
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_upload_that_fails_for_good_is_one_line(hub: Any, fake_hub: ModuleType, shardq: Shardq, tmp_path: Path) -> None:
    hub.write_faults.append(fake_hub.WriteFault("status", "objects/batch", skip=2, times=99, status=403))
    words = ("quantize", "org/model", "-o", tmp_path / "out", "--push-to", REPO, "--parallel", 1, "-q")
    result = shardq(*words)
    assert result.returncode == errors.HubAccess.exit_code
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert hub.commits == []
    hub.write_faults.clear()
    assert shardq(*words).returncode == 0
    assert len(hub.commits) == 1
