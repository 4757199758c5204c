"""Exit codes, and one line or one document instead of a traceback."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from shardq import api, errors

Run = Callable[..., Result]
RunJson = Callable[..., Any]

UP = "model.layers.0.mlp.up_proj"
BAD_WORDS: list[tuple[type[errors.ShardqError], list[str]]] = [
    (errors.BadOption, ["--max-ram", "lots"]),
    (errors.BadOption, ["--max-disk", "6X"]),
    (errors.BadOption, ["--parallel", "0"]),
    (errors.BadOption, ["--bits", "9"]),
    (errors.BadOption, ["--ragged", "perhaps"]),
    (errors.BadOption, ["--ignore-dialect", "regex"]),
    (errors.BadOption, ["--ignore", ""]),
    (errors.BadOption, ["--scheme", "W4A16", "--scheme", "w4a16"]),
    (errors.BadOption, ["--scheme", "W4A16@gptq", "--format", "auto_round"]),
    (errors.BadOption, ["--layer-config", "{"]),
    (errors.BadOption, ["--layer-config", "missing.json"]),
    (errors.BadOption, ["--include", "model.embed_tokens"]),
    (errors.UnknownScheme, ["--scheme", "W5A1"]),
    (errors.BadGroupSize, ["--group-size", "0"]),
    (errors.BadGroupSize, ["--group-size", "96"]),
    (errors.PatternMatchesNothing, ["--ignore", "model.layers.77"]),
    (errors.PatternMatchesNothing, ["--include", "lm_head,no_such_module"]),
    (errors.PatternMatchesNothing, ["--layer-config", '{"no_such_module": {"bits": 8}}']),
    (errors.LayoutRefuses, ["--format", "no-such-layout"]),
    (errors.NothingToQuantize, ["--ignore", "re:.*"]),
    (errors.BudgetTooSmall, ["--max-ram", "1M"]),
]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(("error", "words"), BAD_WORDS)
def test_bad_words_have_their_exit_code(
    error: type[errors.ShardqError], words: list[str], dry: list[str], demo_folder: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    result = run("quantize", demo_folder, "-o", out, *words, *dry)
    assert result.exit_code == error.exit_code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not out.exists()


def write_headers(folder: Path, tensors: Mapping[str, tuple[str, list[int]]]) -> Path:
    folder.mkdir()
    packed = gzip.compress(json.dumps({"model.safetensors": tensors}).encode())
    (folder / "headers.json.gz").write_bytes(packed)
    return folder


@pytest.mark.parametrize(
    ("error", "tensors"),
    [
        (errors.UnknownDtype, {f"{UP}.weight": ("Q9", [128, 128])}),
        (errors.UnknownTensor, {f"{UP}.weight": ("BF16", [128, 128]), "model.strange.cube": ("BF16", [8, 8, 8])}),
        (errors.UnsupportedSource, {f"{UP}.weight": ("F8_E4M3", [64, 64])}),
        (errors.NothingToQuantize, {"model.norm.weight": ("BF16", [128])}),
    ],
)
def test_bad_headers_have_their_exit_code(
    error: type[errors.ShardqError], tensors: dict[str, tuple[str, list[int]]], tmp_path: Path, run: Run
) -> None:
    result = run("plan", "--headers", write_headers(tmp_path / "recorded", tensors))
    assert result.exit_code == error.exit_code, result.output
    assert result.stderr.startswith("error: ")


def test_unknown_tensor_can_be_kept_as_its_error_says(tmp_path: Path, run: Run) -> None:
    tensors = {
        f"{UP}.weight": ("BF16", [128, 128]),
        "model.strange.cube": ("BF16", [8, 8, 8]),
        "model.layers.0.mlp.experts.down_proj": ("BF16", [8, 128, 128]),
    }
    headers = write_headers(tmp_path / "recorded", tensors)
    assert run("plan", "--headers", headers).exit_code == errors.UnsupportedSource.exit_code
    stacks = ("--ignore", "model.layers.*.mlp.experts.down_proj")
    assert run("plan", "--headers", headers, *stacks).exit_code == errors.UnknownTensor.exit_code
    kept = run("plan", "--headers", headers, *stacks, "--ignore", "model.strange.cube")
    assert kept.exit_code == 0, kept.output
    assert "ignore:model.strange.cube" in kept.stdout


@pytest.mark.parametrize("command", ["quantize", "plan", "inspect"])
def test_damaged_sources_have_their_exit_code(command: str, demo_copy: Path, tmp_path: Path, run: Run) -> None:
    assert run(command, tmp_path / "missing").exit_code == errors.SourceUnreadable.exit_code
    shard = demo_copy / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    assert run(command, demo_copy).exit_code == errors.CorruptShard.exit_code
    shard.unlink()
    assert run(command, demo_copy).exit_code == errors.CheckpointIncomplete.exit_code


def test_weight_that_is_not_finite_stops_the_run(demo_copy: Path, tmp_path: Path, run: Run) -> None:
    shard = demo_copy / "model-00001-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    header_bytes = int.from_bytes(data[:8], "little")
    begin, _ = json.loads(data[8 : 8 + header_bytes])[f"{UP}.weight"]["data_offsets"]
    data[8 + header_bytes + begin : 8 + header_bytes + begin + 2] = b"\xc0\x7f"  # NaN
    shard.write_bytes(data)
    result = run("quantize", demo_copy, "-o", tmp_path / "out", "--parallel", 1)
    assert result.exit_code == errors.NonFiniteWeight.exit_code, result.output
    assert UP in result.stderr


def test_occupied_output_is_refused(demo_folder: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "holiday.jpg").touch()
    result = run("quantize", demo_folder, "-o", tmp_path)
    assert result.exit_code == errors.OutputOccupied.exit_code
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]


def test_finished_output_of_another_recipe_is_refused(demo_folder: Path, finished_folder: Path, run: Run) -> None:
    result = run("quantize", demo_folder, "-o", finished_folder, "--bits", 8)
    assert result.exit_code == errors.RecipeChanged.exit_code
    assert "recipe.scheme" in result.stderr


def test_log_file_that_cannot_be_opened_is_refused(tmp_path: Path, run: Run) -> None:
    result = run("schemes", "--log-file", tmp_path / "missing" / "log")
    assert result.exit_code == errors.NotWritable.exit_code
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize("words", [[], ["demo", "--headers", "x"], ["--headers", "x", "--subfolder", "y"]])
def test_plan_wants_one_source(words: list[str], run: Run) -> None:
    assert run("plan", *words).exit_code == errors.BadOption.exit_code


def test_folder_that_is_no_output_fails_verification(tmp_path: Path, run: Run) -> None:
    result = run("verify", tmp_path)
    assert result.exit_code == errors.VerifyFailed.exit_code
    assert result.stderr.startswith("error: ")


def test_error_is_a_document_with_json(run_json: RunJson) -> None:
    document = run_json("quantize", "demo", "--scheme", "W5A1", exit_code=10)
    assert document.keys() == {"error"}
    error = document["error"]
    assert (error["type"], error["exit_code"]) == ("UnknownScheme", 10)
    assert "W5A1" in error["message"]


@pytest.mark.parametrize("words", [["quantize"], ["quantize", "demo", "--bits", "four"], ["schemes", "--what"]])
def test_usage_error_is_a_document_with_json(words: list[str], run: Run, run_json: RunJson) -> None:
    assert run_json(*words, exit_code=2)["error"]["type"] == "UsageError"
    assert "Usage: " in run(*words).stderr


def test_interrupt_while_planning_has_its_exit_code(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    def interrupt(*_words: object, **_more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "plan_many", interrupt)
    result = run("plan", "demo")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.startswith("error: interrupted")


def test_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    def fail(*_words: object, **_more: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(api, "inspect", fail)
    result = run("inspect", "demo")
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_kernel_set_that_does_not_exist_is_refused(demo_folder: Path, tmp_path: Path) -> None:
    words = ["quantize", str(demo_folder), "-o", str(tmp_path / "out"), "--parallel", "1"]
    environment = {**os.environ, "SHARDQ_KERNELS": "no-such-set"}
    result = subprocess.run(
        [sys.executable, "-P", "-m", "shardq.cli", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == errors.KernelUnavailable.exit_code, result.stderr
    assert result.stderr.startswith("error: ")
    assert "no-such-set" in result.stderr


def test_reader_that_went_away_is_no_error(demo_folder: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        result = subprocess.run(
            [sys.executable, "-P", "-m", "shardq.cli", "inspect", str(demo_folder)],
            stdout=theirs, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    finally:
        os.close(theirs)
    assert (result.returncode, result.stderr) == (1, "")
