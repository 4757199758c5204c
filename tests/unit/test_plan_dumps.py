"""Plans of real checkpoints of which only headers or an index are at hand; see tests/data/hub_index/PROVENANCE.md."""

from pathlib import Path

import pytest

import shardq
from shardq.errors import UnsupportedSource
from shardq.reports import describe_plan

DUMPS = Path(__file__).parents[1] / "data" / "hub_index"
COUNTS = [
    # folder, quantized modules, tensors, whether shapes are known
    ("mistral-7b", 224, 291, True),
    ("wizardlm-2-8x22b", 1568, 1739, True),
    ("qwen-72b", 400, 643, False),
    ("bloom", 280, 845, False),
    ("flux-1-dev", 418, 1160, False),
]


@pytest.mark.parametrize(("folder", "quantized", "tensors", "shapes"), COUNTS)
def test_known_selections(folder: str, quantized: int, tensors: int, shapes: bool) -> None:
    recipe = shardq.make_recipe("W4A16", group_size=32)
    described = describe_plan(shardq.plan_headers(DUMPS / folder, recipe))
    assert described["counts"]["quantized_modules"] == quantized
    assert described["counts"]["tensors"] == tensors == len(described["tensors"])
    assert (described["bytes"]["source"] is not None) == shapes
    assert (described["bytes"]["output"] is not None) == shapes
    assert {t["action"] for t in described["tensors"]} == {"quantize", "copy"}
    assert all(t["rule"] and t["role"] for t in described["tensors"])
    assert {t["scheme"] for t in described["tensors"] if t["action"] == "quantize"} == {"W4A16G32"}


def test_bytes_of_a_real_checkpoint() -> None:
    """Source bytes are the index's total_size as published; 4.5 bits a weight and what is kept make the output."""
    described = describe_plan(shardq.plan_headers(DUMPS / "mistral-7b", shardq.make_recipe("W4A16", group_size=32)))
    assert described["bytes"]["source"] == 14_496_047_104
    weights, kept = described["bytes"]["quantized_source"] // 2, 14_496_047_104 - described["bytes"]["quantized_source"]
    data = weights // 2 + weights // 32 * 2 + weights // 32 // 2 + kept  # codes, fp16 scales, four-bit zero points
    assert 0 <= described["bytes"]["output"] - data < 200_000  # headers


def test_quantized_and_stacked_sources_are_refused_for_now() -> None:
    with pytest.raises(UnsupportedSource, match="mxfp4_gptoss"):
        shardq.plan_headers(DUMPS / "gpt-oss-20b", "W4A16")
