"""Parts of a GGUF model against the tools of llama.cpp that split: gguf-split and the converter."""

import json
from pathlib import Path

import pytest
from gguf_made import (
    ALL_VALUES,
    MEGABYTES,
    RELAXED,
    SOME_TENSORS,
    SPECS,
    SPLIT_BYTES,
    Pairs,
    Specs,
    written_by_gguf,
    written_by_plan,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shardq.errors import LayoutRefuses
from shardq.files.gguf import ALIGNMENT_KEY, GgufSpec, KeyValue, plan_gguf, spec_bytes
from shardq.files.gguf_split import CONVERTER, GGUF_SPLIT, SplitTool, part_name, plan_parts, split_tensors

GOLDEN = Path(__file__).with_name("golden_gguf")
ABSENT = "gguf is not installed here; `nox -s oracles` installs it"
W = GgufSpec("w", "F32", (1,))


def test_parts_of_the_converter_are_those_of_gguf() -> None:
    plans = plan_parts(ALL_VALUES, SOME_TENSORS, "converter", SPLIT_BYTES, CONVERTER)
    assert sorted(plans) == sorted(p.name for p in GOLDEN.glob("converter-*.gguf"))
    assert len(plans) == 3
    for name, plan in plans.items():
        own = [s for s in SOME_TENSORS if s.name in plan.offsets]
        assert written_by_plan(plan, own) == (GOLDEN / name).read_bytes(), name


GGUF_SPLIT_OPTIONS = {
    "--split-max-size 1M": (10**6, False),
    "--split-max-size 2M --no-tensor-first-split": (2 * 10**6, True),
    "--split-max-size 5M": (5 * 10**6, False),
}


@pytest.mark.parametrize("options", GGUF_SPLIT_OPTIONS)
def test_parts_of_gguf_split_are_its_own(options: str) -> None:
    golden = json.loads((GOLDEN / "gguf_split.json").read_text())
    limit, empty_first = GGUF_SPLIT_OPTIONS[options]
    plans = plan_parts(ALL_VALUES, MEGABYTES, "part", limit, GGUF_SPLIT, empty_first)
    assert {n: {"size_bytes": p.size_bytes, "header": p.header.hex()} for n, p in plans.items()} == golden[options]


@pytest.mark.oracle
@given(SPECS, st.integers(1, 3000), st.booleans())
@settings(RELAXED, max_examples=60)
def test_any_parts_of_the_converter_are_those_of_gguf(
    tmp_path: Path, tensors: Specs, limit: int, empty_first: bool
) -> None:
    package = pytest.importorskip("gguf", reason=ABSENT)
    for old in tmp_path.iterdir():
        old.unlink()
    options = {"split_max_size": limit, "small_first_shard": empty_first}
    written_by_gguf(package, tmp_path / "m.gguf", ALL_VALUES, tensors, **options)
    plans = plan_parts(ALL_VALUES, tensors, "m", limit, CONVERTER, empty_first)
    ours = {n: written_by_plan(p, [s for s in tensors if s.name in p.offsets]) for n, p in plans.items()}
    assert ours == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


@given(SPECS, st.integers(1, 3000), st.sampled_from([CONVERTER, GGUF_SPLIT]), st.booleans())
@settings(RELAXED, max_examples=100)
def test_parts_hold_every_tensor_once_and_are_as_full_as_they_may_be(
    tensors: Specs, limit: int, tool: SplitTool, empty_first: bool
) -> None:
    def size(spec: GgufSpec) -> int:
        return -(-spec_bytes(spec) // 32) * 32 if tool.counts_padding else spec_bytes(spec)

    try:
        parts = split_tensors(tensors, limit, tool, empty_first)
    except LayoutRefuses as error:
        assume("is the first" in str(error))
        assert size(tensors[0]) > limit
        return
    assert [s for part in parts for s in part] == list(tensors)
    assert bool(parts[0]) != (empty_first or not tensors)
    for part, following in zip(parts[empty_first:], parts[empty_first + 1 :], strict=False):
        assert sum(map(size, part)) + size(following[0]) > limit
    assert all(sum(map(size, part)) <= limit or len([s for s in part if size(s)]) == 1 for part in parts)


def test_names_of_parts() -> None:
    assert part_name("org/Model-Q4_K_M", 0, 3) == "org/Model-Q4_K_M-00001-of-00003.gguf"
    single = plan_parts((), [W], "m", 100, CONVERTER)
    assert list(single) == ["m.gguf"]
    assert single["m.gguf"] == plan_gguf((), [W])
    assert list(plan_parts((), [W], "m", 100, GGUF_SPLIT)) == ["m-00001-of-00001.gguf"]


@pytest.mark.parametrize(
    ("pairs", "tensors", "limit", "message"),
    [
        ((), [GgufSpec("a", "F32", (9,))], 32, "'a' is the first and has 64 bytes: gguf-split cannot"),
        ((), [GgufSpec(str(i), "I8", (32,)) for i in range(65536)], 32, "would be 65536 files"),
        ([KeyValue(ALIGNMENT_KEY, "u32", 64)], [W], 100, "parts of a split are read with 32"),
    ],
)
def test_impossible_split_is_refused(pairs: Pairs, tensors: Specs, limit: int, message: str) -> None:
    with pytest.raises(LayoutRefuses, match=message):
        plan_parts(pairs, tensors, "m", limit)


def test_split_keys_are_not_the_callers() -> None:
    with pytest.raises(ValueError, match=r"split\.no is for the split"):
        plan_parts([KeyValue("split.no", "u16", 0)], [W], "m", 100)
    with pytest.raises(ValueError, match="at most 0 bytes"):
        split_tensors([W], 0)
