"""widen and group_minmax: every 16-bit pattern, and the rules for NaN and zero."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Check, Make

from shardq.kernels import DTYPES, KernelSet


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_pattern_widens_as_in_torch(
    kernels: KernelSet, reference: KernelSet, same_bits: Check, dtype: str
) -> None:
    src = np.arange(65536, dtype=np.uint16).reshape(64, 1024)
    out, by_reference = np.empty(src.shape, np.float32), np.empty(src.shape, np.float32)
    kernels.widen(src, dtype, out)
    reference.widen(src, dtype, by_reference)
    same_bits(out, by_reference)
    element = torch.bfloat16 if dtype == "BF16" else torch.float16
    expected = torch.from_numpy(src.view(np.int16)).view(element).float().numpy()
    numbers = ~np.isnan(expected)
    assert (np.isnan(out) == ~numbers).all()
    same_bits(out[numbers], expected[numbers])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_widening_keeps_the_payload_of_nan(kernels: KernelSet, dtype: str) -> None:
    quiet_bit, shift = (0x0040, 16) if dtype == "BF16" else (0x0200, 13)
    infinity = 0x7F80 if dtype == "BF16" else 0x7C00
    src = np.array([[infinity | 1, infinity | quiet_bit | 1, 0x8000 | infinity | 1]], np.uint16)
    out = np.empty(src.shape, np.float32)
    kernels.widen(src, dtype, out)
    payload = out.view(np.uint32) & 0x007FFFFF
    assert payload.tolist() == [[1 << shift, (quiet_bit | 1) << shift, 1 << shift]]


def test_fp32_is_copied_bit_for_bit(kernels: KernelSet, make_weights: Make, same_bits: Check) -> None:
    src = make_weights(1, "wild", 3, 1001, "F32")
    out = np.empty(src.shape, np.float32)
    kernels.widen(src, "F32", out)
    same_bits(out, src)


@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(("plain", "edges", "wild")),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 300)),
    group=st.sampled_from((1, 3, 16, 32, 64, 128, 1000)),
)
@settings(max_examples=80, deadline=None)
def test_minmax_equals_reference(
    kernels: KernelSet,
    reference: KernelSet,
    make_weights: Make,
    same_bits: Check,
    seed: int,
    kind: str,
    shape: tuple[int, int],
    group: int,
) -> None:
    x = make_weights(seed, kind, *shape, "F32")
    found, expected = np.empty((2, 2, shape[0], -(-shape[1] // group)), np.float32)
    kernels.group_minmax(x, group, found[0], found[1])
    reference.group_minmax(x, group, expected[0], expected[1])
    same_bits(found, expected)


def test_minmax_passes_over_nan_and_makes_zeros_positive(kernels: KernelSet, same_bits: Check) -> None:
    nan, infinity = np.float32(np.nan), np.float32(np.inf)
    x = np.array([[nan, -1, 2, nan, nan, -nan, -0.0, -0.0, nan, -infinity]], np.float32)
    low, high = np.empty((1, 4), np.float32), np.empty((1, 4), np.float32)
    kernels.group_minmax(x, 3, low, high)
    same_bits(low, np.array([[-1, infinity, 0, -infinity]], np.float32))
    same_bits(high, np.array([[2, -infinity, 0, -infinity]], np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_flushing_subnormals_does_not_reach_widen(kernels: KernelSet, same_bits: Check, dtype: str) -> None:
    src = np.full((1, 64), 1e-40, np.float32) if dtype == "F32" else np.full((1, 64), 3, np.uint16)
    plain, flushed = np.empty((1, 64), np.float32), np.empty((1, 64), np.float32)
    kernels.widen(src, dtype, plain)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        kernels.widen(src, dtype, flushed)
    finally:
        torch.set_flush_denormal(False)
    same_bits(flushed, plain)
    assert (plain != 0).all()
