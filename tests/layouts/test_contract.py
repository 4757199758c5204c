"""What every row of LAYOUTS promises; a new layout is tested by being there."""

import importlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardq.arena import Arena
from shardq.errors import LayoutRefuses
from shardq.figures import FIGURES
from shardq.formats import ELEMENTS, STORAGE, WEIGHT_DTYPES
from shardq.kernels import KernelSet, load
from shardq.layouts import FILES, LAYOUTS, find_layout
from shardq.layouts.base import Layout, ModuleChoice, unit_rows
from shardq.layouts.stored import load as load_floats
from shardq.layouts.stored import store
from shardq.making import TARGET_ARRAYS
from shardq.quantizers.buffers import take_buffers
from shardq.quantizers.decode import decode_rows
from shardq.quantizers.float_scales import E4M3, FLOAT_SCALES, e4m3_values, e5m3_values
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.rtn import quantize_rows
from shardq.quantizers.scales import round_to
from shardq.schemes import PRESETS, WHOLE_ROW, WIDTHS, Scheme

Pack = Callable[..., dict[str, NDArray[Any]]]
PLAIN: Final = [  # layouts that take integers of either symmetry; others are packings of these alone
    x
    for x in LAYOUTS
    if x.name != "mlx"  # which has biases for zero points, and one scheme for the experts of a layer: test_mlx.py
    and all(x.refuse(s, s, 128, 128) is None for s in (x.settle(Scheme("int4", 32, sym)) for sym in (True, False)))
]
each_layout: Final = pytest.mark.parametrize("layout", PLAIN, ids=[x.name for x in PLAIN])
QWEIGHT: Final = [find_layout(name) for name in ("auto_round", "gptq")]  # one family, which needs whole words
each_qweight: Final = pytest.mark.parametrize("layout", QWEIGHT, ids=[x.name for x in QWEIGHT])
COMMON: Final = (2, 3, 4, 8)  # bits that every layout of plain integers takes
each_symmetry: Final = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
SIDE: Final = 96  # rows and columns of most matrices below


def held_schemes(layout: Layout) -> list[Scheme]:
    """Everything that a layout takes for a square matrix: plain integers, and what has a name."""
    groups = (WHOLE_ROW, 16, 32, 48, 96)
    schemes = [Scheme(f"int{b}", g, symmetric) for b in WIDTHS for g in groups for symmetric in (True, False)]
    settled = dict.fromkeys(layout.settle(s) for s in [*schemes, *(p.scheme for p in PRESETS.values())])
    return [s for s in settled if layout.refuse(s, s, SIDE, SIDE) is None]


HELD: Final = {layout.name: held_schemes(layout) for layout in LAYOUTS}
PAIRS: Final = [(layout, scheme) for layout in LAYOUTS for scheme in HELD[layout.name]]
each_pair: Final = pytest.mark.parametrize(("layout", "scheme"), PAIRS, ids=[f"{x.name}-{s.name}" for x, s in PAIRS])
each_integer_pair: Final = pytest.mark.parametrize(
    ("layout", "scheme"),
    [(x, s) for x, s in PAIRS if s.is_adjustable and s.group_size == 32],
    ids=[f"{x.name}-{s.name}" for x, s in PAIRS if s.is_adjustable and s.group_size == 32],
)


def random_rows(scheme: Scheme, rows: int, columns: int, seed: int) -> Quantized:
    """Any canonical result: every code, scale and zero point that the scheme allows, with both ends of each range."""
    made = random_codes(scheme, rows, columns, seed)
    return replace(made, input_scale=0.75 * 2.0 ** -(seed % 9)) if scheme.calibrated else made


