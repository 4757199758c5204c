"""Whose columns importance counts where a GGUF file has those of a weight in another order: a file of ours speaks of
the weight's, an imatrix of llama.cpp's."""

from pathlib import Path

import gguf_files_made as made
import numpy as np
import pytest
from importance_files_made import legacy
from numpy.typing import NDArray

import shardq
from shardq import Limits, make_recipe
from shardq.files.gguf_read import read_gguf
from shardq.gguf.options import GgufOptions
from shardq.importance_files import Provenance, write_importance

pytest.importorskip("gguf", reason="names of GGUF tensors come from the package gguf")
pytest.importorskip("tokenizers", reason="vocabularies are read with the package tokenizers")

KEYS, VALUES, ROWS = 2, 4, 64  # heads of linear attention in the checkpoint, and columns of one of values


def written(source: Path, out: Path, importance: Path, pre: str | None) -> dict[str, bytes]:
    """The tensors of a file."""
    recipe = make_recipe("gguf:q2_k", importance=importance, gguf=GgufOptions(tokenizer_pre=pre))
    shardq.quantize(source, recipe, output_dir=out, limits=Limits(parallel=1))
    (path,) = out.glob("*.gguf")
    data = path.read_bytes()
    return {t.name: data[t.begin : t.end] for t in read_gguf(path).tensors}


def test_columns_that_change_places_take_their_importance_along(tmp_path: Path) -> None:
    case = made.FILES["qwen35"]
    source = made.write(case, tmp_path)
    inputs, outputs = np.random.default_rng(5).gamma(1.0, size=(2, KEYS, VALUES // KEYS, ROWS)).astype(np.float32)
    ours = tmp_path / "ours.safetensors"
    attention = "model.layers.0.linear_attn"
    vectors = {f"{attention}.in_proj_qkv": inputs.reshape(-1), f"{attention}.out_proj": outputs.reshape(-1)}
    write_importance(ours, vectors, Provenance("text", 512))

    def imatrix(name: str, last: NDArray[np.float32]) -> Path:
        found = {"attn_qkv": inputs, "ssm_out": last}
        entries = {f"blk.0.{key}.weight": (1, values.reshape(-1).tolist()) for key, values in found.items()}
        (tmp_path / name).write_bytes(legacy(entries))
        return tmp_path / name

    tiled = np.concatenate([outputs[key, value] for value in range(VALUES // KEYS) for key in range(KEYS)])
    expected = written(source, tmp_path / "a", imatrix("tiled.dat", tiled), case.case.pre)
    grouped = written(source, tmp_path / "b", imatrix("grouped.dat", outputs), case.case.pre)
    assert [name for name in expected if expected[name] != grouped[name]] == ["blk.0.ssm_out.weight"]
    assert written(source, tmp_path / "c", ours, case.case.pre) == expected
