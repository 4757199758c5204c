"""The mlx layout: what it holds, what it says of it, where it puts experts, and what is quantized by default."""

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardq.arena import Arena, reserve
from shardq.errors import LayoutRefuses
from shardq.figures import FIGURES
from shardq.kernels import KernelSet
from shardq.layouts import find_layout
from shardq.layouts.base import ModuleChoice, Place
from shardq.layouts.mlx_families import FAMILIES
from shardq.quantizers.buffers import buffer_shapes, take_buffers
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.rtn import measure_rows, quantize_rows
from shardq.schemes import WHOLE_ROW, Scheme

Pack = Callable[..., dict[str, NDArray[Any]]]
MLX: Final = find_layout("mlx")
AFFINE: Final = [MLX.settle(Scheme(f"int{b}", g, symmetric=True)) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]
MXFP4: Final = MLX.settle(Scheme("e2m1", 32, symmetric=True, scale="e8m0", exponent="even", activation="mxfp4"))
MXFP8: Final = MLX.settle(Scheme("e4m3fn", 32, symmetric=True, scale="e8m0", exponent="even"))
NVFP4: Final = MLX.settle(Scheme("e2m1", 16, symmetric=True, scale="e4m3fn", reach="fused"))
SCHEMES: Final = [*AFFINE, MXFP4, MXFP8, NVFP4]
STEP: Final = {"e2m1": 1 / 3, "e4m3fn": 1 / 16}  # widest gap between values, over their magnitude


def quantize(
    weights: NDArray[Any], dtype: str, scheme: Scheme, kernels: KernelSet
) -> tuple[Quantized, NDArray[np.float64], int]:
    arena = Arena()
    arena.reset(reserve(*buffer_shapes(*weights.shape, scheme)))
    stats = np.empty((len(weights), FIGURES))
    q, bad = quantize_rows(weights, dtype, scheme, take_buffers(arena, *weights.shape, scheme), stats, kernels)
    biases = None if q.biases is None else q.biases.copy()
    return Quantized(q.codes.copy(), q.scales.copy(), None, biases), stats, bad


def decoded(q: Quantized, scheme: Scheme, kernels: KernelSet) -> NDArray[np.float32]:
    out = np.empty(q.codes.shape, np.float32)
    if q.biases is None:
        kernels.decode_scaled(q.codes, scheme.element, q.scales, scheme.group_size, out)
    else:
        kernels.decode_affine(q.codes, q.scales, q.biases, scheme.group_size, "bias", out)
    return out


def random_weights(seed: int, rows: int, columns: int, dtype: str) -> NDArray[Any]:
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    if dtype == "F32":
        return values
    return values.astype(np.float16).view(np.uint16) if dtype == "F16" else (values.view(np.uint32) >> 16).astype("u2")


# --- numbers and bytes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_what_is_packed_reads_back_and_is_near_the_weights(
    scheme: Scheme, dtype: str, kernels: KernelSet, pack_whole: Pack
) -> None:
    weights, wide = random_weights(scheme.bits, 40, 384, dtype), np.empty((40, 384), np.float32)
    kernels.widen(weights, dtype, wide)
    q, stats, bad = quantize(weights, dtype, scheme, kernels)
    assert bad == 0
    one = pack_whole(MLX, scheme, q, dtype=dtype, rubbish=0)
    other = pack_whole(MLX, scheme, q, dtype=dtype, rubbish=0xFF, tile=7, slab=21)
    assert [s.suffix for s in MLX.outputs(scheme, dtype, 40, 384)] == list(one)
    assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in other.items()}
    back = MLX.unpack(one, scheme, kernels)
    assert np.array_equal(back.codes, q.codes)
    assert np.array_equal(back.scales, q.scales)
    assert (back.biases is None) == (q.biases is None) == (not scheme.format.is_integer)
    assert q.biases is None or np.array_equal(back.biases, q.biases)
    again = np.empty_like(stats)
    measure_rows(weights, dtype, scheme, back, again, kernels)
    assert np.array_equal(again, stats)
    error = np.abs(decoded(back, scheme, kernels) - wide)
    assert np.array_equal(error.max(axis=1), stats[:, 2])
    steps = np.repeat(np.abs(q.scales), scheme.group_size, axis=1)
    if scheme.format.is_integer:  # the edge may take a whole step of its own; bf16 scales drift over 2^bits codes
        assert (error <= steps * (1.01 + 2.0 ** (scheme.bits - 8))).all()
    else:
        assert (error <= np.maximum(STEP[scheme.element] * np.abs(wide), steps)).all()


def test_the_exponent_is_the_smallest_under_which_nothing_saturates(kernels: KernelSet) -> None:
    weights = np.zeros((1, 128), np.float32)
    weights[0, [0, 32, 64]] = 6.0, 6.03125, 5.96875
    q, _, _ = quantize(weights, "F32", MXFP4, kernels)
    assert q.scales.tolist() == [[1.0, 2.0, 1.0, 1.0]]  # a group of zeros has 1
    assert q.codes[0, [0, 32, 64]].tolist() == [7, 5, 7]


