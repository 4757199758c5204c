"""Blocks against ggml's own functions, as libgguf 0.2.2 carries them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shardq.kernels import KernelSet, load, sets
from shardq.kernels.contract_blocks import BLOCK_FORMATS

IDS = {
    "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
    "IQ4_NL": 20, "IQ4_XS": 23, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39,
}  # fmt: skip
ROWS, COLS = 32, 1280
Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def ggml() -> Any:
    """The package; skipped where it is absent."""
    return pytest.importorskip("libgguf", reason="libgguf is not installed here; `nox -s oracles` installs it")


@pytest.fixture(scope="module", params=[row.name for row in sets() if row.name != "reference"])
def kernels(request: pytest.FixtureRequest) -> KernelSet:
    """Every native set in turn."""
    info = next(row for row in sets() if row.name == request.param)
    if not info.usable:
        pytest.skip(f"{info.name}: {info.why}")
    return load(request.param)


def weights(seed: int) -> Iterator[Floats]:
    """Like layers, with heavy tails, with equal magnitudes, with zeros, and far apart from block to block."""
    rng = np.random.default_rng(seed)
    normal = (rng.standard_normal((ROWS, COLS)) * 0.02).astype(np.float32)
    yield normal
    yield (normal.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    yield (rng.standard_t(2, (ROWS, COLS)) * 0.02).astype(np.float32)
    yield rng.integers(-8, 8, (ROWS, COLS)).astype(np.float32) * np.float32(0.0125)
    yield np.where(rng.random((ROWS, COLS // 16)).repeat(16, 1) < 0.5, np.float32(0), normal)
    for lowest, highest in ((-46, -30), (-20, 0), (0, 4)):
        exponents = rng.uniform(lowest, highest, (ROWS, COLS // 16)).repeat(16, 1)
        yield (normal * 10.0**exponents).astype(np.float32)


def importances(seed: int) -> Iterator[Floats | None]:
    """None, as calibration finds them, with zeros, and over thirty powers of ten."""
    rng = np.random.default_rng(seed)
    plain = rng.gamma(1.0, 1.0, COLS).astype(np.float32)
    yield None
    yield plain
    yield np.where(rng.random(COLS) < 0.4, np.float32(0), plain)
    yield (10.0 ** rng.uniform(-25, 5, COLS)).astype(np.float32)


@pytest.mark.oracle
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_blocks_are_those_that_ggml_makes_here(kernels: KernelSet, ggml: Any, name: str) -> None:
    form, different = BLOCK_FORMATS[name], 0
    for w in weights(IDS[name]):
        for importance in importances(IDS[name]):
            expected = np.asarray(ggml.quantize_rows(w, IDS[name], importance)).view(np.uint8).reshape(ROWS, -1)
            out = np.empty((ROWS, COLS // form.cols * form.size_bytes), np.uint8)
            assert kernels.quantize_blocks(w, "F32", name, importance, out) == 0
            different += int((out != expected).reshape(-1, form.size_bytes).any(1).sum())
    assert different == 0


@pytest.mark.oracle
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_weights_of_blocks_are_those_that_ggml_makes_here(kernels: KernelSet, ggml: Any, name: str) -> None:
    form = BLOCK_FORMATS[name]
    w = next(weights(1))
    blocks = np.asarray(ggml.quantize_rows(w, IDS[name], None)).view(np.uint8).reshape(ROWS, -1)
    found = np.empty((ROWS, COLS // form.cols * form.cols), np.float32)
    kernels.dequantize_blocks(blocks, name, found)
    expected = np.asarray(ggml.dequantize_rows(blocks, IDS[name])).astype(np.float32).reshape(found.shape)
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))
