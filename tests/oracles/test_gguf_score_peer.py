"""Scores of files that llama.cpp itself has quantized, in types that shardq does not write too: against figures from
its converter's BF16 file, both read and decoded by the package gguf."""

import ctypes
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf_files_made as made
import numpy as np
import pytest
from numpy.typing import NDArray

import shardq
from shardq.files.gguf_read import read_gguf
from shardq.ggml import GGML
from shardq.gguf.file_types import OTHERS
from shardq.gguf_decoding import decode_numbers
from shardq.kernels import load
from shardq.scored import Score

pytestmark = pytest.mark.oracle

NUMBERS = {name: number for number, name in OTHERS.items()}  # of file types that shardq does not write
WEIGHED = ("IQ2_XXS", "IQ2_XS", "IQ2_M", "IQ3_XXS", "IQ3_M", "IQ1_S", "IQ1_M")
BLOCKS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "NVFP4")


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A folder whose large files do not outlive the test."""
    yield tmp_path
    for path in tmp_path.rglob("*.gguf"):
        path.unlink()


def numbers(path: Path) -> Mapping[str, NDArray[np.float32]]:
    """All tensors of a file as the package gguf has them."""
    import gguf

    reader = gguf.GGUFReader(path)
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def check(found: Score, ours: Path, whole: Path) -> set[str]:
    """Every tensor's figures against numpy's; returns the types that were compared."""
    theirs, weights = numbers(ours), numbers(whole)
    assert {t.name for t in found.tensors} == theirs.keys() == weights.keys()
    assert (found.lacking, found.extra, found.left, found.moved) == ((), (), {}, ())
    for t in found.tensors:
        w, q = weights[t.name].astype(np.float64), theirs[t.name].astype(np.float64)
        assert t.errors.weights == w.size
        assert t.errors.figures.squared_error == pytest.approx(np.square(w - q).sum(), rel=1e-5), t.name
        assert t.errors.max_error == pytest.approx(np.abs(w - q).max(), rel=1e-6), t.name
        assert t.same == bool((w == q).all())
    return {t.kind for t in found.tensors}


def importance(whole: Path) -> dict[str, NDArray[np.float32]]:
    stats = made.importance({t.name: t.shape[::-1] for t in read_gguf(whole).tensors})
    return made.divided(stats, "legacy")


def test_a_real_model_in_two_bits_and_in_four(gguf_peer: Any, smollm2: Path, room: Path) -> None:
    whole = gguf_peer.convert(smollm2, room / "whole.gguf")
    for number, kinds in (
        (NUMBERS["IQ2_XXS"], {"IQ2_XXS", "IQ4_NL"}),
        (gguf_peer.FILE_TYPES["Q4_K_M"], {"Q4_K", "Q5_0"}),
    ):
        ours = gguf_peer.quantize(whole, room / "ours.gguf", number, imatrix=importance(whole))
        found = shardq.score(ours, smollm2, full=True)
        told = check(found, ours, whole)
        assert kinds <= told
        beside = shardq.score(ours, whole, full=True)
        assert [t.errors for t in beside.tensors] == [t.errors for t in found.tensors]
        print(f"\n{sorted(told)}: relative error {found.errors.relative:.4f}, {found.errors.sqnr_db:.2f} dB")


@pytest.mark.parametrize("name", ["qwen3moe", "deepseek3", "gemma2", "qwen35", "mixtral"])
def test_small_types_of_every_order_of_rows(name: str, gguf_peer: Any, room: Path) -> None:
    case = made.FILES[name]
    source = made.write(case, room)
    whole = gguf_peer.convert(source, room / "whole.gguf", case.case.pre)
    told = set()
    for kind in WEIGHED:
        ours = gguf_peer.quantize(whole, room / "ours.gguf", NUMBERS[kind], imatrix=importance(whole))
        told |= check(shardq.score(ours, source, full=True), ours, whole)
    assert told > {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ3_S"}


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_decoded_as_ggml_does(kind: str, gguf_peer: Any) -> None:
    import llama_cpp

    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so*"))))
    decode = getattr(library, f"dequantize_row_{kind.lower()}")
    decode.restype, decode.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    blocks, columns = 4096, GGML[kind].block_weights
    data = np.random.default_rng(5).integers(0, 0x78, (blocks, GGML[kind].block_bytes), np.uint8)
    theirs = np.empty((blocks, columns), np.float32)
    decode(data.ctypes.data, theirs.ctypes.data, theirs.size)
    ours = decode_numbers(data.reshape(-1), kind, columns, load())
    assert np.array_equal(ours, theirs, equal_nan=True)