def random_codes(scheme: Scheme, rows: int, columns: int, seed: int) -> Quantized:
    rng, groups, top = np.random.default_rng(seed), scheme.groups(columns), 1 << scheme.bits
    codes = rng.integers(0, top, (rows, columns), np.uint8, endpoint=False)
    codes[0, :2] = 0, top - 1
    if scheme.element == "e4m3fn":
        codes[(codes & 0x7F) == 0x7F] = 0x7E  # NaN is no result
    shape = (1 if scheme.reach == "tensor" else -(-rows // scheme.group_rows), groups)
    if scheme.scale in FLOAT_SCALES:
        patterns = rng.integers(1, 0x7F if scheme.scale == E4M3 else 0xFF, shape, np.uint8)
        scales = np.empty(shape, np.float32)
        if scheme.scale == E4M3:
            e4m3_values(patterns, scales, load())
            whole = float(np.float32(rng.uniform(1, 1e4))) if scheme.reach == "fused" else None
            return Quantized(codes, scales, None, global_scale=whole)
        return Quantized(codes, e5m3_values(patterns), None)
    if scheme.scale == "e8m0":
        scales = np.ldexp(np.float32(1), rng.integers(-127, 128, shape).astype(np.int32))
        scales[0, 0], scales[-1, -1] = 2.0**-127, 2.0**127
    else:
        scales = rng.standard_normal(shape).astype(np.float16).astype(np.float32)
        scales[0, 0], scales[-1, -1] = 2.0**-24, -65504.0 if scheme.symmetric else 65504.0
        scales = round_to(scales, "bf16") if scheme.scale == "bf16" else scales
    scales = np.ascontiguousarray(
        scales.repeat(rows // len(scales) + 1, axis=0)[:rows]
        if scheme.reach == "tensor"
        else scales.repeat(scheme.group_rows, axis=0)[:rows]
    )
    if scheme.numbers == "mlx" and not scheme.symmetric:
        biases = rng.standard_normal(scales.shape).astype(np.float16).astype(np.float32)
        return Quantized(codes, scales, None, biases)
    has_zeros = scheme.numbers == "auto_round" and scheme.format.is_integer
    if scheme.symmetric:
        zeros = np.full((rows, groups), top // 2, np.uint8) if has_zeros else None
        return Quantized(codes, scales, zeros)
    zeros = rng.integers(0, top, (rows, groups), np.uint8, endpoint=False)
    zeros[0, 0], zeros[-1, -1] = 0, top - 1
    return Quantized(codes, np.abs(scales), zeros)


def equal(a: Quantized, b: Quantized) -> bool:
    pairs = ((a.codes, b.codes), (a.scales, b.scales), (a.zeros, b.zeros), (a.biases, b.biases))
    same = all((x is y) or (x.dtype == y.dtype and np.array_equal(x, y)) for x, y in pairs)
    return same and (a.global_scale, a.input_scale) == (b.global_scale, b.input_scale)


def read_back(
    layout: Layout, scheme: Scheme, packed: dict[str, NDArray[Any]], q: Quantized, kernels: KernelSet, dtype: str
) -> bool:
    """True if `unpack` gives what was packed: the same codes or, where codes are not kept, the same values."""
    read, seen = layout.unpack(packed, scheme, kernels), layout.unpacks_to(scheme)
    if seen == scheme:
        return equal(read, q)
    rounded = load_floats(store(decode_rows(q, scheme, kernels), np.dtype(TARGET_ARRAYS[dtype])))
    return decode_rows(read, seen, kernels).tobytes() == rounded.tobytes()


# --- names and table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
def test_the_table_has_the_names_of_each_file(file: str) -> None:
    own = importlib.import_module(f"shardq.layouts.{file}").LAYOUTS
    assert sorted(FILES[file]) == sorted(w for x in own for w in (x.name, *x.aliases))


def test_layout_names_are_unambiguous() -> None:
    words = [w for x in LAYOUTS for w in (x.name, *x.aliases)]
    assert len(words) == len(set(words))
    for layout in LAYOUTS:
        assert all(find_layout(w.upper()) is layout for w in (layout.name, *layout.aliases))
        assert layout.summary
        assert HELD[layout.name]
        assert layout.loaders


# --- pack and unpack ---------------------------------------------------------------------------------------------


@each_pair
def test_outputs_are_filled_to_the_last_byte_and_read_back(
    layout: Layout, scheme: Scheme, kernels: KernelSet, pack_whole: Pack
) -> None:
    q = random_rows(scheme, SIDE, SIDE, seed=scheme.bits)
    tile = unit_rows(layout, scheme) * 32
    one, other = (pack_whole(layout, scheme, q, dtype="F16", tile=tile, rubbish=r) for r in (0x00, 0xFF))
    specs = layout.outputs(scheme, "F16", SIDE, SIDE)
    assert [s.suffix for s in specs] == list(one)
    for s in specs:
        assert s.dtype in STORAGE
        assert one[s.suffix].tobytes() == other[s.suffix].tobytes(), f"{s.suffix} keeps what was there before"
    assert read_back(layout, scheme, one, q, kernels, "F16")


@each_layout
@given(
    pick=st.integers(0, 999), groups=st.integers(1, 4), units=st.integers(1, 6), tile=st.integers(1, 7),
    slab=st.integers(1, 7), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_tiles_and_slabs_do_not_change_a_byte(
    layout: Layout, pick: int, groups: int, units: int, tile: int, slab: int, seed: int, kernels: KernelSet,
    pack_whole: Pack,
) -> None:  # fmt: skip
    schemes = [s for s in HELD[layout.name] if 128 % s.group_columns(128) == 0]
    scheme = schemes[pick % len(schemes)]
    unit = unit_rows(layout, scheme)
    q = random_rows(scheme, units * unit, groups * 128, seed)
    whole = pack_whole(layout, scheme, q, dtype="F16")
    cut = pack_whole(layout, scheme, q, dtype="F16", tile=tile * unit, slab=slab * unit)
    assert {k: v.tobytes() for k, v in cut.items()} == {k: v.tobytes() for k, v in whole.items()}
    assert read_back(layout, scheme, cut, q, kernels, "F16")


@each_integer_pair
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_quantized_weights_of_each_dtype_read_back_near_what_they_were(
    layout: Layout, scheme: Scheme, dtype: str, kernels: KernelSet, pack_whole: Pack
) -> None:
    values = np.random.default_rng(scheme.bits).standard_normal((64, 96)).astype(np.float32)
    raws: dict[str, NDArray[Any]] = {
        "BF16": (values.view(np.uint32) >> 16).astype(np.uint16),
        "F16": values.astype(np.float16).view(np.uint16),
        "F32": values,
    }
    raw = raws[dtype]
    weights = np.empty(values.shape, np.float32)
    kernels.widen(raw, dtype, weights)
    arena = Arena()
    arena.reset(1 << 20)
    q, bad = quantize_rows(raw, dtype, scheme, take_buffers(arena, 64, 96, scheme), np.empty((64, FIGURES)), kernels)
    assert bad == 0
    packed = pack_whole(layout, scheme, q, dtype=dtype, tile=32)
    assert read_back(layout, scheme, packed, q, kernels, dtype)
    read = decode_rows(layout.unpack(packed, scheme, kernels), layout.unpacks_to(scheme), kernels)
    error, step = np.abs(read - weights), np.repeat(np.abs(q.scales), 32, axis=1)
    # Half a step; more where the extreme of a symmetric group has no code of its own, or a zero point is rounded. A
    # layout that keeps values has them rounded once more, to 8 bits at worst.
    again = 0 if layout.unpacks_to(scheme) == scheme else 2.0**-8 * np.abs(weights)
    assert (error <= 1.5 * step * 1.001 + again).all()
    assert np.median(error / step) < 0.5


@each_pair
def test_outputs_hold_the_codes_and_slabs_add_up(layout: Layout, scheme: Scheme) -> None:
    rows = 3 * unit_rows(layout, scheme)
    specs = layout.outputs(scheme, "BF16", rows, SIDE)
    sizes = {s.suffix: int(np.prod(s.shape)) * STORAGE[s.dtype].bits for s in specs}
    assert max(sizes.values()) >= rows * SIDE * scheme.bits  # the codes fit
    for s in specs:
        assert np.dtype(TARGET_ARRAYS[s.dtype]).itemsize * 8 == STORAGE[s.dtype].bits
        for cut in range(unit_rows(layout, scheme), rows, unit_rows(layout, scheme)):
            above, below = s.slab_shape(0, cut), s.slab_shape(cut, rows)
            if s.slab_axis is None:
                assert (above, below) == (s.shape, (0,))
            else:
                assert above[s.slab_axis] + below[s.slab_axis] == s.shape[s.slab_axis]


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [x for x in LAYOUTS if any(s.is_adjustable for s in HELD[x.name]) and x.name != "fake"],
    ids=lambda x: x.name,
)
def test_refuse_ragged_groups(layout: Layout) -> None:
    for group, columns in ((128, 192), (48, 64), (128, 96), (1024, 512)):
        scheme = layout.settle(Scheme("int4", group, symmetric=True))
        refusal = layout.refuse(scheme, scheme, 64, columns)
        assert refusal is not None
        assert refusal.ragged
        assert str(group) in refusal.reason
        assert str(columns) in refusal.reason
        fits = replace(scheme, group_size=32)
        assert layout.refuse(fits, fits, 64, columns) is None


@each_qweight
@pytest.mark.parametrize(("rows", "columns"), [(100, 64), (64, 100), (1, 64), (16, 32), (63, 63)])
def test_refuse_sides_that_are_not_whole_words(layout: Layout, rows: int, columns: int) -> None:
    scheme = Scheme("int4", WHOLE_ROW, symmetric=True)
    refusal = layout.refuse(scheme, scheme, rows, columns)
    assert refusal is not None
    assert not refusal.ragged


@each_qweight
def test_refuse_every_element_that_no_loader_reads(layout: Layout) -> None:
    for name, element in ELEMENTS.items():
        scheme = Scheme(name, 32, symmetric=True)
        refusal = layout.refuse(scheme, scheme, 64, 64)
        if element.is_integer and element.bits in (WIDTHS if layout.name == "auto_round" else COMMON):
            assert refusal is None, name
        else:
            assert refusal is not None, name
            assert not refusal.ragged
            assert name in refusal.reason


@each_qweight
@each_symmetry
def test_refuse_what_one_config_cannot_mix(layout: Layout, symmetric: bool) -> None:
    refusal = layout.refuse(Scheme("int4", 32, symmetric), Scheme("int4", 32, not symmetric), 64, 64)
    assert refusal is not None
    assert not refusal.ragged


# --- configuration -----------------------------------------------------------------------------------------------

SCHEMES: Final = [Scheme(f"int{b}", g, symmetric=True) for b in COMMON for g in (WHOLE_ROW, 32, 128)]
PLACES: Final = [
    *(f"model.layers.{i}.{m}" for i in (0, 1, 2, 10, 11) for m in ("self_attn.q_proj", "mlp.down_proj", "mlp.gate")),
    *(f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in (0, 1) for e in (0, 1, 10)),
    "transformer.h.3.attn+x.c_proj", "visual.blocks.0.attn.qkv", "model.layers.1.mlp.gate_up", "layers.5",
    "pooler.dense",
]  # fmt: skip
HEADS: Final = ["lm_head", "score", "model.head", "encoder.layer.0.attention.output"]


@st.composite
def chosen_modules(draw: st.DrawFn) -> tuple[Scheme, list[ModuleChoice]]:
    """A default scheme and what was decided for some modules, at least one of them quantized."""
    symmetric = draw(st.booleans())
    schemes = [
        replace(s, symmetric=symmetric) for s in draw(st.lists(st.sampled_from(SCHEMES), min_size=1, max_size=3))
    ]
    default = schemes[0]
    wanted = st.sampled_from([None, default, default, *schemes])
    linear = [ModuleChoice(m, "linear", draw(wanted)) for m in draw(st.lists(st.sampled_from(PLACES), unique=True))]
    heads = [ModuleChoice(m, "head", draw(wanted)) for m in draw(st.lists(st.sampled_from(HEADS), unique=True))]
    sure = ModuleChoice("model.layers.7.self_attn.k_proj", "linear", default)
    return default, draw(st.permutations([*linear, *heads, sure]))


def fitted(layout: Layout, chosen: tuple[Scheme, list[ModuleChoice]]) -> tuple[Scheme, list[ModuleChoice]]:
    """The same choices with schemes that the layout holds; what it cannot hold beside the default is kept."""

    def fit(scheme: Scheme) -> Scheme:
        settled = layout.settle(scheme)
        if layout.refuse(settled, settled, 128, 1024) is None:
            return settled
        return HELD[layout.name][scheme.bits % len(HELD[layout.name])]

    default = fit(chosen[0])
    schemes = [c.scheme and fit(c.scheme) for c in chosen[1]]
    return default, [
        replace(c, scheme=s if s and layout.refuse(s, default, 128, 1024) is None else None)
        for c, s in zip(chosen[1], schemes, strict=True)
    ]


@each_layout
@given(chosen=chosen_modules())
def test_a_loader_believes_of_every_module_what_was_decided(
    layout: Layout, chosen: tuple[Scheme, list[ModuleChoice]]
) -> None:
    default, choices = fitted(layout, chosen)
    try:
        block = layout.config_block(default, choices, "0.0")
    except LayoutRefuses:  # only where a reader takes one name for another
        kept = [c.module for c in choices if not c.scheme]
        assert any(k in c.module for k in kept for c in choices if c.scheme)
        return
    read = json.loads(json.dumps(block, allow_nan=False))
    assert read == block, "not plain JSON"
    assert {c.module: layout.scheme_of(read, c.module) for c in choices} == {c.module: c.scheme for c in choices}
    assert layout.config_keys(block)[layout.config_key] == block
    for content in layout.config_files(block).values():
        assert json.loads(json.dumps(content, allow_nan=False)) == block


@each_layout
def test_a_config_without_exceptions_names_no_module(layout: Layout) -> None:
    scheme = HELD[layout.name][0]
    choices = [ModuleChoice(f"model.layers.{i}.mlp.up_proj", "linear", scheme) for i in range(40)]
    assert "up_proj" not in json.dumps(layout.config_block(scheme, choices, "0.0"))


@each_qweight
def test_a_config_names_who_wrote_it_and_what_loaders_ask_for_first(layout: Layout) -> None:
    scheme = Scheme("int8", 64, symmetric=True)
    block = layout.config_block(scheme, [ModuleChoice("a.0.b", "linear", scheme)], "1.2.3")
    assert "shardq:1.2.3" in json.dumps(block)
    assert (block["bits"], block["group_size"], block["sym"]) == (8, 64, True)
    assert block["quant_method"]


@given(chosen=chosen_modules())
def test_gptq_rules_for_kept_modules_match_those_and_no_other(chosen: tuple[Scheme, list[ModuleChoice]]) -> None:
    default, choices = chosen
    rules = find_layout("gptq").config_block(default, choices, "0.0").get("dynamic", {})
    # The key `lm_head` speaks of the module of that name; all others need a rule.
    kept = {c.module for c in choices if c.scheme is None and c.module.rpartition(".")[2] != "lm_head"}
    # GPTQModel and vLLM use re.match; both ends are anchored, so that re.search and re.fullmatch say the same.
    for test in (re.match, re.search, re.fullmatch):
        hit = {c.module for c in choices for r in rules if r.startswith("-:") and test(r[2:], c.module)}
        assert hit == kept
    for c in choices:
        assert sum(bool(re.match(r[2:], c.module)) for r in rules) <= 1, f"{c.module}: the order of rules would count"


def test_gptq_keeps_rules_short_for_many_layers() -> None:
    scheme = Scheme("int4", 128, symmetric=True)
    kept = [ModuleChoice(f"model.layers.{i}.mlp.gate", "router", None) for i in range(90)]
    rest = [ModuleChoice(f"model.layers.{i}.mlp.up_proj", "linear", scheme) for i in range(90)]
    block = find_layout("gptq").config_block(scheme, [*kept, *rest], "0.0")
    assert list(block["dynamic"]) == [r"-:^model\.layers\.\d+\.mlp\.gate$"]


def test_auto_round_names_kept_modules_in_full() -> None:
    """vLLM 0.32 compares names in extra_config; a regular expression there would not keep anything."""
    scheme = Scheme("int4", 128, symmetric=True)
    choices = [ModuleChoice(f"model.layers.{i}.mlp.gate", "router", None) for i in range(3)]
    choices.append(ModuleChoice("model.layers.0.mlp.up_proj", "linear", scheme))
    block = find_layout("auto_round").config_block(scheme, choices, "0.0")
    assert list(block["extra_config"]) == [f"model.layers.{i}.mlp.gate" for i in range(3)]
    assert block["block_name_to_quantize"] == "model.layers"


# --- compressed-tensors --------------------------------------------------------------------------------------------

CT: Final = find_layout("compressed-tensors")
PRESETS_OF_CT: Final = {p.name: s for p in PRESETS.values() if CT.refuse(s := CT.settle(p.scheme), s, 256, 256) is None}


@pytest.mark.parametrize("default", PRESETS_OF_CT.values(), ids=list(PRESETS_OF_CT))
def test_compressed_tensors_tells_every_preset_apart(default: Scheme) -> None:
    choices = [ModuleChoice(f"model.layers.0.m{i}", "linear", s) for i, s in enumerate(PRESETS_OF_CT.values())]
    choices += [ModuleChoice("model.layers.0.gate", "router", None), ModuleChoice("lm_head", "head", default)]
    block = json.loads(json.dumps(CT.config_block(default, choices, "0.0")))
    assert {c.module: CT.scheme_of(block, c.module) for c in choices} == {c.module: c.scheme for c in choices}
    assert block["format"] == "mixed-precision"
    last = list(block["config_groups"].values())[-1]["targets"]
    assert last == ["Linear", r"re:^lm_head$"]  # the class alone does not reach a head


@pytest.mark.parametrize("scheme", PRESETS_OF_CT.values(), ids=list(PRESETS_OF_CT))
@pytest.mark.parametrize("rows", [128, 100])
def test_compressed_tensors_slabs_of_every_preset(
    scheme: Scheme, rows: int, kernels: KernelSet, pack_whole: Pack
) -> None:
    values = np.random.default_rng(rows).standard_normal((rows, 256)).astype(np.float32)
    assert CT.refuse(scheme, scheme, rows, 256) is None
    arena = Arena()
    arena.reset(1 << 22)
    buffers = take_buffers(arena, rows, 256, scheme)
    amax = None if scheme.reach == "group" else float(np.abs(values).max())
    q, bad = quantize_rows(values, "F32", scheme, buffers, np.empty((rows, FIGURES)), kernels, amax)
    assert bad == 0
    q = replace(q, input_scale=0.375 if scheme.calibrated else None)
    unit = unit_rows(CT, scheme)
    one, other = (pack_whole(CT, scheme, q, dtype="F32", tile=t, slab=s) for t, s in ((1 << 20, 1 << 20), (unit, unit)))
    assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in other.items()}
    assert equal(CT.unpack(one, scheme, kernels), q)


def test_compressed_tensors_refuses_what_the_library_has_no_format_for() -> None:
    for name in ("e5m2", "fp16"):
        refusal = CT.refuse(Scheme(name, 32, symmetric=True), Scheme("int4", 32, symmetric=True), 64, 64)
        assert refusal is not None
        assert not refusal.ragged


def test_compressed_tensors_refuses_only_what_its_readers_cannot_have() -> None:
    left = PRESETS.keys() - PRESETS_OF_CT.keys()
    assert left == {"NVFP4_E5M3", "MXINT4", "MXFP4_RCEIL", "MXFP8_RCEIL"}


def test_compressed_tensors_leaves_a_tied_head_alone() -> None:
    scheme = CT.settle(Scheme("int4", 128, symmetric=True))
    body = ModuleChoice("model.layers.0.mlp.up_proj", "linear", scheme)
    assert CT.config_block(scheme, [body], "0.0")["ignore"] == ["re:.*lm_head$"]
    head = ModuleChoice("lm_head", "head", scheme)
    assert CT.config_block(scheme, [body, head], "0.0")["ignore"] == []


@pytest.mark.parametrize(
    ("stack", "others", "expected"),
    [
        ("model.layers.3.mlp.experts", ["model.layers.3.self_attn.q_proj"], r"re:.*\.3\.mlp\.experts\."),
        ("model.layers.3.mlp.experts.down_proj", [], r"re:.*\.3\.mlp\.experts\."),
        ("model.layers.3.moe", [], r"re:.*\.3\.moe\.experts\."),
        ("mlp.experts", [], r"re:^mlp\.experts\."),
        ("model.layers.3.mlp.experts", ["mtp.3.mlp.experts.0.up_proj"], r"re:^model\.layers\.3\.mlp\.experts\."),
    ],
)
def test_compressed_tensors_names_experts_of_stacks_that_stay(stack: str, others: list[str], expected: str) -> None:
    """vLLM asks for `<experts>.0.gate_proj`, under its own name of the model."""
    scheme = CT.settle(Scheme("int4", 128, symmetric=True))
    choices = [ModuleChoice(name, "linear", scheme) for name in others] + [ModuleChoice(stack, "expert_stack", None)]
    assert CT.config_block(scheme, choices, "0.0")["ignore"] == [stack, expected, "re:.*lm_head$"]
