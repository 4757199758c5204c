"""The readers themselves, on other codes than those of the golden files."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from shardq.kernels import KernelSet

GOLDEN = Path(__file__).parent / "golden"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(GOLDEN)
    cases: Any = importlib.import_module("encoded_cases")
    readers: Any = importlib.import_module("peer_readers")


@pytest.mark.oracle
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.id)
def test_rows_are_those_of_the_live_reader(
    case: Any, seed: int, open_bytes: Callable[[bytes], Any], fast: KernelSet
) -> None:
    if (peer := readers.PEERS[case.reader]) is not None:
        pytest.importorskip(peer, reason=f"{peer} reads this kind and is not installed here")
    tensors = case.make(torch.Generator().manual_seed(seed))
    expected = readers.READERS[case.reader](tensors, case.config, case.args).numpy()
    file = open_bytes(
        save({k: v.contiguous() for k, v in tensors.items()}, metadata={"config": json.dumps(case.config)})
    )
    (matrices,) = file.find().encoded.values()
    for e, weight in zip(matrices, expected.reshape(-1, *expected.shape[-2:]), strict=True):
        found = file.decode(e, 0, e.rows, fast)
        if case.id == "bnb4/fp4":  # code 8 is +0 in the file's own table, -0 in the library's kernel
            assert np.array_equal(found, weight)
        else:
            assert found.tobytes() == np.ascontiguousarray(weight).tobytes()


@pytest.mark.oracle
def test_the_formula_of_nvfp4_is_that_of_model_optimizer() -> None:
    """`NVFP4QTensor.dequantize`, whose table has no -0."""
    qtensor: Any = pytest.importorskip("modelopt.torch.quantization.qtensor", reason="Model-Optimizer is not installed")
    case = next(c for c in cases.CASES if c.id == "nvfp4_modelopt/group16")
    tensors = case.make(torch.Generator().manual_seed(3))
    codes, scale, above = list(tensors.values())[:3]
    rows, half = codes.shape
    theirs = qtensor.NVFP4QTensor(torch.Size([rows, 2 * half]), torch.float32, codes).dequantize(
        torch.float32, scale=scale, double_scale=above, block_sizes={-1: 16}
    )
    ours = readers.READERS["modelopt"](tensors, {}, {})
    assert torch.equal(ours + 0.0, theirs + 0.0)
