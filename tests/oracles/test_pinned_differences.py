"""Where auto-round 0.16.1 writes, with exit code 0, what no loader can use, and what we do instead. Needs no peer."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shardq import Limits, make_recipe, quantize, verify
from shardq.errors import BadGroupSize, LayoutRefuses, NonFiniteWeight, OutputOccupied
from shardq.kernels import load

WriteCheckpoint = Callable[[Path, Mapping[str, Any], Mapping[str, torch.Tensor]], Path]
MakeSource = Callable[..., Path]
CONFIG: Final = {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 300, "hidden_size": 128}
ODD: Final = "model.layers.0.mlp.down_proj"
ONE: Final = Limits(parallel=1)
each_layout: Final = pytest.mark.parametrize("layout", ["auto_round", "gptq"])  # those with auto-round's arithmetic


@pytest.fixture
def make_source(tmp_path: Path, write_checkpoint: WriteCheckpoint) -> MakeSource:
    """A function that writes a checkpoint with one matrix of the given kind, ODD, among ordinary ones."""

    def make(rows: int = 64, columns: int = 128, weight: torch.Tensor | None = None) -> Path:
        rng = torch.Generator().manual_seed(7)
        shapes = {"model.embed_tokens": (300, 128), "model.layers.0.self_attn.q_proj": (64, 128), ODD: (rows, columns),
                  "model.layers.0.self_attn.o_proj": (64, 128)}  # fmt: skip
        tensors = {f"{n}.weight": torch.randn(s, generator=rng).bfloat16() for n, s in shapes.items()}
        if weight is not None:
            tensors[f"{ODD}.weight"] = weight
        return write_checkpoint(
            tmp_path / "source", CONFIG, tensors | {"model.norm.weight": torch.ones(128).bfloat16()}
        )

    return make


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def check_sound(out: Path, source: Path) -> None:
    found = verify(out, deep=True, source=source)
    assert found.problems == ()
    assert found.compared == found.tensors


# --- columns that the group size does not divide: auto-round pads qweight, loaders size it from in_features ----------


@each_layout
@pytest.mark.parametrize("columns", [192, 64])
def test_ragged_columns_are_refused(columns: int, layout: str, make_source: MakeSource, tmp_path: Path) -> None:
    with pytest.raises(BadGroupSize, match=rf"group size 128 .* {ODD}\.weight \[64, {columns}\]"):
        quantize(make_source(columns=columns), make_recipe("W4A16", layout=layout), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@each_layout
def test_ragged_columns_can_be_kept(layout: str, make_source: MakeSource, tmp_path: Path) -> None:
    source, out = make_source(columns=192), tmp_path / "out"
    quantize(source, make_recipe("W4A16", layout=layout, ragged="keep"), output_dir=out, limits=ONE)
    assert tensors_of(out)[f"{ODD}.weight"].dtype == torch.bfloat16
    assert "model.layers.0.self_attn.q_proj.qweight" in tensors_of(out)
    check_sound(out, source)


@each_layout
@pytest.mark.parametrize(("columns", "group"), [(192, 64), (64, 64), (160, 32)])
def test_ragged_columns_can_have_a_smaller_group(
    columns: int, group: int, layout: str, make_source: MakeSource, tmp_path: Path
) -> None:
    source, out = make_source(columns=columns), tmp_path / "out"
    quantize(source, make_recipe("W4A16", layout=layout, ragged="shrink"), output_dir=out, limits=ONE)
    tensors = tensors_of(out)
    assert tensors[f"{ODD}.qweight"].shape == (columns * 4 // 32, 64)  # in_features, not rounded up to a group
    assert tensors[f"{ODD}.scales"].shape == (columns // group, 64)
    assert tensors["model.layers.0.self_attn.q_proj.scales"].shape == (1, 64)
    check_sound(out, source)


# --- rows that do not fill words of zero points: auto-round pads qzeros, loaders expect out // 32 * bits -------------


@each_layout
@pytest.mark.parametrize("rows", [100, 36])
def test_rows_that_are_no_multiple_of_32_are_refused_or_kept(
    rows: int, layout: str, make_source: MakeSource, tmp_path: Path
) -> None:
    source, out = make_source(rows=rows), tmp_path / "out"
    with pytest.raises(LayoutRefuses, match=rf"multiples of 32.*{ODD}\.weight \[{rows}, 128\]"):
        quantize(source, make_recipe("W4A16", layout=layout), output_dir=out)
    quantize(source, make_recipe("W4A16", layout=layout, ragged="keep"), output_dir=out, limits=ONE)
    assert f"{ODD}.weight" in tensors_of(out)
    check_sound(out, source)


# --- numbers: auto-round writes NaN scales for NaN, and infinite ones for infinity and what overflows fp16 -----------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "holds nan at row 41, column 77"),
        (float("-inf"), "holds -inf at row 41, column 77"),
        (1e7, r"holds 1e\+07 in row 41, whose scale overflows fp16"),
    ],
)
def test_weights_that_cannot_be_quantized_stop_the_run(
    value: float, said: str, symmetric: bool, make_source: MakeSource, tmp_path: Path
) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    weight[41, 77] = value
    recipe = make_recipe("W4A16", symmetric=symmetric)
    with pytest.raises(NonFiniteWeight, match=rf"{ODD}\.weight in model-00002-of-00002\.safetensors {said}"):
        quantize(make_source(weight=weight), recipe, output_dir=tmp_path / "out", limits=ONE)
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_zero_point_that_is_stored_is_the_one_that_the_codes_were_made_with() -> None:
    """A scale among fp16's subnormals may be rounded so far down that the zero point of an all-negative group is 256.

    auto-round stores 255 and makes the codes with 256: every weight of the group decodes one step too high."""
    unit = np.float32(2.0**-24)  # smallest fp16 number; the scale becomes 170 of them
    weights = -unit * np.float32(170.45) * np.arange(0, 256, dtype=np.float32)[None, :]
    codes, scales, zeros = np.empty((1, 256), np.uint8), np.empty((1, 1), np.float32), np.empty((1, 1), np.uint8)
    assert load().rtn_int(weights, "F32", 8, 256, False, codes, scales, zeros) == 0
    assert scales[0, 0] == 170 * unit
    assert np.rint(-weights.min() / scales[0, 0]) == 256
    assert zeros[0, 0] == 255
    error = np.abs(scales * (codes.astype(np.float32) - zeros) - weights) / scales
    assert error.max() < 0.7  # and not 1.5; the smallest weight has no code of its own
    assert error[0, :200].max() <= 0.5


# --- group sizes -1 and 0: auto-round warns for every layer, quantizes none, and calls the copy quantized ------------


@each_layout
def test_group_size_minus_one_is_one_group_per_row(layout: str, make_source: MakeSource, tmp_path: Path) -> None:
    source, out = make_source(columns=192), tmp_path / "out"
    quantize(source, make_recipe("W4A16", layout=layout, group_size=-1), output_dir=out, limits=ONE)
    assert tensors_of(out)[f"{ODD}.scales"].shape == (1, 64)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["group_size"] == -1
    check_sound(out, source)


@pytest.mark.parametrize("size", [0, -2])
def test_impossible_group_sizes_are_refused(size: int) -> None:
    with pytest.raises(BadGroupSize, match=f"group size {size} is impossible"):
        make_recipe("W4A16", group_size=size)


# --- files ---------------------------------------------------------------------------------------------------------


def test_the_index_of_a_single_shard_names_what_is_there(make_source: MakeSource, tmp_path: Path) -> None:
    """auto-round renames the shard to model.safetensors and copies the source's index beside it."""
    source, out = make_source(), tmp_path / "out"
    name = "model-00001-of-00001.safetensors"
    whole = tensors_of(source)
    for path in source.glob("model*"):
        path.unlink()
    save_file(whole, source / name)
    index = {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(whole, name)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    quantize(source, "W4A16", output_dir=out, limits=ONE)
    written = json.loads((out / "model.safetensors.index.json").read_text())
    assert written["weight_map"] == dict.fromkeys(tensors_of(out), name)
    assert written["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(out).values())
    check_sound(out, source)


def test_the_source_is_not_overwritten(make_source: MakeSource) -> None:
    source = make_source()
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(OutputOccupied):
        quantize(source, "W4A16", output_dir=source, limits=ONE)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
