"""Every tensor of a quantized checkpoint is understood from headers, or named as a problem."""

import gzip
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from shardq.checkpoint import TensorRef
from shardq.dequantize.finding import find_encoded
from shardq.formats import STORAGE

HUB = Path(__file__).parents[1] / "data" / "hub_index"
Spec = dict[str, tuple[str, tuple[int, ...]]]


def make_refs(spec: Spec, shard: str = "x", at: int = 0) -> list[TensorRef]:
    refs = []
    for name, (dtype, shape) in spec.items():
        size = STORAGE[dtype].bits
        for n in shape:
            size *= n
        refs.append(TensorRef(name, shard, dtype, shape, at, at + size // 8))
        at += size // 8
    return refs


def load_hub(name: str) -> tuple[list[TensorRef], dict[str, Any]]:
    shards = json.loads(gzip.decompress((HUB / name / "headers.json.gz").read_bytes()))
    refs = [r for s, spec in shards.items() for r in make_refs({k: (d, tuple(n)) for k, (d, n) in spec.items()}, s)]
    return refs, json.loads((HUB / name / "config.json").read_text())


def test_deepseek_v4_flash_is_whole() -> None:
    refs, config = load_hub("deepseek-v4-flash")
    began = time.perf_counter()
    found = find_encoded(refs, config)
    assert time.perf_counter() - began < 20  # about one second; the limit is for a loaded machine
    assert (found.problems, found.wanted, found.dropped, found.unmeasured) == ((), (), {}, ())
    kinds = Counter((e.kind, e.element, e.block) for es in found.encoded.values() for e in es)
    assert kinds == {("mxfp4_v4", "e2m1", (1, 32)): 33792, ("fp8_v4", "e4m3fn", (128, 128)): 375}
    marked = {r.name for r in refs if r.dtype in ("F8_E4M3", "I8", "F8_E8M0")}
    assert found.consumed == marked
    size = sum(e.source_bytes for es in found.encoded.values() for e in es)
    assert size == sum(r.size_bytes for r in refs if r.name in marked)


def test_gpt_oss_is_whole() -> None:
    refs, config = load_hub("gpt-oss-20b")
    found = find_encoded(refs, config)
    assert (found.problems, found.wanted, found.dropped) == ((), (), {})
    shapes = Counter((e.kind, e.rows, e.columns, e.dtype) for es in found.encoded.values() for e in es)
    assert shapes == {("mxfp4_gptoss", 5760, 2880, "BF16"): 24 * 32, ("mxfp4_gptoss", 2880, 2880, "BF16"): 24 * 32}
    stack = found.encoded["model.layers.0.mlp.experts.gate_up_proj"]
    assert [e.index for e in stack] == list(range(32))
    blocks = next(r for r in refs if r.name == "model.layers.0.mlp.experts.gate_up_proj_blocks")
    codes = stack[5].part("codes")
    assert codes is not None
    assert codes.reads(0, 5760)[0] == (blocks.begin + 5 * 5760 * 1440, blocks.begin + 6 * 5760 * 1440)


def test_molmo_has_its_companions_in_an_index() -> None:
    index = json.loads(gzip.decompress((HUB / "molmo-nf4" / "model.safetensors.index.json.gz").read_bytes()))
    refs = [TensorRef(name, shard, None, None, -1, -1) for name, shard in index["weight_map"].items()]
    found = find_encoded(refs, json.loads((HUB / "molmo-nf4" / "config.json").read_text()))
    assert (found.problems, found.encoded) == ((), {})
    assert len(found.unmeasured) == 112


@pytest.mark.parametrize("name", ["mistral-7b", "wizardlm-2-8x22b"])
def test_full_precision_has_nothing(name: str) -> None:
    found = find_encoded(*load_hub(name))
    assert (found.encoded, found.consumed, found.dropped, found.problems, found.wanted) == ({}, set(), {}, (), ())


# --- blocks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "grid", "said", "block"),
    [
        ((576, 7168), (5, 56), None, (128, 128)),  # kv_a_proj_with_mqa: rows // scales is 115
        ((192, 200), (2, 2), None, (128, 128)),  # half of 192 would fit, too
        ((300, 300), (3, 3), (100, 100), (100, 100)),
        ((300, 300), (3, 3), None, (128, 128)),
        ((300, 300), (3, 3), (64, 64), (128, 128)),  # the configuration is wrong
        ((480, 96), (5, 3), None, (96, 32)),
        ((40, 24), (1, 1), None, (40, 24)),
        ((40, 24), (40, 1), None, (1, 24)),
        ((700, 24), (7, 1), None, (100, 24)),  # no power of two has seven
    ],
)
def test_blocks_come_from_shapes(
    shape: tuple[int, int], grid: tuple[int, int], said: tuple[int, int] | None, block: tuple[int, int]
) -> None:
    refs = make_refs({"a.0.q.weight": ("F8_E4M3", shape), "a.0.q.weight_scale_inv": ("F32", grid)})
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": said and list(said)}}
    ((e,),) = find_encoded(refs, config).encoded.values()
    assert e.block == block
    assert (e.rows, e.columns) == shape


def test_the_two_numbers_of_mlx_come_from_the_configuration() -> None:
    spec: Spec = {
        "m.q.weight": ("U32", (40, 24)), "m.q.scales": ("BF16", (40, 3)), "m.q.biases": ("BF16", (40, 3)),
        "m.k.weight": ("U32", (40, 48)), "m.k.scales": ("BF16", (40, 3)), "m.k.biases": ("BF16", (40, 3)),
    }  # fmt: skip
    block = {"bits": 4, "group_size": 64, "m.k": {"bits": 8, "group_size": 64}}
    found = find_encoded(make_refs(spec), {"quantization": block})
    assert {n: (e.element, e.columns) for n, (e,) in found.encoded.items()} == {
        "m.q.weight": ("int4", 192), "m.k.weight": ("int8", 192)
    }  # fmt: skip
    bare = find_encoded(make_refs(spec), None)
    assert {p.tensor for p in bare.problems} == {"m.q.weight", "m.k.weight"}  # 4 x 64, 8 x 32 and 2 x 128 all fit


def test_the_shape_of_packed_integers_is_asked_for_where_it_is_open() -> None:
    spec: Spec = {
        "m.q.weight_packed": ("I32", (40, 12)),
        "m.q.weight_scale": ("BF16", (40, 1)),
        "m.q.weight_shape": ("I64", (2,)),
    }
    group = {"weights": {"num_bits": 5, "group_size": None}, "targets": ["Linear"]}
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"g": group}}}
    found = find_encoded(make_refs(spec), config)
    assert [t.name for t in found.wanted] == ["m.q.weight_shape"]
    for columns in (71, 76):
        told = b"".join(n.to_bytes(8, "little") for n in (40, columns))
        ((e,),) = find_encoded(make_refs(spec), config, {"m.q.weight_shape": told}).encoded.values()
        assert e.columns == columns
    lie = b"".join(n.to_bytes(8, "little") for n in (41, 71))
    assert [p.trait for p in find_encoded(make_refs(spec), config, {"m.q.weight_shape": lie}).problems] == ["shapes"]


