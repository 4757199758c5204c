"""Plans of real checkpoints of which only headers or an index are at hand; see tests/data/hub_index/PROVENANCE.md."""

import bisect
import functools
import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import shardq
from shardq.decide import decide
from shardq.errors import SourceUnreadable
from shardq.plans import Plan
from shardq.reports import describe_plan
from shardq.roles import Role

DUMPS = Path(__file__).parents[1] / "data" / "hub_index"
COUNTS = [
    # folder, tensors, weights, quantized modules, whether shapes are known
    ("mistral-7b", 291, 291, 224, True),
    ("wizardlm-2-8x22b", 1739, 1739, 1568, True),
    ("qwen-72b", 643, 643, 400, False),
    ("bloom", 845, 845, 280, False),
    ("flux-1-dev", 1160, 1160, 418, False),
    ("gpt-oss-20b", 459, 4923, 2400, True),
    ("molmo-nf4", 921, 585, 112, False),
    ("mlx-qwen3-14b", 1007, 443, 280, False),
    ("mlx-mistral-small-4", 1483, 615, 360, False),
    ("deepseek-v4-flash", 69_187, 35_020, 33_368, True),
]


@functools.cache
def planned(folder: str) -> Plan:
    """With the scheme that fits them all."""
    return shardq.plan_headers(DUMPS / folder, shardq.make_recipe("W4A16", group_size=32))


@pytest.fixture(params=COUNTS, ids=[row[0] for row in COUNTS])
def known(request: pytest.FixtureRequest) -> tuple[Plan, tuple[int, int, int, bool]]:
    """A plan, and what it must count."""
    folder, *counts = request.param
    return planned(folder), tuple(counts)


def test_known_selections(known: tuple[Plan, tuple[int, int, int, bool]]) -> None:
    plan, (tensors, weights, quantized, shapes) = known
    described = describe_plan(plan)
    assert described["counts"]["quantized_modules"] == quantized
    assert described["counts"]["tensors"] == tensors == len(plan.checkpoint.tensors)
    assert described["counts"]["weights"] == weights == len(described["tensors"])
    assert (described["bytes"]["source"] is not None) == shapes
    assert (described["bytes"]["output"] is not None) == shapes
    assert {t["action"] for t in described["tensors"]} == {"quantize", "copy"}
    assert all(t["rule"] and t["role"] for t in described["tensors"])
    assert {t["scheme"] for t in described["tensors"] if t["action"] == "quantize"} == {"W4A16G32"}


def test_every_tensor_is_accounted_for(known: tuple[Plan, tuple[int, int, int, bool]]) -> None:
    """Each is a weight of its own, or absorbed by some that are there; and nothing else is."""
    plan, _ = known
    source, weights = plan.checkpoint.tensors, plan.weights
    assert source.keys() == (weights.tensors.keys() & source.keys()) | weights.absorbed.keys()
    assert [d.tensor.name for d in plan.decisions] == list(weights.tensors)
    made = {prefix for name in weights.tensors for prefix in prefixes(name)}
    assert all(a.into in made and a.reason for a in weights.absorbed.values())
    if plan.files:
        assert read_bytes(plan) == {t.name: t.size_bytes for t in source.values()}


def read_bytes(plan: Plan) -> dict[str, int]:
    """How many bytes of each source tensor some weight is made of, each counted once."""
    at = sorted((t.shard, t.begin, t.name) for t in plan.checkpoint.tensors.values() if t.size_bytes)
    ranges: dict[str, set[tuple[int, int]]] = {name: set() for name in plan.checkpoint.tensors}
    for t in plan.weights.tensors.values():
        if not t.encoded:
            place = bisect.bisect_right(at, (t.shard, t.begin, chr(0x10FFFF))) - 1
            ranges[at[place][2]].add((t.begin, t.end))
        for e in t.encoded:
            for part, read in e.reads(0, e.rows):
                ranges[part.tensor].update(read)
    return {name: covered(found) for name, found in ranges.items()}


def covered(ranges: set[tuple[int, int]]) -> int:
    total = last = 0
    for begin, end in sorted(ranges):
        total += max(0, end - max(begin, last))
        last = max(last, end)
    return total


def prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(1, len(parts) + 1)]


def test_deepseek_v4_flash() -> None:
    plan = planned("deepseek-v4-flash")
    assert Counter(a.reason for a in plan.weights.absorbed.values()) == {"fp8_v4": 375, "mxfp4_v4": 33_792}
    kinds = Counter(
        (d.tensor.name.split(".")[0], re.sub(r"[.]\d+[.]", ".", d.tensor.name).split(".")[1], d.role.value)
        for d in plan.decisions
        if d.action == "quantize"
    )
    assert kinds == {("layers", "attn", "linear"): 215, ("layers", "ffn", "linear"): 33_024 + 129}
    assert sum(d.role is Role.MTP for d in plan.decisions) == 778


