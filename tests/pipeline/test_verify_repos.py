"""Verification of an output on the Hub: from headers and records, nothing else."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shardq
from shardq import Limits, Verification
from shardq.errors import VerifyFailed

MakeCheckpoint = Callable[..., Path]
Files = dict[str, bytes]
SECOND = "model-00002-of-00003.safetensors"
RECORDS = {"shardq.json", "shardq-ledger.json.zst", "config.json"}
SMALL = {*RECORDS, "quantization_config.json", "model.safetensors.index.json"}


@pytest.fixture
def source(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint(hidden=512)


@pytest.fixture
def made(source: Path, tmp_path: Path) -> Files:
    """A finished output, with shards that are larger than what is read of a header at once."""
    shardq.quantize(source, output_dir=tmp_path / "out", limits=Limits(parallel=1))
    return {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}


@pytest.fixture
def verify(hub: Any, fake_hub_module: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Verification]:
    """verify(files, deep=, source=): publish these files, and verify the repo."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    def publish_and_verify(files: Files, deep: bool = False, source: Path | None = None) -> Verification:
        hub.repos["org/out"] = fake_hub_module.Repo()
        hub.repos["org/out"].commit(files)
        hub.log.clear()
        return shardq.verify("org/out", deep=deep, source=source)

    return publish_and_verify


def test_headers_and_records_are_all_that_is_read(
    hub: Any, made: Files, verify: Callable[..., Verification], source: Path
) -> None:
    found = verify(made)
    assert found.problems == ()
    assert (found.files, found.tensors, found.result) == (3, 27, "org/out")
    assert found.commit == hub.repos["org/out"].refs["main"]
    asked = {s.path.rpartition("/")[2] for s in hub.seen("/resolve/")}
    shards = {n for n in made if n.endswith(".safetensors")}
    assert asked == SMALL | shards
    assert len(hub.seen("/resolve/")) == len(asked)
    assert {s.range for s in hub.seen("/store/")} == {"bytes=0-262143"}
    deep = verify(made, deep=True, source=source)
    assert deep.problems == ()
    assert (deep.deep, deep.compared) == (True, 27)


def test_what_is_wrong_with_a_repo_is_found_from_its_listing(made: Files, verify: Callable[..., Verification]) -> None:
    with pytest.raises(VerifyFailed, match=f"org/out lacks {SECOND}"):
        verify({n: data for n, data in made.items() if n != SECOND})
    with pytest.raises(VerifyFailed, match=f"org/out/{SECOND} has {len(made[SECOND]) - 1} bytes: expected"):
        verify({**made, SECOND: made[SECOND][:-1]})
    data = bytearray(made[SECOND])
    data[-1] ^= 1
    for deep in (False, True):
        (problem,) = verify({**made, SECOND: bytes(data)}, deep=deep).problems
        assert problem.startswith(f"{SECOND} has sha256 {hashlib.sha256(data).hexdigest()}: expected")
    with pytest.raises(VerifyFailed, match="has no readable"):
        verify({n: data for n, data in made.items() if n != "shardq.json"})
    with pytest.raises(VerifyFailed, match="unfinished"):
        verify({**made, ".shardq/journal.jsonl": b"{}"})


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_damaged_records_are_refused(name: str, made: Files, verify: Callable[..., Verification]) -> None:
    for data in (b"", b"[]", b"{}", made[name][: len(made[name]) // 2]):
        files = {**made, name: data}
        if name == "config.json" and data == b"{}":
            assert "config.json has no quantization_config" in verify(files).problems
            continue
        with pytest.raises(VerifyFailed, match="has no readable"):
            verify(files)


def test_index_and_configuration_that_disagree_are_found(made: Files, verify: Callable[..., Verification]) -> None:
    index_name = "model.safetensors.index.json"
    index = json.loads(made[index_name])
    index["weight_map"].pop("lm_head.weight")
    (problem,) = verify({**made, index_name: json.dumps(index).encode()}).problems
    assert problem.startswith(f"{index_name} and the shards disagree")
    for broken in (b"{}", b"[", b'{"weight_map": 3, "metadata": {"total_size": 1}}'):
        (problem,) = verify({**made, index_name: broken}, deep=True).problems
        assert problem.startswith(f"{index_name} is not an index")
    (problem,) = verify({**made, "quantization_config.json": b"{}"}).problems
    assert problem == "quantization_config.json differs from quantization_config in config.json"
