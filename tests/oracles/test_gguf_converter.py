"""Metadata and tensors of GGUF files against llama.cpp's converter as it runs here.

LLAMA_CPP names the folder `vendor/llama.cpp` of the sdist of llama-cpp-python; torch, transformers and sentencepiece
are installed beside it.
"""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf_checkpoints_made as checkpoints
import pytest
from gguf_cases_made import CASES
from golden_gguf_model.dump_converter import shown

from shardq.gguf.config_defaults import CONFIG_TYPES
from shardq.gguf.metadata import find_metadata, find_tensors
from shardq.gguf.model_files import ModelFiles
from shardq.gguf.parameters import read_parameters
from shardq.gguf.tensors import SourceTensor, file_spec

pytestmark = pytest.mark.oracle
pytest.importorskip("gguf", reason="names of GGUF tensors come from the package gguf")
pytest.importorskip("transformers", reason="llama.cpp's converter reads configs with transformers")
pytest.importorskip("sentencepiece", reason="llama.cpp's converter imports sentencepiece")
LLAMA_CPP = os.environ.get("LLAMA_CPP", "")
if not Path(LLAMA_CPP, "convert_hf_to_gguf.py").exists():
    pytest.skip("LLAMA_CPP names no folder with convert_hf_to_gguf.py", allow_module_level=True)


def converted(folder: Path, pre: str | None) -> dict[str, Any]:
    script = checkpoints.GOLDEN / "dump_converter.py"
    command = [sys.executable, str(script), LLAMA_CPP, str(folder), *([pre] if pre else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def ours(folder: Path, pre: str | None, file_type: int) -> dict[str, Any]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    model = ModelFiles(folder.name, {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})
    tensors = find_tensors(model, [list(sources(path)) for path in sorted(folder.glob("*.safetensors"))])
    pairs = find_metadata(model, tensors, file_type, pre)
    values = [(p, list(p.value) if isinstance(p.value, tuple) else p.value) for p in pairs]
    return {
        "pairs": [[p.key, p.type, shown(p.type, value)] for p, value in values],
        "tensors": [[t.name, file_spec(t, "BF16").type, list(t.shape)] for t in tensors],
    }


def sources(path: Path) -> Iterator[SourceTensor]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    for name, entry in header.items():
        if name != "__metadata__":
            yield SourceTensor(name, tuple(entry["shape"]))


def check(folder: Path, pre: str | None, file_type: int = 32) -> None:
    expected = converted(folder, pre)
    expected["tensors"] = [row[:3] for row in expected["tensors"]]
    assert ours(folder, pre, file_type) == expected


@pytest.mark.parametrize("name", CASES)
def test_tiny_checkpoints(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    check(checkpoints.write(case, tmp_path), case.pre, 38 if "quantization_config" in case.config else 32)


def test_smollm2_and_its_pre_tokenizer(smollm2: Path) -> None:
    check(smollm2, None)


@pytest.mark.parametrize("kind", CONFIG_TYPES)
def test_defaults_of_configs_are_those_of_transformers(kind: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    theirs = CONFIG_MAPPING[kind]().to_dict()
    parameters = read_parameters({"model_type": kind})
    assert {key: parameters.values[key] for key in CONFIG_TYPES[kind].defaults} == {
        key: theirs[key] for key in CONFIG_TYPES[kind].defaults
    }
    assert parameters.values["rope_parameters"] == theirs["rope_parameters"]