@pytest.mark.parametrize(
    ("folder", "quantized", "absorbed"), [("deepseek-v4-flash", 33_368, 34_167), ("gpt-oss-20b", 96 + 48, 96)]
)
def test_an_index_alone_selects_the_same(folder: str, quantized: int, absorbed: int, tmp_path: Path) -> None:
    shards = json.loads(gzip.decompress((DUMPS / folder / "headers.json.gz").read_bytes()))
    index = {"weight_map": {name: shard for shard, tensors in shards.items() for name in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_bytes((DUMPS / folder / "config.json").read_bytes())
    plan = shardq.plan_headers(tmp_path, "W4A16")
    assert sum(d.action == "quantize" for d in plan.decisions) == quantized
    assert len(plan.weights.absorbed) == absorbed
    assert not plan.files


@pytest.mark.skipif(sys.platform != "linux", reason="reads the figure from /proc")
def test_memory_of_the_largest() -> None:
    """Measured: 260 MB."""
    command = ["plan", "--headers", str(DUMPS / "deepseek-v4-flash"), "--group-size", "32", "--json"]
    code = f"""
from pathlib import Path
from shardq.cli.group import commands
commands({command!r}, standalone_mode=False)
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
"""
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    document, peak_kib = found.stdout.splitlines()
    assert json.loads(document)["counts"]["quantized_modules"] == 33_368
    assert int(peak_kib) * 1024 < 600 * 1000**2


def test_policy_and_prediction_layers_of_deepseek_v4_flash() -> None:
    source = planned("deepseek-v4-flash").checkpoint
    published = decide(source, shardq.make_recipe("W4A16", policy="published", mtp="drop"))
    assert sum(d.action == "quantize" for d in published) == 33_368 - 43  # wo_a
    dropped = {d.tensor.name for d in published if d.action == "drop"}
    assert dropped == {d.tensor.name for d in published if d.tensor.name.startswith("mtp.")}
    everything = decide(source, shardq.make_recipe("W4A16", mtp="quantize"))
    assert Counter(d.action for d in everything)["quantize"] == 33_368 + 778


def test_gpt_oss() -> None:
    plan = planned("gpt-oss-20b")
    described = describe_plan(plan)
    assert described["absorbed"] == {
        "decoded": {"mxfp4_gptoss": 48}, "split": {"gpt_oss": {"stacks": 48, "matrices": 2304}}, "dropped": {},
    }  # fmt: skip
    quantized = [d.tensor for d in plan.decisions if d.action == "quantize"]
    assert Counter(t.name.split(".")[3] for t in quantized) == {"self_attn": 96, "mlp": 2304}
    biases = [d for d in plan.decisions if ".experts." in d.tensor.name and d.tensor.name.endswith(".bias")]
    assert len(biases) == 2304
    assert all(d.action == "copy" and d.tensor.shape == (2880,) for d in biases)
    assert sum(".router." in d.tensor.name and d.action == "copy" for d in plan.decisions) == 48
    blocks = described["source_tensors"]["model.layers.0.mlp.experts.gate_up_proj_blocks"]
    assert blocks == {"outcome": "decoded", "into": "model.layers.0.mlp.experts", "reason": "mxfp4_gptoss"}


def test_molmo_and_mlx_are_known_by_an_index() -> None:
    """Three tensors beside each module of NF4, two beside each of MLX."""
    for folder, kind, count, beside in (
        ("molmo-nf4", "bnb4", 112, 3), ("mlx-qwen3-14b", "mlx", 282, 2), ("mlx-mistral-small-4", "mlx", 434, 2),
    ):  # fmt: skip
        plan = planned(folder)
        assert describe_plan(plan, tensors=False)["absorbed"]["decoded"] == {kind: count}
        assert len(plan.weights.absorbed) == count * beside
        assert set(Counter(a.into for a in plan.weights.absorbed.values()).values()) == {beside}


@pytest.mark.parametrize("folder", ["gpt-oss-20b", "molmo-nf4", "wizardlm-2-8x22b"])
def test_plans_of_equal_input_are_equal(folder: str) -> None:
    recipe = shardq.make_recipe("W4A16", group_size=32)
    one, other = (shardq.plan_headers(DUMPS / folder, recipe) for _ in range(2))
    assert one == other
    assert one.fingerprint == other.fingerprint
    assert describe_plan(one) == describe_plan(other)


def test_a_folder_without_headers_and_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceUnreadable, match=r"neither recorded headers .* nor an index"):
        shardq.plan_headers(tmp_path, "W4A16")


def test_bytes_of_a_real_checkpoint() -> None:
    """Source bytes are the index's total_size as published; 4.5 bits a weight and what is kept make the output."""
    described = describe_plan(shardq.plan_headers(DUMPS / "mistral-7b", shardq.make_recipe("W4A16", group_size=32)))
    assert described["bytes"]["source"] == 14_496_047_104
    weights, kept = described["bytes"]["quantized_source"] // 2, 14_496_047_104 - described["bytes"]["quantized_source"]
    data = weights // 2 + weights // 32 * 2 + weights // 32 // 2 + kept  # codes, fp16 scales, four-bit zero points
    assert 0 <= described["bytes"]["output"] - data < 200_000  # headers
