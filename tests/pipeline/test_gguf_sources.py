"""GGUF files of quantized sources: no intermediate checkpoint is made, and none would make another file."""

from pathlib import Path

import gguf_files_made as made
import pytest

import shardq
from shardq import Limits, make_recipe
from shardq.gguf.options import GgufOptions
from shardq.recipe import Decode

pytest.importorskip("gguf", reason="names of GGUF tensors come from the package gguf")
pytest.importorskip("tokenizers", reason="vocabularies are read with the package tokenizers")

INLINE = Limits(parallel=1)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.gguf")}


def gguf(source: Path, out: Path, pre: str | None, decode: Decode) -> dict[str, bytes]:
    recipe = make_recipe("gguf:q4_k_m", gguf=GgufOptions(tokenizer_pre=pre), decode=decode)
    shardq.quantize(source, recipe, output_dir=out, limits=INLINE)
    return files(out)


@pytest.mark.parametrize(
    "scheme", ["FP8_BLOCK@fp8", "W4A16G32@compressed-tensors", "W4A16G32@gptq", "MXFP4A16@compressed-tensors"]
)
@pytest.mark.parametrize("name", ["deepseek3", "qwen2moe", "qwen35"])
def test_what_is_rounded_is_that_of_the_dequantized_checkpoint(name: str, scheme: str, tmp_path: Path) -> None:
    case = made.FILES[name].case
    quantized, plain = tmp_path / "quantized" / case.folder, tmp_path / "plain" / case.folder
    shardq.quantize(made.write(made.FILES[name], tmp_path), scheme, output_dir=quantized, limits=INLINE)
    shardq.quantize(quantized, shardq.dequantize_recipe(), output_dir=plain, limits=INLINE)
    for folder in (quantized, plain):
        (folder / "README.md").unlink()  # what a card says of a model goes into the file
    expected = gguf(plain, tmp_path / "from-plain", case.pre, "exact")
    assert gguf(quantized, tmp_path / "rounded", case.pre, "rounded") == expected
    assert gguf(quantized, tmp_path / "exact", case.pre, "exact").keys() == expected.keys()
