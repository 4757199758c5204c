"""What is no number is named, not passed on; what is odd is exact."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from shardq.dequantize.values import byte_values
from shardq.errors import CorruptShard, NonFiniteWeight
from shardq.kernels import KernelSet

Open = Callable[[bytes], Any]


def make_file(open_bytes: Open, **parts: torch.Tensor) -> Any:
    tensors = {f"a.0.q.{name}": t for name, t in parts.items()}
    return open_bytes(save(tensors, metadata={"config": "{}"}))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_code_that_is_no_number_is_named(code: int, open_bytes: Open, fast: KernelSet) -> None:
    raw = torch.zeros(40, 24, dtype=torch.uint8)
    raw[17, 5] = code
    file = make_file(open_bytes, weight=raw.view(torch.float8_e4m3fn), weight_scale_inv=torch.ones(3, 2))
    ((e,),) = file.find().encoded.values()
    with pytest.raises(
        NonFiniteWeight, match=r"a\.0\.q\.weight in shard decodes to nan at row 17, column 5 \(fp8_block\)"
    ):
        file.decode(e, 16, 20, fast)
    file.decode(e, 18, 40, fast)


@pytest.mark.parametrize(("scale", "word"), [(float("nan"), "nan"), (float("inf"), "inf"), (3e38, "inf")])
def test_a_scale_that_makes_no_number_is_named(scale: float, word: str, open_bytes: Open, fast: KernelSet) -> None:
    scales = torch.ones(3, 2)
    scales[1, 1] = scale
    weight = torch.full((40, 24), 2.0).to(torch.float8_e4m3fn)
    file = make_file(open_bytes, weight=weight, weight_scale_inv=scales)
    ((e,),) = file.find().encoded.values()
    with pytest.raises(NonFiniteWeight, match=f"{word} at row 16, column 16"):
        file.decode(e, 0, 40, fast)


def test_the_largest_exponent_byte_is_no_number(open_bytes: Open, fast: KernelSet) -> None:
    scales = torch.full((40, 1), 254, dtype=torch.uint8)
    codes = torch.full((40, 16), 0x11, dtype=torch.uint8)
    file = make_file(open_bytes, weight_packed=codes, weight_scale=scales)
    ((e,),) = file.find().encoded.values()
    assert (file.decode(e, 0, 40, fast) == 2.0**126).all()
    scales[3] = 255
    file = make_file(open_bytes, weight_packed=codes, weight_scale=scales)
    with pytest.raises(NonFiniteWeight, match="row 3"):
        file.decode(e, 0, 40, fast)


@pytest.mark.parametrize(
    ("element", "dtype"),
    [
        ("e4m3fn", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2), ("e8m0", torch.float8_e8m0fnu),
        ("e4m3fnuz", torch.float8_e4m3fnuz), ("e5m2fnuz", torch.float8_e5m2fnuz),
    ],
)  # fmt: skip
def test_byte_values_are_those_of_torch(element: str, dtype: torch.dtype) -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    found = byte_values(element)
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    known = ~np.isnan(expected)
    assert found[known].tobytes() == expected[known].tobytes()


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
def test_other_floats_of_a_byte(dtype: torch.dtype, open_bytes: Open, fast: KernelSet) -> None:
    g = torch.Generator().manual_seed(1)
    raw = torch.randint(0, 256, (40, 24), generator=g, dtype=torch.uint8)
    raw[~raw.view(dtype).float().isfinite()] = 1
    scales = torch.rand(3, 2, generator=g)
    file = make_file(open_bytes, weight=raw.view(dtype), weight_scale_inv=scales)
    ((e,),) = file.find().encoded.values()
    grid = scales.repeat_interleave(16, 0)[:40].repeat_interleave(16, 1)[:, :24]
    assert file.decode(e, 0, 40, fast).tobytes() == (raw.view(dtype).float() * grid).numpy().tobytes()
    turned = e.turned()
    assert file.decode(turned, 3, 21, fast).tobytes() == (raw.view(dtype).float() * grid).T[3:21].numpy().tobytes()


@pytest.mark.parametrize("group", [-1, 1])
def test_a_column_of_no_group_is_named(group: int, open_bytes: Open, fast: KernelSet) -> None:
    parts = {
        "qweight": torch.zeros(4, 32, dtype=torch.int32),
        "qzeros": torch.zeros(1, 4, dtype=torch.int32),
        "scales": torch.ones(1, 32, dtype=torch.float16),
        "g_idx": torch.full((32,), group, dtype=torch.int32),
    }
    file = make_file(open_bytes, **parts)
    ((e,),) = file.find().encoded.values()
    with pytest.raises(CorruptShard, match=r"a\.0\.q\.weight in shard.*expected 0 to 0"):
        file.decode(e, 0, 32, fast)


def test_gptq_zero_points_wrap_at_their_width(open_bytes: Open, fast: KernelSet) -> None:
    """A stored 15 is 0, as `layouts.qweight` has it. auto-round makes it 16, GPTQModel carries into the next; no valid
    file has it."""
    parts = {
        "qweight": torch.full((4, 32), 0x33333333, dtype=torch.int32),
        "qzeros": torch.full((1, 4), -1, dtype=torch.int32),
        "scales": torch.full((1, 32), 0.5, dtype=torch.float16),
    }
    file = make_file(open_bytes, **parts)
    ((e,),) = file.find().encoded.values()
    assert (file.decode(e, 0, 32, fast) == 0.5 * 3).all()