def test_four_bit_tags_count_elements() -> None:
    """F4 and U8 are the same bytes; a header of F4 has the columns of the weight."""
    found = {}
    for dtype, width in (("U8", 40), ("F4", 80)):
        spec: Spec = {
            "m.q.weight": (dtype, (3, 24, width)),
            "m.q.weight_scale": ("F8_E4M3", (3, 24, 5)),
            "m.q.weight_scale_2": ("F32", (3, 1)),
        }
        found[dtype] = find_encoded(make_refs(spec), None).encoded["m.q.weight"]
    assert found["U8"] == found["F4"]
    assert [(e.index, e.rows, e.columns) for e in found["F4"]] == [(i, 24, 80) for i in range(3)]
    factors = [e.part("factor") for e in found["F4"]]
    assert [p.begin - factors[0].begin for p in factors if p and factors[0]] == [0, 4, 8]


# --- what stays behind, and what stops a run -------------------------------------------------------------------------

FP8: Spec = {"a.0.q.weight": ("F8_E4M3", (40, 24)), "a.0.q.weight_scale_inv": ("F32", (1, 1))}


def test_activation_and_cache_scales_stay_behind() -> None:
    loose: Spec = {
        "a.0.q.input_scale": ("F32", ()), "a.0.attn.k_scale": ("F32", (1,)), "a.0.attn.v_scale": ("F32", ()),
        "a.0.o.input_scale": ("F32", ()), "a.0.o.input_scale_ub": ("F32", (1,)), "a.0.o.weight": ("BF16", (24, 24)),
    }  # fmt: skip
    found = find_encoded(make_refs({**FP8, **loose}), None)
    assert found.problems == ()
    assert set(found.dropped) == set(loose) - {"a.0.o.weight"}
    assert "key-value" in found.dropped["a.0.attn.k_scale"]
    learned: Spec = {"a.0.attn.q_scale": ("BF16", (64,)), "a.0.mlp.output_scale": ("BF16", (1,))}
    assert find_encoded(make_refs({**FP8, **learned}), None).dropped == {}
    plain = find_encoded(make_refs(loose), None)
    assert not plain.dropped  # no quantized source: they may mean anything