@pytest.mark.parametrize("scheme", [MXFP4, NVFP4], ids=lambda s: s.name)
@given(scale=st.sampled_from([1.0, 0.5, 4.0]), sign=st.sampled_from([1, -1]), offset=st.sampled_from([-1, 0, 1]))
def test_of_two_equally_near_values_the_smaller_magnitude_is_taken(
    scheme: Scheme, scale: float, sign: int, offset: int, kernels: KernelSet
) -> None:
    """As mlx does on a CPU: the first of the nearest values; a unit of fp32 beside the middle decides as usual."""
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    middles = (grid[1:] + grid[:-1]) / 2
    moved = (middles.view(np.uint32) + np.uint32(offset & 0xFFFFFFFF)).view(np.float32) if offset else middles
    weights = np.zeros((1, 32), np.float32)
    weights[0, : len(moved)], weights[0, 8], weights[0, 16] = moved * sign, 6, 6
    q, _, _ = quantize(weights * np.float32(scale), "F32", scheme, kernels)
    expected = np.arange(7) + (1 if offset > 0 else 0)
    expected = np.where((expected > 0) & (sign < 0), expected | 8, expected)
    assert q.codes[0, :7].tolist() == expected.tolist()


def test_a_group_beneath_the_smallest_nvfp4_scale_is_zero(kernels: KernelSet) -> None:
    weights = np.full((1, 32), 6 * 2.0**-10, np.float32)  # the middle between no scale and the smallest: even is none
    weights[0, 16:] = 6 * 2.0**-9
    q, _, bad = quantize(weights, "F32", NVFP4, kernels)
    assert bad == 0
    assert q.scales.tolist() == [[0.0, 2.0**-9]]
    assert set(q.codes[0, :16]) == {0}


@pytest.mark.parametrize("scheme", [AFFINE[1], MXFP4, MXFP8, NVFP4], ids=lambda s: s.name)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_counted(scheme: Scheme, value: float, kernels: KernelSet) -> None:
    weights = np.ones((4, 128), np.float32)
    weights[2, 5] = value
    assert quantize(weights, "F32", scheme, kernels)[2] == 1


def test_a_range_beyond_the_scale_format_is_counted(kernels: KernelSet) -> None:
    weights = np.zeros((2, 64), np.float32)
    weights[0, :2] = 3e38, -3e38
    assert quantize(weights, "F32", MLX.settle(Scheme("int2", 64, symmetric=True)), kernels)[2] == 1


# --- what it holds -----------------------------------------------------------------------------------------------


def test_integers_become_affine_and_floats_a_mode_of_mlx() -> None:
    for symmetric in (True, False):
        settled = MLX.settle(Scheme("int4", 64, symmetric))
        assert (settled.symmetric, settled.numbers, settled.scale) == (False, "mlx", "weight")
    assert (MXFP4.exponent, MXFP4.activation) == (MXFP8.exponent, MXFP8.activation) == ("ceil", "")
    assert (NVFP4.reach, NVFP4.numbers) == ("group", "mlx")
    for scheme in SCHEMES:
        assert MLX.settle(scheme) == scheme
        assert MLX.refuse(scheme, scheme, 100, 384) is None


@pytest.mark.parametrize(
    ("scheme", "word"),
    [
        (Scheme("int7", 64, symmetric=True), "7"),
        (Scheme("int4", WHOLE_ROW, symmetric=True), "whole rows"),
        (Scheme("int4", 16, symmetric=True), "16"),
        (Scheme("int8", WHOLE_ROW, symmetric=True, activation="int8"), "W8A8"),
        (Scheme("e4m3fn", WHOLE_ROW, symmetric=True, scale="weight"), "FP8"),
        (Scheme("e4m3fn", 128, symmetric=True, scale="weight", group_rows=128), "FP8"),
        (Scheme("e2m3", 32, symmetric=True, scale="e8m0", exponent="even"), "MXFP6"),
    ],
)
def test_refusals(scheme: Scheme, word: str) -> None:
    settled = MLX.settle(scheme)
    refusal = MLX.refuse(settled, settled, 256, 256)
    assert refusal is not None
    assert not refusal.ragged
    assert word in refusal.reason


# --- configuration -----------------------------------------------------------------------------------------------

NAMES: Final = ["model.layers.0.self_attn.q_proj", "lm_head", "model.embed_tokens", "model.language_model.layers.1.a"]


@given(data=st.data(), default=st.sampled_from(SCHEMES))
def test_mlx_lm_believes_of_every_module_what_was_decided(data: st.DataObject, default: Scheme) -> None:
    wanted = st.sampled_from([None, default, *SCHEMES])
    choices = [ModuleChoice(n, "linear", data.draw(wanted)) for n in NAMES]
    for projection in ("gate_proj", "up_proj", "down_proj"):
        scheme = data.draw(wanted)
        choices += [ModuleChoice(f"model.layers.2.mlp.experts.{e}.{projection}", "linear", scheme) for e in range(11)]
    block = json.loads(json.dumps(MLX.config_block(default, choices, "0.0"), allow_nan=False))
    assert {c.module: MLX.scheme_of(block, c.module) for c in choices} == {c.module: c.scheme for c in choices}
    assert not any(".experts.1" in key for key in block), "experts are one module to mlx-lm"


