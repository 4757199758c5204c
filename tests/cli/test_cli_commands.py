"""Commands on the demo model: what they print, and what their documents hold."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from shardq.gguf.file_types import FILE_TYPES
from shardq.layouts import LISTED
from shardq.schemes import PRESETS

Run = Callable[..., Result]
RunJson = Callable[..., Any]


@pytest.fixture
def empty_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that commands run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_quantize_resumes_to_done(demo_folder: Path, tmp_path: Path, run: Run, run_json: RunJson) -> None:
    out = tmp_path / "out"
    first = run_json("quantize", demo_folder, "-o", out, "--parallel", 1)
    assert first["output"] == str(out)
    assert first["counts"] == {"quantized": 45, "copied": 22, "dropped": 0}
    assert first["bytes"]["output"] < first["bytes"]["source"]
    assert 0 < first["errors"]["relative"] < 0.2
    assert not first["already_done"]
    second = run_json("quantize", demo_folder, "-o", out, "--parallel", 1)
    assert second["already_done"]
    assert second["errors"] is None
    assert second["fingerprint"] == first["fingerprint"]
    third = run("quantize", demo_folder, "-o", out)
    assert "was done already" in third.stdout
    assert third.stderr == ""


def test_quantize_prints_progress_and_summary_apart(tmp_path: Path) -> None:
    words = ["quantize", "demo", "-o", str(tmp_path / "out"), "--parallel", "2"]
    command = [sys.executable, "-P", "-m", "shardq.cli", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert [line.split()[:2] for line in result.stderr.splitlines()] == [["shard", f"{i}/3"] for i in (1, 2, 3)]
    summary = ["output", "modules", "bytes", "error", "scales", "time"]
    assert [line.split()[0] for line in result.stdout.splitlines()] == summary


def test_quantize_takes_the_spellings_of_other_tools(demo_folder: Path, tmp_path: Path, run_json: RunJson) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps({"re:.*down_proj": {"bits": 8}}))
    words = ("--scheme", "w4a16@gptq", "--group_size", 32, "--layer_config", rules, "--ignore", "lm_head,re:.*o_proj")
    plan = run_json("quantize", demo_folder, "--output_dir", tmp_path / "out", *words, "--asym", "--rtn", "--dry-run")
    recipe = plan["recipe"]
    assert plan["layout"] == "gptq"
    assert (recipe["scheme"]["group_size"], recipe["scheme"]["symmetric"]) == (32, False)
    assert recipe["ignore"] == ["exact:lm_head", "regex:re:.*o_proj"]
    assert recipe["layer_config"] == [["regex:re:.*down_proj", {"bits": 8}]]
    assert plan["counts"]["quantized_modules"] == 42


def test_dry_run_makes_nothing_and_agrees_with_the_run(
    demo_folder: Path, finished_folder: Path, empty_cwd: Path, run: Run, run_json: RunJson
) -> None:
    planned = run_json("quantize", demo_folder, "--dry-run")
    assert run("quantize", demo_folder, "--dry-run").exit_code == 0
    assert list(empty_cwd.iterdir()) == []
    done = run_json("quantize", demo_folder, "-o", finished_folder)
    assert planned["fingerprint"] == done["fingerprint"]
    assert planned["bytes"]["output"] == done["bytes"]["output"]


def test_output_folder_is_named_after_source_and_scheme(demo_folder: Path, empty_cwd: Path, run: Run) -> None:
    assert run("quantize", demo_folder, "--bits", 8, "--parallel", 1, "-q").output == ""
    assert [p.name for p in empty_cwd.iterdir()] == ["demo-model-W8A16"]


def test_plan_says_what_is_kept_and_why(run: Run, run_json: RunJson) -> None:
    text = run("plan", "demo", "--ignore", "re:.*o_proj").stdout
    assert "model.layers.[0-2].self_attn.o_proj.weight" in text
    assert "ignore:re:.*o_proj" in text
    assert "largest task" in text
    document = run_json("plan", "demo", "--ignore", "re:.*o_proj")
    assert document["counts"]["quantized_modules"] == 42
    assert len(document["tensors"]) == document["counts"]["tensors"] == 67
    assert document["loaders"]


def test_plan_from_an_index_alone_has_no_byte_counts(tmp_path: Path, run: Run, run_json: RunJson) -> None:
    weight_map = {f"model.layers.{i}.mlp.up_proj.weight": "a.safetensors" for i in range(3)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert run_json("plan", "--headers", tmp_path)["bytes"]["output"] is None
    result = run("plan", "--headers", tmp_path)
    assert "unknown: not all shapes are known" in result.stdout
    assert result.stderr.startswith("warning: ")


def test_inspect_knows_what_quantize_made(
    demo_folder: Path, finished_folder: Path, run: Run, run_json: RunJson
) -> None:
    before, after = run_json("inspect", demo_folder), run_json("inspect", finished_folder)
    assert (before["layout"], before["schemes"]) == (None, {})
    assert (after["layout"], after["schemes"]) == ("auto_round", {"W4A16": 45})
    assert before["parameters"] == after["parameters"]
    assert after["bits_per_weight"] < before["bits_per_weight"]
    assert before["tensors"]["lm_head.weight"] == {"role": "head", "rule": "head"}
    assert "model.layers.[0-2].self_attn.q_proj.weight" in run("inspect", demo_folder).stdout


def test_verify_tells_sound_from_damaged(
    demo_folder: Path, finished_folder: Path, tmp_path: Path, run: Run, run_json: RunJson
) -> None:
    sound = run_json("verify", finished_folder, "--deep", "--source", demo_folder)
    assert (sound["problems"], sound["files"], sound["tensors"], sound["compared"]) == ([], 3, 67, 67)
    assert "67 source tensors" in run("verify", finished_folder).stdout
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in finished_folder.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    shard = damaged / "model-00003-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    document = run_json("verify", damaged, "--deep", exit_code=50)
    assert len(document["problems"]) == 1
    assert document["error"]["type"] == "VerifyFailed"
    result = run("verify", damaged, "--deep")
    assert result.exit_code == 50
    assert shard.name in result.stdout
    assert result.stderr.startswith("error: ")


def test_tables_list_everything_there_is(run: Run, run_json: RunJson) -> None:
    assert [s["name"] for s in run_json("schemes")["schemes"]] == list(PRESETS)
    assert [t["name"] for t in run_json("schemes")["gguf"]] == [t.name for t in FILE_TYPES]
    assert [f["name"] for f in run_json("formats")["formats"]] == [x.name for x in LISTED]
    kernels = run_json("kernels")["kernels"]
    assert sum(k["chosen"] for k in kernels) == 1
    schemes = [*PRESETS, "file", *(f"gguf:{t.name}" for t in FILE_TYPES)]  # two tables
    for command, names in (
        ("schemes", schemes), ("formats", [x.name for x in LISTED]), ("kernels", [k["name"] for k in kernels]),
    ):  # fmt: skip
        lines = run(command).stdout.splitlines()
        assert [line.split()[0] for line in lines[1:] if line] == list(names)


def test_kernels_says_why_a_set_was_chosen(run_json: RunJson, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHARDQ_KERNELS", raising=False)
    fastest = {k["name"]: k["why"] for k in run_json("kernels")["kernels"] if k["chosen"]}
    assert list(fastest.values()) == ["the fastest that this CPU runs"]
    monkeypatch.setenv("SHARDQ_KERNELS", "baseline")
    named = {k["name"]: k["why"] for k in run_json("kernels")["kernels"] if k["chosen"]}
    assert named == {"baseline": "SHARDQ_KERNELS names it"}


def test_log_goes_to_the_log_file(demo_copy: Path, tmp_path: Path, run: Run) -> None:
    log = tmp_path / "run.log"
    words = ("--parallel", 1, "--delete-source", "--log-file", log)
    result = run("quantize", demo_copy, "-o", tmp_path / "out", *words)
    assert result.exit_code == 0, result.output
    assert log.read_text().count("deleted source shard") == 3
    assert "deleted" not in result.output


def test_verbose_log_goes_to_stderr(demo_copy: Path, tmp_path: Path, run: Run) -> None:
    words = ("quantize", demo_copy, "-o", tmp_path / "out", "--parallel", 1, "--delete-source")
    result = run(*words, "-v")
    assert result.stderr.count("deleted source shard") == 3
    assert "deleted" not in result.stdout
