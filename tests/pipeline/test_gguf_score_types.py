"""Scores of files with blocks of every type, beside files of numbers: against what the package gguf decodes."""

import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gguf_blocks_made import Tensors, random_blocks, write_gguf
from numpy.typing import NDArray

import shardq
from shardq.cli.group import commands
from shardq.kernels.contract_blocks import BLOCK_FORMATS
from shardq.scored import Score, Scored

gguf = pytest.importorskip("gguf", reason="some types are decoded by the package gguf")

PACKAGE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "NVFP4")
KERNELS = tuple(BLOCK_FORMATS)


def by_name(found: Score) -> dict[str, Scored]:
    return {t.name: t for t in found.tensors}


def numbers(kind: str, data: NDArray[np.uint8]) -> NDArray[np.float64]:
    """What the package gguf has of them."""
    found: NDArray[np.float32] = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    return found.astype(np.float64)


def test_every_type_has_the_figures_that_numpy_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside weights that are near what the blocks stand for: other numbers would be far off."""
    kinds = (*PACKAGE, *KERNELS)
    blocks = {kind: random_blocks(kind, 24, 512) for kind in kinds}
    noise = 1 + np.random.default_rng(1).standard_normal((24, 512)) / 128
    plain = {kind: (numbers(kind, blocks[kind]) * noise).astype(np.float32) for kind in kinds}
    made = write_gguf(tmp_path / "made.gguf", {kind: (kind, data) for kind, data in blocks.items()})
    source = write_gguf(tmp_path / "source.gguf", {kind: ("F32", data) for kind, data in plain.items()})
    monkeypatch.setattr("shardq.scored.WINDOW_BYTES", 7 * 4 * 512)
    found = by_name(shardq.score(made, source))
    assert found.keys() == set(kinds)
    for kind in kinds:
        weights = plain[kind].astype(np.float64)
        errors = weights - numbers(kind, blocks[kind])
        figures = found[kind].errors.figures
        assert (found[kind].kind, found[kind].same, found[kind].rows) == (kind, False, 24)
        assert figures.squared_error == pytest.approx(np.square(errors).sum(), rel=1e-4)
        assert figures.max_error == pytest.approx(np.abs(errors).max(), rel=1e-4)
        assert figures.squared_weight == pytest.approx(np.square(weights).sum(), rel=1e-6)
        assert 0.005 < found[kind].errors.relative < 0.01


def test_plain_types_are_numbers(tmp_path: Path) -> None:
    data = np.random.default_rng(2).standard_normal((6, 32)).astype(np.float32)
    half = {"F16": data.astype(np.float16), "F64": data.astype(np.float64), "F32": data}
    short = (data.view(np.uint32) >> 16).astype(np.uint16)
    rows: Tensors = {**{k: (k, v) for k, v in half.items()}, "BF16": ("BF16", short), "I8": ("I8", data.view(np.int8))}
    made = write_gguf(tmp_path / "made.gguf", rows)
    sources = dict.fromkeys(half, ("F32", data)) | {"BF16": ("F32", data), "I8": ("F32", np.tile(data, (1, 4)))}
    source = write_gguf(tmp_path / "source.gguf", sources)
    found = shardq.score(made, source)
    assert found.left == {"I8": "I8 is no number to compare"}
    assert {t.name: t.same for t in found.tensors} == {"F16": False, "F64": True, "F32": True, "BF16": False}
    cut = (short.astype(np.uint32) << 16).view(np.float32)
    assert by_name(found)["BF16"].errors.max_error == np.abs(data - cut).max()


def test_what_nothing_decodes_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors: Tensors = {"a": ("Q1_0", random_blocks("Q1_0", 2, 256)), "b": ("IQ2_S", random_blocks("IQ2_S", 2, 256))}
    made = write_gguf(tmp_path / "made.gguf", tensors)
    source = write_gguf(tmp_path / "source.gguf", {n: ("F32", np.ones((2, 256), np.float32)) for n in "ab"})
    found = shardq.score(made, source)
    assert found.left == {"a": "nothing here decodes Q1_0, neither shardq nor the package gguf"}
    assert shardq.score(source, made).left == found.left
    monkeypatch.setitem(sys.modules, "gguf", None)
    without = shardq.score(made, source)
    assert without.tensors == ()
    assert without.left["b"] == "IQ2_S is decoded by the package gguf, which is not there: install shardq[gguf]"


def test_the_last_digit_of_a_vector_is_no_change(tmp_path: Path) -> None:
    ones = np.ones((1, 64), np.float32)
    digit, trained, broken = ones.copy(), ones.copy(), ones.copy()
    digit[0, :] = np.nextafter(np.float32(1), np.float32(2))
    trained[0, 5] = 1 + 2**-8
    broken[0, 5] = np.nan
    made = {"digit": digit, "trained": trained, "broken": broken}
    score = shardq.score(
        write_gguf(tmp_path / "made.gguf", {name: ("F32", data) for name, data in made.items()}),
        write_gguf(tmp_path / "source.gguf", dict.fromkeys(made, ("F32", ones))),
    )
    assert score.moved == ("trained", "broken")
    assert not any(t.same for t in score.tensors)


def test_names_of_others_are_shown_on_one_line(tmp_path: Path) -> None:
    name = "blk.0.\x1b[2J\nattn_v"
    data = np.ones((2, 32), np.float32)
    made = write_gguf(tmp_path / "made.gguf", {name: ("F32", data), f"{name}2": ("F32", data)})
    source = write_gguf(tmp_path / "source.gguf", {name: ("F32", data * 2), f"{name}3": ("F32", data)})
    done = CliRunner().invoke(commands, ["score", str(made), "--source", str(source)])
    assert done.exit_code == 0
    assert "\x1b" not in done.stdout
    assert "\nattn_v" not in done.stdout
    assert done.stdout.count("attn_v") == 3