def test_an_exception_stands_under_each_name_that_mlx_lm_may_use() -> None:
    choices = [ModuleChoice("model.language_model.layers.1.mlp.up_proj", "linear", MXFP8)]
    block = MLX.config_block(AFFINE[1], choices, "0.0")
    assert block["language_model.model.layers.1.mlp.up_proj"] == {"group_size": 32, "bits": 8, "mode": "mxfp8"}


# --- stacks ------------------------------------------------------------------------------------------------------


def experts(form: str, count: int, projections: tuple[str, ...]) -> list[str]:
    return [form.format(e, p) for e in range(count) for p in projections]


PROJECTIONS: Final = ("gate_proj", "up_proj", "down_proj")
W: Final = ("w1", "w2", "w3")


@pytest.mark.parametrize(
    ("model_type", "layer", "container", "projections", "last", "stack"),
    [
        ("qwen3_moe", "model.layers.3", "mlp", PROJECTIONS, "up_proj", "mlp.switch_mlp.up_proj"),
        ("kimi_k25", "language_model.model.layers.1", "mlp", PROJECTIONS, "gate_proj", "mlp.switch_mlp.gate_proj"),
        ("dots1", "model.layers.3", "mlp", PROJECTIONS, "down_proj", "mlp.experts.down_proj"),
        ("mixtral", "model.layers.0", "block_sparse_moe", W, "w1", "block_sparse_moe.switch_mlp.gate_proj"),
        ("mixtral", "model.layers.0", "block_sparse_moe", W, "w2", "block_sparse_moe.switch_mlp.down_proj"),
        ("kimi_linear", "model.layers.1", "block_sparse_moe", W, "w3", "mlp.switch_mlp.up_proj"),
        ("lfm2_moe", "model.layers.4", "feed_forward", W, "w3", "feed_forward.switch_mlp.up_proj"),
        ("jamba", "model.layers.4", "feed_forward", PROJECTIONS, "up_proj", "feed_forward.switch_mlp.up_proj"),
        ("nemotron_h", "backbone.layers.1", "mixer", ("up_proj", "down_proj"), "up_proj", "mixer.switch_mlp.fc1"),
    ],
)
def test_experts_go_where_mlx_lm_looks(
    model_type: str, layer: str, container: str, projections: tuple[str, ...], last: str, stack: str
) -> None:
    form = f"{layer}.{container}.experts.{{}}.{{}}"
    modules = [*experts(form, 12, projections), "model.layers.0.self_attn.q_proj"]
    places = MLX.places(modules, {"model_type": model_type, "num_experts": 12})
    assert places.keys() == set(modules[:-1])
    assert places[form.format(11, last)] == Place(f"{layer}.{stack}", 11, 12)


QWEN: Final = "model.layers.3.mlp.experts.{}.{}"


@pytest.mark.parametrize(
    ("config", "modules", "words"),
    [
        (None, [], "model type None"),
        ({"model_type": "brand_new"}, [], "'brand_new'"),
        ({"model_type": "qwen3_next"}, [], "norms"),
        ({"model_type": "falcon_h1"}, [], "multiplies"),
        ({"model_type": "llama"}, experts(QWEN, 2, PROJECTIONS), "unknown"),
        ({"model_type": "qwen3_moe"}, experts("model.layers.3.moe.experts.{}.{}", 2, PROJECTIONS), "unknown"),
        ({"model_type": "qwen3_moe"}, experts(QWEN, 4, PROJECTIONS)[3:], "all 4 experts"),
        ({"model_type": "qwen3_moe", "num_experts": 8}, experts(QWEN, 4, PROJECTIONS), "all 8 experts"),
        ({"model_type": "kimi_k25", "text_config": {"n_routed_experts": 8}}, experts(QWEN, 4, PROJECTIONS), "all 8"),
        ({"model_type": "qwen3_moe"}, experts(QWEN, 4, PROJECTIONS[:2]), "down_proj beside it"),
        ({"model_type": "deepseek_v3"}, ["model.layers.0.self_attn.kv_b_proj"], "--ignore 're:.*\\.kv_b_proj$'"),
        ({"model_type": "bailing_moe", "norm_head": True}, ["lm_head"], "normalizes"),
        ({"model_type": "minicpm"}, ["model.embed_tokens"], "head"),
    ],
)
def test_what_mlx_lm_would_not_load_is_refused(
    config: Mapping[str, Any] | None, modules: list[str], words: str
) -> None:
    with pytest.raises(LayoutRefuses) as caught:
        MLX.places(modules, config)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_condition_of_the_config_lets_a_module_through() -> None:
    assert MLX.places(["lm_head"], {"model_type": "bailing_moe", "norm_head": False}) == {}


def test_every_model_type_belongs_to_one_family() -> None:
    types = [t for f in FAMILIES for t in f.model_types]
    assert len(types) == len(set(types))
