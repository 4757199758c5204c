"""Experts of gpt-oss, whose rows of gate and up take turns: layouts that GPTQModel reads have the halves that it makes
of them, all others every other row."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import encoded_sources as sources
import numpy as np
import pytest

import shardq
from shardq import Limits, make_recipe
from shardq.errors import BadOption, BadTuned, UnsupportedSource
from shardq.recipe import convert_recipe, dequantize_recipe
from shardq.tuned import TunedCodes

ONE = Limits(parallel=1)
EXPERT = "model.layers.0.mlp.experts.1"
HALVED, TURNED = "W4A16@gptq", "W4A16@auto_round"  # with the same numbers
NATIVE = ("gpt_oss", "gpt_oss_bf16")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Outputs by source and scheme, and sources under ""."""
    folder, found = tmp_path_factory.mktemp("halves"), {}
    for case in NATIVE:
        found[case, ""] = sources.write_source(sources.CASES[case], folder / case)
        for scheme in (HALVED, TURNED, "W4A16@compressed-tensors"):
            out = folder / f"{case}-{scheme}"
            recipe = make_recipe(scheme, group_size=32)
            found[case, scheme] = Path(shardq.quantize(found[case, ""], recipe, output_dir=out, limits=ONE).output)
    return found


def _rows(folder: Path, part: str) -> tuple[np.ndarray[Any, Any], ...]:
    """Scales or biases of gate_proj and of up_proj, rows along the last axis."""
    held = sources.read_tensors(folder)
    return tuple(held[f"{EXPERT}.{p}.{part}"].data for p in ("gate_proj", "up_proj"))


@pytest.mark.parametrize("part", ["scales", "qweight", "bias"])
@pytest.mark.parametrize("case", NATIVE)
def test_gate_is_the_first_half_of_the_rows_as_they_lie(
    case: str, part: str, made: dict[tuple[str, str], Path]
) -> None:
    turns = _rows(made[case, TURNED], part)
    lying = np.stack(turns, -1).reshape(*turns[0].shape[:-1], -1)  # as the stack has them
    assert np.array_equal(np.concatenate(_rows(made[case, HALVED], part), -1), lying)
    assert not np.array_equal(_rows(made[case, HALVED], part)[0], turns[0])


@pytest.mark.parametrize("case", NATIVE)
def test_its_source_proves_each_row(case: str, made: dict[tuple[str, str], Path]) -> None:
    result, source = made[case, HALVED], made[case, ""]
    assert shardq.verify(result, deep=True, source=source).problems == ()
    assert shardq.audit(result, source=source).problems == ()
    scored = shardq.score(result, source)
    experts = [t for t in scored.quantized if t.name.startswith(EXPERT)]
    assert len(experts) == 3
    assert all(t.errors.relative < 0.2 for t in experts)  # of other rows: 1.4


def test_layouts_with_the_same_rows_take_each_others_codes(tmp_path: Path, made: dict[tuple[str, str], Path]) -> None:
    there, back = tmp_path / "awq", tmp_path / "gptq"
    first = made["gpt_oss", HALVED]
    shardq.quantize(first, convert_recipe("awq"), output_dir=there, limits=ONE)
    shardq.quantize(there, convert_recipe("gptq", symmetric=True), output_dir=back, limits=ONE)
    assert all(np.array_equal(a, b) for a, b in zip(_rows(back, "qweight"), _rows(first, "qweight"), strict=True))


@pytest.mark.parametrize(
    ("scheme", "recipe"),
    [
        (HALVED, convert_recipe("compressed-tensors")),
        (HALVED, dequantize_recipe()),
        (TURNED, convert_recipe("gptq")),
        ("W4A16@compressed-tensors", make_recipe("W8A16@gptq", group_size=32)),
    ],
)
def test_rows_are_not_mixed_up_on_the_way(
    scheme: str, recipe: Any, tmp_path: Path, made: dict[tuple[str, str], Path]
) -> None:
    """Neither are those of two matrices read for one."""
    with pytest.raises(UnsupportedSource, match=r"experts\.\d\.(gate|up)_proj is .* rows of gate and up"):
        shardq.quantize(made["gpt_oss", scheme], recipe, output_dir=tmp_path / "out", limits=ONE)


def test_tuned_codes_are_taken_for_the_rows_that_they_are_of(made: dict[tuple[str, str], Path]) -> None:
    tuned = TunedCodes("tuned", "", "rtn", {}, {}, {}, layout="auto_round")
    recipe = replace(make_recipe(HALVED, group_size=32), tuned=tuned)
    with pytest.raises(BadTuned, match=r"other rows of .* than layout gptq: tune with --format gptq"):
        shardq.plan(made["gpt_oss", ""], recipe)


def test_one_read_gives_one_kind_of_rows(tmp_path: Path, made: dict[tuple[str, str], Path]) -> None:
    recipes = [make_recipe(s, group_size=32) for s in (HALVED, TURNED)]
    with pytest.raises(BadOption, match="layouts gptq and auto_round give gate_proj and up_proj other rows"):
        shardq.quantize_many(made["gpt_oss", ""], recipes, output_dir=tmp_path / "many", limits=ONE)
