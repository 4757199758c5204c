"""Whole GGUF files are those of llama.cpp's converter and quantizer, to the byte (golden_gguf_files)."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf_files_made as made
import pytest
from gguf_checkpoints_made import side_files

import shardq
from shardq import Limits, make_recipe
from shardq.files.gguf_read import read_gguf
from shardq.gguf.metadata import find_tensors
from shardq.gguf.model_files import ModelFiles
from shardq.gguf.options import GgufOptions
from shardq.gguf.tensors import SourceTensor

if TYPE_CHECKING:
    from shardq.recipe import Decode

pytest.importorskip("gguf", reason="names of GGUF tensors come from the package gguf")
pytest.importorskip("tokenizers", reason="vocabularies are read with the package tokenizers")

GOLDEN = Path(__file__).parent / "golden_gguf_files"
DIGITS = 16


def golden(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    return found


def recipe(row: made.Wanted, case: made.FileCase, folder: Path) -> shardq.Recipe:
    options = GgufOptions(row.pure, row.output_type, row.embedding_type, row.overrides, tokenizer_pre=case.case.pre)
    file = imatrix(row, case, folder)
    decode: Decode = "exact" if case.dtype == "BF16" else "rounded"  # golden files came by way of BF16
    name = f"gguf:{row.file_type.lower()}"
    return make_recipe(name, importance=file, gguf=options, requantize=row.requantize, decode=decode)


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


@pytest.mark.parametrize("name", ["llama", "qwen35", "qwen3next"])
def test_it_does_not_matter_where_rows_are_cut(name: str, tmp_path: Path, short_spans: int) -> None:
    """Within heads that change places, and between those that become one tensor."""
    case, stored = made.FILES[name], golden(name)
    source, wanted = made.write(case, tmp_path), recipe(made.Wanted("Q4_K_M"), case, tmp_path)
    cut = Counter(task.tensor for task in shardq.plan(source, wanted).tasks)
    assert max(count for tensor, count in cut.items() if "attn" in tensor) > 1, short_spans
    done = shardq.quantize(source, wanted, output_dir=tmp_path / "out", limits=Limits(parallel=1))
    assert not unlike(done.output, stored["files"]["Q4_K_M"], stored["tensors"], "Q4_K_M")


OPTIONS = [(name, row) for name, rows in made.MORE.items() for row in rows]


@pytest.mark.parametrize(("name", "row"), OPTIONS, ids=[f"{name}-{row.name}" for name, row in OPTIONS])
def test_options_and_importance_do_what_they_do_there(name: str, row: made.Wanted, tmp_path: Path) -> None:
    case, stored = made.FILES[name], golden(name)
    source = made.write(case, tmp_path)
    done = shardq.quantize(source, recipe(row, case, tmp_path), output_dir=tmp_path / "out", limits=Limits(parallel=1))
    assert not unlike(done.output, stored["files"][row.name], stored["tensors"], row.name)


def test_blocks_of_the_source_stay_where_llama_cpp_refuses_to_quantize_them_again(tmp_path: Path) -> None:
    case, stored = made.FILES["gpt_oss"], golden("gpt_oss")
    allowed = [row for row in made.MORE["gpt_oss"] if "refused" in stored["files"][row.file_type]]
    assert len(allowed) > 1
    recipes = [recipe(replace(row, requantize=False), case, tmp_path) for row in allowed]
    results = shardq.quantize_many(made.write(case, tmp_path), recipes, output_dir=tmp_path / "out")
    for row, result in zip(allowed, results, strict=True):
        blocks = {name: "MXFP4" for name in stored["tensors"] if "MXFP4" in stored["tensors"][name]}
        types = dict(zip(stored["tensors"], stored["files"][row.name]["types"].split(), strict=True)) | blocks
        assert len(blocks) == 6
        kept = {"file": "", "header": "", "types": " ".join(types.values())}
        assert unlike(result.output, kept, stored["tensors"], row.name) == ["header"], row.name


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_blocks_of_the_source_stay_in_files_of_floats(kind: str, tmp_path: Path) -> None:
    case = made.FILES["gpt_oss"]
    found = shardq.plan(made.write(case, tmp_path), recipe(made.Wanted(kind), case, tmp_path)).gguf
    assert found
    assert Counter(t.type for t in found.tensors if "_exps.weight" in t.name) == {"MXFP4": 6}
    assert {t.type for t in found.tensors} == {"MXFP4", kind, "F32"}
