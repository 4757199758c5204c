"""Kernel sets to test and weights to test them on."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from kernel_cases import Check, Make, MakeImportance, WithoutNan
from numpy.typing import NDArray

from shardq.kernels import NAMES, KernelSet, load, sets

Weights = NDArray[Any]

SPECIAL = (0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf)
EDGES = (*SPECIAL, 1e-38, -1e-38, 1e-45, 1e30, -1e30, 3e38, 65504.0, 524032.0, 1e-5, -2e-5, 6e-8, 0.5, -0.5, 1.0)


@pytest.fixture(scope="session", params=[name for name in NAMES if name != "reference"])
def kernels(request: pytest.FixtureRequest) -> KernelSet:
    """Every native set in turn; skipped, with the reason, where this CPU or build lacks it."""
    info = next(row for row in sets() if row.name == request.param)
    if not info.usable:
        pytest.skip(f"{info.name}: {info.why}")
    return load(request.param)


@pytest.fixture(scope="session")
def reference() -> KernelSet:
    """The torch reference."""
    return load("reference")


def raw(values: NDArray[np.float32], dtype: str) -> Weights:
    """fp32 values as raw weights: bf16 by truncation, fp16 and fp32 by numpy."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


@pytest.fixture(scope="session")
def make_weights() -> Make:
    """make(seed, kind, rows, cols, dtype): raw weights of one kind.

    plain: like a layer. edges: the same with a few special values. ties: multiples of half a scale, so that every
    second quotient is a tie. tiny: scales among the fp16 subnormals. wild: any bit pattern.
    """

    def make(seed: int, kind: str, rows: int, cols: int, dtype: str) -> Weights:
        rng = np.random.default_rng(seed)
        if kind == "wild":
            if dtype == "F32":
                return rng.integers(0, 2**32, (rows, cols), np.uint32).view(np.float32)
            return rng.integers(0, 2**16, (rows, cols), np.uint16)
        if kind == "ties":
            step = np.float32(rng.integers(1, 64)) * np.float32(2.0 ** rng.integers(-14, 4))
            values = (rng.integers(-33, 34, (rows, cols)) * step / 2).astype(np.float32)
        elif kind == "tiny":
            values = (rng.standard_normal((rows, cols)) * 10.0 ** rng.uniform(-6, -3)).astype(np.float32)
        else:
            values = (rng.standard_normal((rows, cols)) * 0.02).astype(np.float32)
        if kind == "edges":
            where = rng.random((rows, cols)) < 0.02
            values[where] = rng.choice(np.array(EDGES, np.float32), int(where.sum()))
        return raw(values, dtype)

    return make


@pytest.fixture(scope="session")
def make_importance() -> MakeImportance:
    """make(seed, kind, cols): what errors in columns count. huge: over sixty powers of ten."""

    def make(seed: int, kind: str, cols: int) -> NDArray[np.float32] | None:
        rng = np.random.default_rng(seed)
        if kind == "none":
            return None
        if kind in ("equal", "all_zero"):
            return np.full(cols, 0.37 if kind == "equal" else 0.0, np.float32)
        if kind == "huge":
            return (10.0 ** rng.uniform(-30, 30, cols)).astype(np.float32)
        e = (rng.standard_normal(cols) ** 2).astype(np.float32)
        return np.where(rng.random(cols) < 0.3, np.float32(0), e) if kind == "zeros" else e

    return make


@pytest.fixture(scope="session")
def without_nan() -> WithoutNan:
    """The array with one NaN for all: which NaN a result is, is not specified."""
    return lambda x: np.where(np.isnan(x), x.dtype.type(np.nan), x)


@pytest.fixture(scope="session")
def same_bits() -> Check:
    """Asserts equality of bytes, not of values: -0 is not 0 and each NaN is itself."""

    def check(found: NDArray[Any], expected: NDArray[Any]) -> None:
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        differ = np.flatnonzero(found.reshape(-1).view(np.uint8) != expected.reshape(-1).view(np.uint8))
        where = differ[:4] // found.itemsize
        assert differ.size == 0, f"at {where}: {found.reshape(-1)[where]} expected {expected.reshape(-1)[where]}"

    return check


@pytest.fixture(scope="session")
def block_data() -> ModuleType:
    """golden/blocks/block_data.py: weights and importances that are the same everywhere."""
    spec = spec_from_file_location("block_data", Path(__file__).parent / "golden" / "blocks" / "block_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
