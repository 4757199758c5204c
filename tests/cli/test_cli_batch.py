"""`shardq batch`, `quantize --recipe-file`, `plan --link` and `--fit`, `kernels --bench`."""

import json
import re
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

Run = Callable[..., Result]
RunJson = Callable[..., Any]
BENCH_LIMIT_S = 10.0


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No speeds of this machine are known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_batch_of_a_folder(demo_folder: Path, tmp_path: Path, run: Run, run_json: RunJson) -> None:
    manifest = tmp_path / "m.toml"
    manifest.write_text(
        f'[budget]\nparallel = 1\n[[model]]\nsource = "{demo_folder}"\noutput_dir = "out-{{recipe}}"\n'
        'recipes = ["MXFP4", { scheme = "W4A16", group_size = 48 }]\n'
    )
    planned = run("batch", manifest, "--dry-run")
    assert planned.exit_code == 0
    assert planned.stdout.count("to be made") == 2
    assert {p.name for p in tmp_path.iterdir()} == {"m.toml"}
    document = run_json("batch", manifest, exit_code=60)
    assert document["error"]["type"] == "BatchPartlyFailed"
    made, refused = document["entries"]
    assert (made["label"], made["state"], made["tried"]) == ("out-MXFP4", "done", True)
    assert (refused["state"], refused["error"]["type"]) == ("failed", "BadGroupSize")
    assert (tmp_path / "out-MXFP4" / "config.json").exists()
    again = run("batch", manifest)
    assert again.exit_code == 60
    assert "out-W4A16G48" in again.stdout
    assert "BadGroupSize" in again.stdout
    assert run("batch", tmp_path / "none.toml").exit_code == 3


def test_a_mixture_of_a_manifest_is_chosen_once(demo_folder: Path, tmp_path: Path, run: Run) -> None:
    manifest, layers = tmp_path / "m.toml", tmp_path / "out.layers.toml"
    manifest.write_text(
        f'[budget]\nparallel = 1\n[[model]]\nsource = "{demo_folder}"\noutput_dir = "out"\n'
        'recipes = [{ target_bits = 6.0, options = "W4A16,W8A16" }]\n'
    )
    assert run("batch", manifest).exit_code == 0
    chosen = layers.read_bytes()
    options = ("--target-bits", "6", "--options", "W4A16,W8A16", "-o", tmp_path / "plain", "--parallel", 1)
    assert run("quantize", demo_folder, *options).exit_code == 0
    assert contents(tmp_path / "plain") == contents(tmp_path / "out")
    assert (tmp_path / "plain.layers.toml").read_bytes() == chosen
    layers.write_bytes(chosen + b"# looked at\n")
    assert run("batch", manifest).exit_code == 0
    assert layers.read_bytes() == chosen + b"# looked at\n"


def test_a_recipe_file_is_as_good_as_options(demo_folder: Path, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('scheme = "W4A16@gptq"\ngroup_size = 64\nignore = ["re:.*o_proj"]\n')
    assert run("quantize", demo_folder, "--recipe-file", path, "-o", tmp_path / "a", "--parallel", 1).exit_code == 0
    options = ("--scheme", "W4A16@gptq", "--group-size", 64, "--ignore", "re:.*o_proj")
    assert run("quantize", demo_folder, *options, "-o", tmp_path / "b", "--parallel", 1).exit_code == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    both = run("quantize", demo_folder, "--recipe-file", path, "--bits", 8, "-o", tmp_path / "c")
    assert both.exit_code == 3
    assert "--bits says it, too" in both.stderr


def test_fit_proposes_and_writes_what_quantize_takes(
    demo_folder: Path, tmp_path: Path, run: Run, run_json: RunJson
) -> None:
    path = tmp_path / "best.toml"
    words = ("plan", demo_folder, "--scheme", "W4A16", "--scheme", "W8A16", "--fit", "2x1.2M", "--fit-reserve", 0)
    found = run_json(*words, "--write-recipe", path)
    assert found["space"] == {"devices": 2, "each_bytes": 1_200_000, "reserve": 0.0, "usable_bytes": 2_400_000}
    assert [p["fits"] for p in found["proposals"]] == [False, True, True]
    best = next(p for p in found["proposals"] if p["best"])
    assert tomllib.loads(path.read_text()) == best["recipe"]
    assert best["recipe"]["options"] == "W4A16,W8A16"
    out = tmp_path / "out"
    made = run_json("quantize", demo_folder, "--recipe-file", path, "-o", out, "--parallel", 1)
    assert abs(made["bytes"]["output"] - best["weights_bytes"]) < 0.02 * best["weights_bytes"]
    assert made["bytes"]["output"] <= 2_400_000
    table = run(*words)
    assert "on each" in table.stdout
    assert "best" in table.stdout
    nothing = run("plan", demo_folder, "--fit", "1M", "--write-recipe", path)
    assert nothing.exit_code == 3
    assert "nothing fits" in nothing.stderr
    assert run("plan", demo_folder, "--write-recipe", path).exit_code == 3


def test_plan_tells_time_by_what_was_measured(demo_folder: Path, run: Run, run_json: RunJson, cache: Path) -> None:
    before = run("plan", demo_folder, "--link", "1Mbit").stdout
    assert re.search(r"CPU +not known: `shardq kernels --bench` measures", before)
    assert re.search(r"link +\d+s to download at 125.0 kB/s, \d+s to upload", before)
    began_s = time.monotonic()
    measured = run_json("kernels", "--bench")
    assert time.monotonic() - began_s < BENCH_LIMIT_S
    assert json.loads((cache / "shardq" / "speed.json").read_text())["ns"] == measured["speed"]["ns"]
    assert all(0 < ns < 10_000 for ns in measured["speed"]["ns"].values())
    cost = run_json("plan", demo_folder, "--scheme", "W4A16", "--scheme", "MXFP4", "--search", "auto")["cost"]
    assert cost["cpu"]["unmeasured_weights"] == 0
    assert 0 < cost["cpu"]["seconds"] < 10
    assert cost["cpu"]["same_machine"]
    assert cost["link"] is None
    assert cost["ram"] > 50e6
