"""--target, the verdicts of plan and verify, and verify of checkpoints that others made."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from shardq.files.safetensors import TensorSpec, plan_file

TARGETS = [
    (("--scheme", "W4A16"), "vllm", 0, ""),
    (("--scheme", "MXFP4"), "vllm:tp=8", 16, "num_attention_heads 4"),
    (("--scheme", "W8A8"), "transformers", 16, "conversion of experts"),
    (("--scheme", "W4A16"), "llama.cpp", 16, "GGUF files only"),
    (("--scheme", "W4A16"), "ollama", 3, "expected one of"),
    (("--scheme", "W4A16", "--ignore", "re:.*q_proj"), "transformers", 0, ""),  # it runs q, k and v one by one
    (("--scheme", "W4A16", "--ignore", "re:.*q_proj"), "vllm", 15, "q_proj kept"),
]


@pytest.mark.parametrize("command", [("plan",), ("quantize", "--dry-run"), ("quantize",)])
@pytest.mark.parametrize(("words", "target", "code", "told"), TARGETS)
def test_targets(
    run: Any, tmp_path: Path, command: tuple[str, ...], words: tuple[str, ...], target: str, code: int, told: str
) -> None:
    out = ("-o", tmp_path / "out", "--parallel", 1) if command == ("quantize",) else ()
    result = run(command[0], "demo", *command[1:], *words, "--target", target, *out)
    assert result.exit_code == code, result.stderr
    assert told in result.stderr
    if code:
        assert not (tmp_path / "out").exists()


def test_plan_and_verify_say_the_same(run: Any, run_json: Any, finished_folder: Path) -> None:
    planned = run_json("plan", "demo")["serving"]
    verified = run_json("verify", finished_folder)["serving"]
    assert planned == verified
    assert [e["engine"] for e in planned] == ["vllm", "sglang", "transformers", "llama.cpp", "mlx"]
    text = run("verify", finished_folder).stdout
    assert "will not load" in text
    assert "quant_method auto-round: llama.cpp reads GGUF files only" in text


@pytest.fixture
def foreign(finished_folder: Path, tmp_path: Path) -> Path:
    """The output as somebody else would have made it: no records."""
    made = tmp_path / "foreign"
    shutil.copytree(finished_folder, made)
    (made / "shardq.json").unlink()
    (made / "shardq-ledger.json.zst").unlink()
    return made


def test_a_good_checkpoint_of_others(run: Any, run_json: Any, foreign: Path) -> None:
    found = run_json("verify", foreign)
    assert (found["foreign"], found["problems"], found["files"]) == (True, [], 3)
    assert found["serving"][2] == {
        "engine": "transformers", "version": "5.23", "answer": "loads", "reasons": [], "tensor_parallel": {},
    }  # fmt: skip
    assert "made by others" in run("verify", foreign).stdout
    assert run("verify", foreign, "--deep").exit_code == 3


def rewrite(folder: Path, change: Any) -> None:
    """Write the second shard anew with other tensors, and the index after it."""
    from shardq.files.safetensors import read_header

    shard = folder / "model-00002-of-00003.safetensors"
    specs = {t.name: TensorSpec(t.name, t.dtype, t.shape) for t in read_header(shard).tensors}
    change(specs)
    planned = plan_file(list(specs.values()), {"format": "pt"})
    shard.write_bytes(planned.header.ljust(planned.size_bytes, b"\0"))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    others = {n: s for n, s in index["weight_map"].items() if s != shard.name}
    index["weight_map"] = others | dict.fromkeys(specs, shard.name)
    path.write_text(json.dumps(index))


M = "model.layers.1.self_attn.o_proj"


def lose_scales(specs: dict[str, TensorSpec]) -> None:
    del specs[f"{M}.scales"]


def shorten_scales(specs: dict[str, TensorSpec]) -> None:
    specs[f"{M}.scales"] = TensorSpec(f"{M}.scales", "F16", (1, specs[f"{M}.scales"].shape[1] - 32))


DAMAGES = [(lose_scales, f"{M}.qweight"), (shorten_scales, f"{M}.")]


@pytest.mark.parametrize(("change", "told"), DAMAGES)
def test_a_damaged_checkpoint_of_others(run: Any, foreign: Path, change: Any, told: str) -> None:
    rewrite(foreign, change)
    result = run("verify", foreign)
    assert result.exit_code == 50
    assert told in result.stdout


def test_a_checkpoint_of_others_that_lacks_a_shard(run: Any, run_json: Any, foreign: Path) -> None:
    (foreign / "model-00003-of-00003.safetensors").unlink()
    result = run("verify", foreign, "--json")
    assert result.exit_code == 50
    assert "model-00003-of-00003.safetensors is missing" in json.loads(result.stdout)["problems"][0]


def test_a_configuration_that_says_little(run: Any, foreign: Path) -> None:
    config = json.loads((foreign / "config.json").read_text())
    del config["quantization_config"]["bits"]
    (foreign / "config.json").write_text(json.dumps(config))
    result = run("verify", foreign)
    assert result.exit_code == 50
    assert "quantization_config has no bits" in result.stdout


def test_an_older_configuration_file_that_differs_is_noted(run_json: Any, foreign: Path) -> None:
    (foreign / "quantize_config.json").write_text(json.dumps({"bits": 8}))
    found = run_json("verify", foreign)
    assert found["problems"] == []
    assert "quantize_config.json differs" in found["notes"][0]
