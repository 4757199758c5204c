"""Blocks of ggml: natively as in the reference, and both as ggml itself by stored hashes."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import IMPORTANCES, KINDS, Check, Make, MakeImportance, WithoutNan
from numpy.typing import NDArray

from shardq.kernels import DTYPES, KernelSet
from shardq.kernels.contract_blocks import BLOCK_FORMATS

HASHES = json.loads((Path(__file__).parent / "golden" / "blocks" / "hashes.json").read_text())


def run(
    kernels: KernelSet, src: NDArray[Any], dtype: str, name: str, importance: NDArray[np.float32] | None
) -> tuple[NDArray[np.uint8], int]:
    form = BLOCK_FORMATS[name]
    out = np.full((len(src), src.shape[1] // form.cols * form.size_bytes), 0xA5, np.uint8)
    bad = kernels.quantize_blocks(src, dtype, name, importance, out)
    return out, bad


@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(tuple(BLOCK_FORMATS)),
    weights=st.sampled_from(IMPORTANCES),
)
@settings(max_examples=150, deadline=None)
def test_quantize_blocks_equals_reference(
    kernels: KernelSet,
    reference: KernelSet,
    make_weights: Make,
    make_importance: MakeImportance,
    same_bits: Check,
    seed: int,
    kind: str,
    rows: int,
    blocks: int,
    dtype: str,
    name: str,
    weights: str,
) -> None:
    cols = blocks * BLOCK_FORMATS[name].cols
    src, importance = make_weights(seed, kind, rows, cols, dtype), make_importance(seed, weights, cols)
    (found, bad), (expected, expected_bad) = (run(k, src, dtype, name, importance) for k in (kernels, reference))
    assert bad == expected_bad
    same_bits(found, expected)


@pytest.mark.parametrize("weights", ["none", "plain"])
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_sub_blocks_of_all_sizes_side_by_side(
    kernels: KernelSet, reference: KernelSet, make_importance: MakeImportance, same_bits: Check, name: str, weights: str
) -> None:
    """Some are searched with others like them, some not at all, and each comes back to its place."""
    rng, cols = np.random.default_rng(7), 2048
    src = (rng.standard_normal((5, cols)) * 0.02).astype(np.float32)
    sizes = np.array([1, 0, 1e-14, 1e-17, 1e-25, 1e-40], np.float32)
    src.reshape(-1, 16)[...] *= rng.choice(sizes, src.size // 16)[:, None]
    src[4] = sizes[1:].max() * src[4]
    importance = make_importance(3, weights, cols)
    (found, bad), (expected, expected_bad) = (run(k, src, "F32", name, importance) for k in (kernels, reference))
    assert bad == expected_bad == 0
    same_bits(found, expected)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_blocks_are_those_of_ggml(kernels: KernelSet, block_data: ModuleType, name: str) -> None:
    assert hashes_of(kernels, block_data, name) == HASHES[name]


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_blocks_of_the_reference_are_those_of_ggml(reference: KernelSet, block_data: ModuleType, name: str) -> None:
    assert hashes_of(reference, block_data, name) == HASHES[name]


def hashes_of(kernels: KernelSet, data: ModuleType, name: str) -> dict[str, str]:
    found = {}
    for kind, make in data.KINDS.items():
        digest = hashlib.sha256()
        for which in data.IMPORTANCES:
            out, bad = run(kernels, make(), "F32", name, data.importance(which))
            assert bad == 0
            digest.update(out.tobytes())
        found[kind] = digest.hexdigest()
    return found


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_dequantize_blocks_equals_reference(
    kernels: KernelSet, reference: KernelSet, same_bits: Check, without_nan: WithoutNan,
    name: str,
) -> None:  # fmt: skip
    form = BLOCK_FORMATS[name]
    blocks = np.random.default_rng(5).integers(0, 256, (7, 9 * form.size_bytes), np.uint8)
    found, expected = np.empty((2, 7, 9 * form.cols), np.float32)
    kernels.dequantize_blocks(blocks, name, found)
    reference.dequantize_blocks(blocks, name, expected)
    same_bits(without_nan(found), without_nan(expected))


MOST_ERRORS = {
    "Q4_0": 0.1, "Q4_1": 0.1, "Q5_0": 0.05, "Q5_1": 0.05, "Q8_0": 0.01, "Q2_K": 0.35, "Q3_K": 0.2, "Q4_K": 0.09,
    "Q5_K": 0.05, "Q6_K": 0.025, "IQ4_NL": 0.09, "IQ4_XS": 0.09, "TQ1_0": 0.9, "TQ2_0": 0.9, "MXFP4": 0.13,
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_blocks_stand_for_the_weights(kernels: KernelSet, block_data: ModuleType, name: str) -> None:
    w = block_data.bell(1)
    blocks, _ = run(kernels, w, "F32", name, None)
    values = np.empty_like(w)
    kernels.dequantize_blocks(blocks, name, values)
    assert np.linalg.norm(values - w) / np.linalg.norm(w) < MOST_ERRORS[name]


@pytest.mark.parametrize("weights", ["none", "plain"])
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_bad_blocks_are_counted_and_decode_to_zeros(
    kernels: KernelSet, block_data: ModuleType, make_importance: MakeImportance, name: str, weights: str
) -> None:
    form, w = BLOCK_FORMATS[name], block_data.bell(2)[:, :512].copy()
    w[0, 3], w[1, 300], w[2, 511] = np.nan, np.inf, -np.inf
    w[1, :32] *= np.float32(1e12)
    out, bad = run(kernels, w, "F32", name, make_importance(0, weights, 512))
    blocks = out.reshape(3, -1, form.size_bytes)
    count = 512 // form.cols
    expected = {(0, 3 // form.cols), (1, 300 // form.cols), (2, count - 1)}
    if name != "MXFP4":  # whose scales reach as far as those of fp32
        expected.add((1, 0))
    assert {(int(r), int(b)) for r, b in np.argwhere(~blocks.any(2))} == expected
    assert bad == len(expected)
    values = np.empty_like(w)
    kernels.dequantize_blocks(out, name, values)
    assert np.isfinite(values).all()
    for r, b in expected:
        assert not values[r, b * form.cols : (b + 1) * form.cols].any()


def test_mxfp4_of_the_largest_numbers_has_no_infinite_element(kernels: KernelSet) -> None:
    w = np.zeros((1, 32), np.float32)
    w[0, 0], w[0, 16] = np.finfo(np.float32).max, np.float32(2.0**127)
    blocks, bad = run(kernels, w, "F32", "MXFP4", None)
    assert bad == 0
    assert blocks[0, 0] == 253  # log2 of the largest number is 128 in fp32, and 8 * 2^(253 - 128) infinite
    assert blocks[0, 1] == 0x45  # 6 and 4


def test_blocks_do_not_depend_on_the_mode_of_the_thread(kernels: KernelSet, block_data: ModuleType) -> None:
    torch = pytest.importorskip("torch")
    w = block_data.KINDS["tiny"]()
    expected = [run(kernels, w, "F32", name, None)[0] for name in BLOCK_FORMATS]
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        found = [run(kernels, w, "F32", name, None)[0] for name in BLOCK_FORMATS]
        assert float(torch.tensor([1e-40]) * 1.0) == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


REFUSED: dict[str, tuple[str, Callable[[KernelSet], Any]]] = {
    "type": ("block_type", lambda k: k.quantize_blocks(w16(32), "F16", "Q4_2", None, bytes_of(18))),
    "no whole block": ("src", lambda k: k.quantize_blocks(w16(288), "F16", "Q4_K", None, bytes_of(144))),
    "out": ("out", lambda k: k.quantize_blocks(w16(64), "F16", "Q4_0", None, bytes_of(18))),
    "dtype": ("dtype", lambda k: k.quantize_blocks(w16(32), "F8", "Q4_0", None, bytes_of(18))),
    "importance": ("importance", lambda k: k.quantize_blocks(w16(32), "F16", "Q4_0", -ONES, bytes_of(18))),
    "importance size": ("importance", lambda k: k.quantize_blocks(w16(64), "F16", "Q4_0", ONES, bytes_of(36))),
    "half a block": ("blocks", lambda k: k.dequantize_blocks(bytes_of(27), "Q4_0", np.empty((1, 32), np.float32))),
    "values": ("out", lambda k: k.dequantize_blocks(bytes_of(36), "Q4_0", np.empty((1, 32), np.float32))),
    "type of blocks": ("block_type", lambda k: k.dequantize_blocks(bytes_of(18), "", np.empty((1, 32), np.float32))),
}
ONES = np.ones(32, np.float32)


def w16(cols: int) -> NDArray[np.uint16]:
    return np.ones((1, cols), np.uint16)


def bytes_of(count: int) -> NDArray[np.uint8]:
    return np.zeros((1, count), np.uint8)


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_blocks_are_refused_by_name(kernels: KernelSet, reference: KernelSet, case: str) -> None:
    name, call = REFUSED[case]
    for each in (kernels, reference):
        with pytest.raises(ValueError, match=f"^{name}: "):
            call(each)
