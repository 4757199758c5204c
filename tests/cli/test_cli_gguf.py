"""`shardq verify`, `audit` and `inspect` of GGUF files: what they print, and their exit codes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from gguf_checkpoints_made import write
from gguf_models_made import MODELS

pytest.importorskip("gguf", reason="names of GGUF tensors come from the package gguf")
pytest.importorskip("tokenizers", reason="vocabularies are read with the package tokenizers")

Run = Callable[..., Result]
RunJson = Callable[..., Any]


@pytest.fixture
def made(tmp_path: Path, run: Run) -> tuple[Path, Path]:
    """A source, and a GGUF output of it."""
    source, out = write(MODELS["llama"], tmp_path), tmp_path / "out"
    words = ("--tokenizer-pre", "llama-bpe", "--parallel", 1, "-o", out)
    assert run("quantize", source, "--scheme", "gguf:q5_0", *words).exit_code == 0
    return source, out


def test_sound_output_passes_and_a_flipped_bit_has_its_exit_codes(
    made: tuple[Path, Path], run: Run, run_json: RunJson
) -> None:
    source, out = made
    sound = run_json("verify", out, "--deep", "--source", source)
    assert (sound["problems"], sound["files"], sound["tensors"], sound["compared"]) == ([], 1, 21, 21)
    assert run_json("audit", out, "--source", source)["verdict"] == "equal"
    assert "source tensors" in run("verify", out).stdout
    assert "21 of 21, 21 of them whole" in run("audit", out, "--source", source, "-v").stdout
    (path,) = out.glob("*.gguf")
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    told = f"in {path.name} differs at byte {len(data) - 40} of the file"
    for words, code in (
        (("verify", out, "--source", source), 50),
        (("audit", out, "--source", source), 51),
        (("verify", out, "--deep"), 50),
    ):
        result = run(*words)
        assert result.exit_code == code
        assert result.stderr.startswith("error: ")
        assert (told in result.stdout) == ("--source" in words)
    path.write_bytes(data[:-40])
    assert run("verify", out).exit_code == 50
    assert run("inspect", out).exit_code == 22


def test_files_of_others_are_shown_and_checked(
    made: tuple[Path, Path], tmp_path: Path, run: Run, run_json: RunJson
) -> None:
    (tmp_path / "others").mkdir()
    (path,) = (Path(shutil.copy(p, tmp_path / "others")) for p in made[1].glob("*.gguf"))
    (model,) = run_json("inspect", path)["models"]
    assert (model["architecture"], model["file_type"], model["tensors"]) == ("llama", "Q5_0", 21)
    shown = run("inspect", path.parent).stdout
    assert all(word in shown for word in ("llama", "bits per weight", "Q5_0", "F32"))
    assert "made by others" in run("verify", path, "--deep").stdout
    path.write_bytes(path.read_bytes()[:1000])
    assert run_json("verify", path, exit_code=50)["error"]["type"] == "VerifyFailed"
    assert run_json("inspect", path, exit_code=22)["error"]["type"] == "CorruptShard"
    assert run("verify", path, "--importance", path).exit_code == 3
