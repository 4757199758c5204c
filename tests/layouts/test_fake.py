"""The layout `fake` against torch: scale * (code - zero), rounded once to the weight's type."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shardq.arena import Arena, reserve
from shardq.figures import FIGURES
from shardq.kernels import KernelSet
from shardq.layouts import find_layout
from shardq.layouts.base import ModuleChoice
from shardq.quantizers.buffers import buffer_shapes, take_buffers
from shardq.quantizers.decode import decode_rows
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.rtn import measure_rows, quantize_rows
from shardq.schemes import PRESETS, Scheme

Pack = Callable[..., dict[str, NDArray[Any]]]
FAKE: Final = find_layout("fake")
TORCH: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
ROWS, COLUMNS = 130, 256
E2M1: Final = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def make_weight(dtype: str, seed: int) -> torch.Tensor:
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    values[3, :128], values[4] = 0, -0.0
    return values.to(TORCH[dtype])


def raw(weight: torch.Tensor) -> NDArray[Any]:
    return weight.numpy() if weight.dtype == torch.float32 else weight.view(torch.int16).numpy().view(np.uint16)


def quantize(weight: torch.Tensor, dtype: str, scheme: Scheme, kernels: KernelSet) -> Quantized:
    arena = Arena()
    arena.reset(reserve(*buffer_shapes(ROWS, COLUMNS, scheme)))
    buffers = take_buffers(arena, ROWS, COLUMNS, scheme)
    q, bad = quantize_rows(raw(weight), dtype, scheme, buffers, np.empty((ROWS, FIGURES)), kernels)
    assert bad == 0
    return q


def values_by_torch(q: Quantized, scheme: Scheme) -> torch.Tensor:
    codes, scales = torch.from_numpy(q.codes), torch.from_numpy(q.scales)
    if scheme.element == "e2m1":
        elements = E2M1[codes.long()]
    elif scheme.element == "e4m3fn":
        elements = codes.view(torch.float8_e4m3fn).float()
    else:
        half = 1 << (scheme.bits - 1)
        zeros = (
            half
            if q.zeros is None
            else torch.from_numpy(q.zeros).float().repeat_interleave(scheme.group_columns(COLUMNS), 1)
        )
        elements = codes.float() - zeros
    return elements * scales.repeat_interleave(scheme.group_columns(COLUMNS), 1)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("name", ["W2A16", "W4A16", "W4A16_ASYM", "W8A8", "FP8_BLOCK", "FPW8A16", "MXFP4", "MXFP8"])
def test_values_are_rounded_once_and_measured_as_they_are(
    name: str, dtype: str, kernels: KernelSet, pack_whole: Pack
) -> None:
    scheme = FAKE.settle(PRESETS[name].scheme)
    weight = make_weight(dtype, seed=len(name))
    q = quantize(weight, dtype, scheme, kernels)
    packed = pack_whole(FAKE, scheme, q, dtype=dtype, tile=128)
    expected = values_by_torch(q, scheme).to(TORCH[dtype])
    assert list(packed) == ["weight"]
    assert packed["weight"].tobytes() == raw(expected).tobytes()
    read, seen = FAKE.unpack(packed, scheme, kernels), FAKE.unpacks_to(scheme)
    assert np.isfinite(read.scales).all()
    assert read.scales.all()
    assert decode_rows(read, seen, kernels).tobytes() == expected.float().numpy().tobytes()
    stats = np.empty((ROWS, FIGURES))
    measure_rows(raw(weight), dtype, seen, read, stats, kernels)
    assert stats[:, 2].max() == (weight.float() - expected.float()).abs().max().item()


def test_a_value_beyond_the_type_is_its_largest(kernels: KernelSet, pack_whole: Pack) -> None:
    scheme = FAKE.settle(PRESETS["MXFP4"].scheme)
    q = Quantized(np.full((1, 32), 6, np.uint8), np.full((1, 1), 2.0**14, np.float32), None)  # 4 * 2^14
    assert pack_whole(FAKE, scheme, q, dtype="F16")["weight"].tolist() == [[65504.0] * 32]
    assert pack_whole(FAKE, scheme, q, dtype="F32")["weight"].tolist() == [[65536.0] * 32]


def test_decoding_knows_biases_and_global_scales(kernels: KernelSet) -> None:
    codes = np.arange(32, dtype=np.uint8)[None] % 16
    scales, biases = np.full((1, 2), 0.5, np.float32), np.array([[-1, 3]], np.float32)
    scheme = Scheme("int4", 16, symmetric=False)
    affine = decode_rows(Quantized(codes, scales, None, biases), scheme, kernels)
    assert affine.tolist() == (codes * 0.5 + biases.repeat(16, 1)).tolist()
    scheme = Scheme("e2m1", 16, symmetric=True, scale="e4m3fn")
    scaled = decode_rows(Quantized(codes, scales, None, global_scale=4.0), scheme, kernels)
    assert scaled.tolist() == (E2M1[torch.from_numpy(codes).long()] * 0.125).tolist()


def test_no_loader_finds_a_quantization_config() -> None:
    scheme = FAKE.settle(PRESETS["MXFP4"].scheme)
    block = FAKE.config_block(scheme, [ModuleChoice("a.0.b", "linear", scheme)], "1.2.3")
    assert FAKE.config_keys(block) == {"shardq_fake": block}
    assert block == {"method": "fake", "scheme": "MXFP4", "exceptions": {}, "quantizer": "shardq:1.2.3"}
