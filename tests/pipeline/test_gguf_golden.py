"""Whole GGUF files are those of llama.cpp's converter and quantizer, to the byte (golden_gguf_files)."""

import json
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import gguf_files_made as made
import pytest
from gguf_checkpoints_made import side_files

import shardq
from shardq import Limits, make_recipe
from shardq.errors import ShardqError
from shardq.files.gguf_read import read_gguf
from shardq.gguf.metadata import find_tensors
from shardq.gguf.model_files import ModelFiles
from shardq.gguf.options import GgufOptions
from shardq.gguf.tensors import SourceTensor

pytest.importorskip("gguf", reason="names of GGUF tensors come from the package gguf")
pytest.importorskip("tokenizers", reason="vocabularies are read with the package tokenizers")

GOLDEN = Path(__file__).parent / "golden_gguf_files"
DIGITS = 16
AS_CONVERTED = {"F16", "BF16"}  # blocks of the source stay as they are, where llama.cpp refuses


def golden(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    return found


def recipe(row: made.Wanted, case: made.FileCase, folder: Path) -> shardq.Recipe:
    options = GgufOptions(row.pure, row.output_type, row.embedding_type, row.overrides, tokenizer_pre=case.case.pre)
    return make_recipe(f"gguf:{row.file_type.lower()}", importance=imatrix(row, case, folder), gguf=options)


def imatrix(row: made.Wanted, case: made.FileCase, folder: Path) -> Path | None:
    if row.imatrix is None:
        return None
    sources = [SourceTensor(name, shape) for name, shape in case.case.shapes.items()]
    tensors = find_tensors(ModelFiles(case.case.folder, side_files(case.case)), [sources])
    path = folder / f"imatrix.{row.imatrix}"
    path.write_bytes(made.imatrix_bytes(made.importance({t.name: t.shape for t in tensors}), row.imatrix))
    return path


def unlike(output: Path, expected: Mapping[str, Any], tensors: Mapping[str, Mapping[str, str]], name: str) -> list[str]:
    """What differs between the one GGUF file of a folder and the digests of llama.cpp's; empty if nothing does."""
    (path,) = output.glob("*.gguf")
    data = path.read_bytes()
    if sha256(data).hexdigest() == expected["file"]:
        return []
    header = read_gguf(path)
    found = [] if sha256(data[: header.header_bytes_len]).hexdigest()[:DIGITS] == expected["header"] else ["header"]
    types = dict(zip(tensors, expected["types"].split(), strict=True))
    for tensor in header.tensors:
        kinds = tensors[tensor.name]
        wanted = kinds.get(f"{tensor.type} {name}", kinds.get(tensor.type))
        if tensor.type != types[tensor.name]:
            found.append(f"{tensor.name} is {tensor.type}, expected {types[tensor.name]}")
        elif sha256(data[tensor.begin : tensor.end]).hexdigest()[:DIGITS] != wanted:
            found.append(f"{tensor.name} has other {tensor.type}")
    return found or ["bytes between tensors"]


@pytest.mark.parametrize("name", made.FILES)
def test_all_file_types_from_one_read_are_llama_cpps(name: str, tmp_path: Path) -> None:
    case, stored = made.FILES[name], golden(name)
    source = made.write(case, tmp_path)
    kinds = [kind for kind in made.FILE_TYPES if "refused" not in stored["files"][kind]]
    recipes = [recipe(made.Wanted(kind), case, tmp_path) for kind in kinds]
    results = shardq.quantize_many(source, recipes, output_dir=tmp_path / "out", limits=Limits(parallel=2))
    wrong = {
        kind: differing
        for kind, result in zip(kinds, results, strict=True)
        if (differing := unlike(result.output, stored["files"][kind], stored["tensors"], kind))
    }
    shutil.rmtree(tmp_path / "out")
    assert not wrong


OPTIONS = [(name, row) for name, rows in made.MORE.items() for row in rows]


@pytest.mark.parametrize(("name", "row"), OPTIONS, ids=[f"{name}-{row.name}" for name, row in OPTIONS])
def test_options_and_importance_do_what_they_do_there(name: str, row: made.Wanted, tmp_path: Path) -> None:
    case, stored = made.FILES[name], golden(name)
    source = made.write(case, tmp_path)
    done = shardq.quantize(source, recipe(row, case, tmp_path), output_dir=tmp_path / "out", limits=Limits(parallel=1))
    assert not unlike(done.output, stored["files"][row.name], stored["tensors"], row.name)


@pytest.mark.parametrize("name", made.FILES)
def test_what_llama_cpp_refuses_is_refused(name: str, tmp_path: Path) -> None:
    refused = [kind for kind, found in golden(name)["files"].items() if "refused" in found]
    if not refused:
        pytest.skip(f"llama.cpp takes {name} for all file types")
    source = made.write(made.FILES[name], tmp_path)
    for kind in refused:
        own = recipe(made.Wanted(kind), made.FILES[name], tmp_path)
        if kind in AS_CONVERTED:
            assert shardq.plan(source, own).files
        else:
            with pytest.raises(ShardqError, match=kind.split("_")[0]):
                shardq.plan(source, own)
