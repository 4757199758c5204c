"""Planned headers against safetensors' own writer, byte for byte."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from shardq.errors import LayoutRefuses
from shardq.files.safetensors import TensorSpec, parse_header, plan_file, tensor_bytes
from shardq.formats import STORAGE

TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F4": torch.float4_e2m1fn_x2,
}

# "\x7f", line separators, quotes, control characters and other planes are where JSON writers differ
NAMES = st.text(
    st.one_of(st.sampled_from('\x00\x07\b\t\n\f\r"\\/\x7f\u2028\u2029é中😀'), st.characters(codec="utf-8")),
    max_size=8,
)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
SPECS = st.lists(
    st.builds(TensorSpec, NAMES, st.sampled_from(sorted(TORCH)), SHAPES),
    max_size=8,
    unique_by=lambda s: s.name,
).filter(lambda specs: all(s.name != "__metadata__" for s in specs))


def random_tensor(spec: TensorSpec, seed: int) -> torch.Tensor:
    out = torch.empty(spec.shape, dtype=TORCH[spec.dtype])
    top = 2 if spec.dtype == "BOOL" else 256
    count = out.numel() * out.element_size()
    if count:
        raw = np.random.default_rng(seed).integers(0, top, count, dtype=np.uint8)
        out.reshape(-1).view(torch.uint8).copy_(torch.from_numpy(raw))
    return out


def written_by_plan(
    specs: Sequence[TensorSpec], tensors: Sequence[torch.Tensor], metadata: dict[str, str] | None
) -> bytes:
    # an x2 element of torch is two logical elements of the file
    logical = [TensorSpec(s.name, s.dtype, (*s.shape[:-1], s.shape[-1] * 2)) if s.dtype == "F4" else s for s in specs]
    plan = plan_file(logical, metadata)
    out = bytearray(plan.size_bytes)
    out[: len(plan.header)] = plan.header
    for spec, tensor in zip(specs, tensors, strict=True):
        begin, end = plan.offsets[spec.name]
        if tensor.numel():
            out[begin:end] = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert end - begin == tensor.numel() * tensor.element_size()
    return bytes(out)


@given(SPECS, st.sampled_from([None, {"format": "pt"}, {'a"b': "\u2028\x01"}]))
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_planned_file_equals_the_reference_writers(
    tmp_path: Path, specs: list[TensorSpec], metadata: dict[str, str] | None
) -> None:
    specs = [s if s.shape or s.dtype != "F4" else TensorSpec(s.name, "U8", ()) for s in specs]
    tensors = [random_tensor(s, i) for i, s in enumerate(specs)]
    path = tmp_path / "reference.safetensors"
    save_file({s.name: t for s, t in zip(specs, tensors, strict=True)}, path, metadata=metadata)
    ours = written_by_plan(specs, tensors, metadata)
    assert ours == path.read_bytes()
    header = parse_header(ours, len(ours), "ours")
    assert {t.name for t in header.tensors} == {s.name for s in specs}
    assert header.metadata == (metadata or {})


def test_plan_does_not_depend_on_the_order_given() -> None:
    specs = [
        TensorSpec("b", "U8", (3,)),
        TensorSpec("a", "F32", (1,)),
        TensorSpec("B", "F32", (1,)),
    ]
    plan = plan_file(specs)
    assert plan == plan_file(specs[::-1])
    begin = len(plan.header)
    assert list(plan.offsets.items()) == [
        ("B", (begin, begin + 4)),
        ("a", (begin + 4, begin + 8)),
        ("b", (begin + 8, begin + 11)),
    ]
    assert plan.size_bytes == begin + 11
    assert begin % 8 == 0


def test_every_dtype_of_the_format_is_covered() -> None:
    untested = set(STORAGE) - set(TORCH)
    assert untested == {"F6_E2M3", "F6_E3M2"}  # torch cannot make them
    assert tensor_bytes("F6_E2M3", (4, 3)) == 9


@pytest.mark.parametrize(
    "specs",
    [
        [TensorSpec("a", "U8", (1,)), TensorSpec("a", "U8", (1,))],
        [TensorSpec("__metadata__", "U8", (1,))],
        [TensorSpec("\ud800", "U8", (1,))],
        [TensorSpec("a", "U8", (-1,))],
        [TensorSpec("a", "F4", (3,))],
        [TensorSpec("a", "F64", (1 << 60,))],
    ],
)
def test_impossible_spec_is_a_programming_error(specs: list[TensorSpec]) -> None:
    with pytest.raises(ValueError, match=r"tensor name|negative|whole byte|overflows"):
        plan_file(specs)


def test_header_over_the_limit_is_refused() -> None:
    with pytest.raises(LayoutRefuses, match="smaller shards"):
        plan_file([TensorSpec("x" * 100_000_001, "U8", (1,))])