@pytest.mark.parametrize(
    ("more", "trait", "tensor"),
    [
        ({"a.1.q.weight": ("F8_E4M3", (40, 24))}, "unpaired", "a.1.q.weight"),
        ({"a.1.q.weight_packed": ("I32", (40, 3))}, "unpaired", "a.1.q.weight_packed"),
        ({"a.1.q.weight": ("I8", (40, 24))}, "unpaired", "a.1.q.weight"),
        ({"a.1.q.weight_scale_inv": ("F32", (1, 1))}, "leftover", "a.1.q.weight_scale_inv"),
        ({"a.1.q.qzeros": ("I32", (1, 1))}, "leftover", "a.1.q.qzeros"),
        ({"a.1.q.scale": ("F8_E8M0", (1, 1))}, "leftover", "a.1.q.scale"),
        (
            {"a.1.q.weight": ("F8_E4M3", (40, 24)), "a.1.q.weight_scale_inv": ("F32", (3, 50))},
            "shapes",
            "a.1.q.weight_scale_inv",
        ),
        (
            {"a.1.q.weight_packed": ("U8", (40, 24)), "a.1.q.weight_scale": ("U8", (39, 2))},
            "shapes",
            "a.1.q.weight_scale",
        ),
        (
            {"a.1.q.qweight": ("I32", (4, 96)), "a.1.q.scales": ("F16", (1, 96)), "a.1.q.qzeros": ("I32", (2, 12))},
            "shapes",
            "a.1.q.qzeros",
        ),
        (
            {"a.1.q.weight": ("U8", (64, 1)), "a.1.q.weight.absmax": ("F32", (2,))},
            "unpaired",
            "a.1.q.weight",
        ),
    ],
)
def test_what_does_not_fit_is_named(more: Spec, trait: str, tensor: str) -> None:
    found = find_encoded(make_refs({**FP8, **more}), None)
    assert [(p.trait, p.tensor, p.shard) for p in found.problems] == [(trait, tensor, "x")]
    assert tensor in str(found.problems[0])
    assert list(found.encoded) == ["a.0.q.weight"]


@pytest.mark.parametrize(
    ("method", "spec"),
    [
        ("bitnet", {"a.0.q.weight": ("U8", (10, 24)), "a.0.q.weight_scale": ("BF16", (1,))}),
        ("quark", FP8),
        ("gguf", {"a.0.q.weight": ("BF16", (10, 24))}),
        ("aqlm", {"a.0.q.codes": ("I8", (5, 3, 1)), "a.0.q.codebooks": ("F16", (1, 256, 1, 8))}),
        ("vptq", {"a.0.q.indices": ("I32", (1, 4, 8)), "a.0.q.centroids": ("BF16", (1, 64))}),
        ("spqr", {"a.0.q.dense_weights": ("I64", (5, 3)), "a.0.q.row_offsets": ("I32", (41,))}),
        ("hqq", {"a.0.q.W_q": ("U8", (5, 3)), "a.0.q.scale": ("F16", (3, 1)), "a.0.q.zero": ("F16", (3, 1))}),
    ],
)
def test_other_quantizations_are_refused_by_name(method: str, spec: Spec) -> None:
    told = find_encoded(make_refs(spec), {"quantization_config": {"quant_method": method}})
    assert [(p.trait, method in p.reason) for p in told.problems] == [("refused", True)]
    if method in ("aqlm", "vptq", "spqr", "hqq"):
        seen = find_encoded(make_refs(spec), None)
        assert [(p.trait, method in p.reason, p.tensor in spec) for p in seen.problems] == [("refused", True, True)]


@pytest.mark.parametrize("word", ["marlin-24", "sparse-24-bitmask"])
def test_sparse_formats_are_refused_by_their_format(word: str) -> None:
    config = {"quantization_config": {"quant_method": "compressed-tensors", "format": word}}
    assert [p.trait for p in find_encoded(make_refs(FP8), config).problems] == ["refused"]


def test_other_packings_of_gptq_and_awq_are_refused() -> None:
    gptq: Spec = {"q.qweight": ("I32", (8, 96)), "q.qzeros": ("I32", (1, 12)), "q.scales": ("F16", (1, 96))}
    for word, ok in (("gptq", True), ("gptq_v2", True), ("bitblas", False)):
        config = {"quantization_config": {"quant_method": "gptq", "checkpoint_format": word}}
        found = find_encoded(make_refs(gptq), config)
        assert (list(found.encoded), len(found.problems)) == ((["q.weight"], 0) if ok else ([], 1))
    awq: Spec = {"q.qweight": ("I32", (96, 8)), "q.qzeros": ("I32", (1, 8)), "q.scales": ("F16", (1, 64))}
    for version, ok in (("gemm", True), ("gemv", False)):
        found = find_encoded(make_refs(awq), {"quantization_config": {"quant_method": "awq", "version": version}})
        assert (list(found.encoded), len(found.problems)) == ((["q.weight"], 0) if ok else ([], 1))
