"""Bit streams, transposition and the checksum."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Check

from shardq.kernels import KernelSet


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.integers(2, 8),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 300)),
)
@settings(max_examples=100, deadline=None)
def test_packing_equals_reference_and_comes_back(
    kernels: KernelSet, reference: KernelSet, same_bits: Check, seed: int, bits: int, shape: tuple[int, int]
) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, shape, np.uint8)
    words = (shape[0], -(-shape[1] * bits // 32))
    found, expected = np.full(words, 2**32 - 1, np.uint32), np.empty(words, np.uint32)
    kernels.pack_bits(codes, bits, found)
    reference.pack_bits(codes, bits, expected)
    same_bits(found, expected)
    for each in (kernels, reference):
        back = np.full(shape, 255, np.uint8)
        each.unpack_bits(found, bits, back)
        same_bits(back, codes)


def test_bits_above_the_width_do_not_reach_the_neighbours(kernels: KernelSet, same_bits: Check) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    for bits in range(2, 9):
        found, expected = np.empty((2, 2, 4 * bits), np.uint32)
        kernels.pack_bits(codes, bits, found)
        kernels.pack_bits(codes & (2**bits - 1), bits, expected)
        same_bits(found, expected)


def test_four_bit_words_hold_the_first_code_lowest(kernels: KernelSet) -> None:
    out = np.empty((1, 2), np.uint32)
    kernels.pack_bits(np.array([[1, 2, 3, 4, 5, 6, 7, 8, 9]], np.uint8), 4, out)
    assert out.tolist() == [[0x87654321, 0x9]]


def test_three_bit_words_are_those_of_auto_round(kernels: KernelSet) -> None:
    """32 codes of value 3 (zero point 4 stored less one), as auto-round 0.16.1 writes them."""
    out = np.empty((1, 3), np.uint32)
    kernels.pack_bits(np.full((1, 32), 3, np.uint8), 3, out)
    assert out.tolist() == [[0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]]


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from((2, 4, 8)),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 300)),
)
@settings(max_examples=60, deadline=None)
def test_words_split_as_in_the_reference(
    kernels: KernelSet, reference: KernelSet, same_bits: Check, seed: int, bits: int, shape: tuple[int, int]
) -> None:
    words = np.random.default_rng(seed).integers(0, 2**32, shape, np.uint32)
    found, expected = np.full((2, shape[0] * 32 // bits, shape[1]), 0xA5, np.uint8)
    kernels.split_words(words, bits, found)
    reference.split_words(words, bits, expected)
    same_bits(found, expected)


def test_rows_of_split_words_have_the_lowest_bits_first(kernels: KernelSet) -> None:
    out = np.empty((8, 2), np.uint8)
    kernels.split_words(np.array([[0x87654321, 0xFEDCBA90]], np.uint32), 4, out)
    assert out.T.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [0, 9, 10, 11, 12, 13, 14, 15]]


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 70),
    cols=st.integers(1, 70),
    before=st.integers(0, 9),
    after=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_transposition_writes_its_strip_and_nothing_else(
    kernels: KernelSet,
    reference: KernelSet,
    same_bits: Check,
    seed: int,
    rows: int,
    cols: int,
    before: int,
    after: int,
) -> None:
    rng = np.random.default_rng(seed)
    src = rng.integers(0, 2**32, (rows, cols), np.uint32)
    start = rng.integers(0, 2**32, (cols, before + rows + after), np.uint32)
    expected = start.copy()
    expected[:, before : before + rows] = src.T
    for each in (kernels, reference):
        found = start.copy()
        each.transpose_u32(src, found, before)
        same_bits(found, expected)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 127, 128, 129, 4096, 10_000])
def test_checksum_equals_reference(kernels: KernelSet, reference: KernelSet, size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    assert kernels.checksum(data) == reference.checksum(data) == kernels.checksum(data.tobytes())


def test_checksum_sees_every_flipped_bit_swapped_page_and_length(kernels: KernelSet) -> None:
    data = np.random.default_rng(0).integers(0, 256, 3 * 4096 + 5, np.uint8)
    digests = {kernels.checksum(data)}
    flips = range(0, data.size * 8, 7)
    for bit in flips:
        data[bit // 8] ^= 1 << bit % 8
        digests.add(kernels.checksum(data))
        data[bit // 8] ^= 1 << bit % 8
    assert len(digests) == 1 + len(flips)
    swapped = data.copy()
    swapped[:4096], swapped[4096:8192] = data[4096:8192], data[:4096]
    assert kernels.checksum(swapped) not in digests
    zeros = {kernels.checksum(np.zeros(size, np.uint8)) for size in range(600)}
    assert len(zeros) == 600
