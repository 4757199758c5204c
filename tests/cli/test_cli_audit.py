"""`shardq audit` on the demo model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import shardq
from shardq.audit_statement import digest
from shardq.errors import AuditFailed, BadOption, VerifyFailed

Run = Callable[..., Result]
RunJson = Callable[..., Any]


@pytest.fixture
def damaged(finished_folder: Path, tmp_path: Path) -> Path:
    """A finished output with one wrong bit in its last tensor."""
    folder = Path(shutil.copytree(finished_folder, tmp_path / "damaged"))
    shard = folder / "model-00003-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    return folder


def test_statement_is_written_and_its_digest_is_of_all_but_the_time(
    finished_folder: Path, demo_folder: Path, tmp_path: Path, run_json: RunJson
) -> None:
    file = tmp_path / "audit.json"
    printed = run_json("audit", finished_folder, "--source", demo_folder, "--sample", 12, "--statement", file)
    written = json.loads(file.read_text())
    assert written == printed
    assert written["verdict"] == "equal"
    assert len(written["tensors"]) == 12
    assert all(t["equal"] and t["bytes_compared"] for t in written["tensors"])
    assert written.pop("checked_at")
    assert written["digest"] == digest(written)
    assert written["source"] == {"label": "demo-model", "commit": None}


def test_difference_has_its_exit_code_and_names_tensor_file_and_byte(
    damaged: Path, demo_folder: Path, tmp_path: Path, run: Run, run_json: RunJson
) -> None:
    file = tmp_path / "audit.json"
    result = run("audit", damaged, "--source", demo_folder, "--statement", file)
    at = (damaged / "model-00003-of-00003.safetensors").stat().st_size - 1
    assert result.exit_code == AuditFailed.exit_code == 51
    assert f"in model-00003-of-00003.safetensors differs at byte {at} of the file" in result.stderr
    assert result.stderr.startswith("error: ")
    assert json.loads(file.read_text())["verdict"] == "different"
    document = run_json("audit", damaged, "--source", demo_folder, exit_code=51)
    assert document["error"]["type"] == "AuditFailed"
    assert [t["equal"] for t in document["tensors"]].count(False) == 1


def test_dry_run_reads_headers_only(damaged: Path, demo_folder: Path, run: Run, run_json: RunJson) -> None:
    """It cannot see the damage."""
    document = run_json("audit", damaged, "--source", demo_folder, "--dry-run")
    assert document["verdict"] == "planned"
    assert {t["bytes_compared"] for t in document["tensors"]} == {0}
    result = run("audit", damaged, "--source", demo_folder, "--dry-run", "-v")
    assert "would read" in result.stdout
    assert "model.layers.0.mlp.up_proj.weight" in result.stdout


def test_demo_itself_is_a_source(finished_folder: Path, run: Run) -> None:
    result = run("audit", finished_folder, "--source", "demo", "--max-traffic", "none")
    assert result.exit_code == 0, result.output
    assert "67 of 67, 67 of them whole" in result.stdout


def test_small_limit_compares_blocks_and_too_small_a_limit_is_refused(
    finished_folder: Path, run: Run, run_json: RunJson
) -> None:
    few = run_json("audit", finished_folder, "--source", "demo", "--sample", 10, "--max-traffic", "2M")
    assert few["traffic"]["total_bytes"] < 2_000_000
    assert any(not t["whole"] for t in few["tensors"])
    for size in ("1M", "1", "much"):
        result = run("audit", finished_folder, "--source", "demo", "--max-traffic", size)
        assert result.exit_code == BadOption.exit_code
        assert "--max-traffic" in result.stderr


def test_folder_that_is_no_output_cannot_be_audited(tmp_path: Path, run: Run) -> None:
    assert run("audit", tmp_path, "--source", "demo").exit_code == VerifyFailed.exit_code


def test_output_says_where_scales_of_fused_groups_come_from(
    demo_folder: Path, tmp_path: Path, run: Run, run_json: RunJson
) -> None:
    out = tmp_path / "out"
    shardq.quantize(demo_folder, "NVFP4A16", output_dir=out, limits=shardq.Limits(parallel=1))
    result = run("audit", out, "--source", demo_folder)
    assert result.exit_code == 0, result.output
    assert "45 derived from all that they reach in the source" in result.stdout
    assert "taken" not in result.stdout
    result = run("audit", out, "--source", demo_folder, "--max-traffic", "5M", "-v")
    assert "45 taken from the result, as the traffic does not allow to derive them" in result.stdout
    assert "derived from" not in result.stdout
    document = run_json("audit", out, "--source", demo_folder, "--max-traffic", "5M")
    assert {t.get("scale") for t in document["tensors"]} == {"taken", None}
