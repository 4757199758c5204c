"""Element types and order of GGUF tensors against llama.cpp's quantizer as it runs here.

LLAMA_LIB names the libllama of llama-cpp-python.
"""

import os
from dataclasses import replace
from pathlib import Path

import gguf_mixtures_made as made
import pytest
from golden_gguf_types.run_quantizer import quantized

from shardq.errors import ShardqError
from shardq.gguf.file_types import find_file_type
from shardq.gguf.mixtures import TypeOptions, choose_types, order_tensors, read_model

pytestmark = pytest.mark.oracle
LLAMA_LIB = os.environ.get("LLAMA_LIB", "")
if not Path(LLAMA_LIB).is_file():
    pytest.skip("LLAMA_LIB names no libllama", allow_module_level=True)


def ours(case: made.Case, run: made.Run) -> list[tuple[str, str]]:
    tensors = made.wanted(case, run.weighed)
    types = choose_types(read_model(made.pairs(case)), tensors, run.options, run.weighed)
    by_name = {tensor.name: kind for tensor, kind in zip(tensors, types, strict=True)}
    return [(name, by_name[name]) for name in order_tensors(by_name)]


@pytest.mark.parametrize("name", made.CASES)
def test_types_and_order(name: str) -> None:
    case = made.CASES[name]
    for run, tensors in quantized(LLAMA_LIB, case, made.runs(case)):
        assert ours(case, run) == tensors, run.name


FAR = replace(made.CASES["minimax"], blocks=10)  # its tensors are those of 11


@pytest.mark.parametrize(
    ("case", "file_type"),
    [(made.CASES["llama_16"], "Q2_K_S"), (made.CASES["gpt_oss"], "Q4_K_M"), (FAR, "Q4_K_M")],
    ids=["no imatrix", "blocks again", "no such block"],
)
def test_both_refuse(case: made.Case, file_type: str) -> None:
    kind = find_file_type(file_type)
    assert kind
    run = made.Run(file_type, TypeOptions(kind), False)
    with pytest.raises(ValueError, match="refused"):
        list(quantized(LLAMA_LIB, case, [run]))
    with pytest.raises(ShardqError):
        ours(case, run)
