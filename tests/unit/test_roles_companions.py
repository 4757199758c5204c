"""Quantized sources are recognised by names, dtypes and shapes."""

import pytest

from shardq.checkpoint import TensorRef
from shardq.companions import Companion, find_companions
from shardq.families import load_families, parse_families
from shardq.roles import Role, assign_roles

Spec = dict[str, tuple[str | None, tuple[int, ...] | None]]

# One module of every kind: name -> dtype and shape; the codes come first.
SOURCES: list[tuple[str, str, Spec]] = [
    (
        "fp8_block",
        "a.0.q",
        {".weight": ("F8_E4M3", (576, 512)), ".weight_scale_inv": ("F32", (5, 4))},
    ),
    (
        "fp8_block_ue8m0",
        "a.0.q",
        {".weight": ("F8_E4M3", (512, 512)), ".weight_scale_inv": ("F8_E8M0", (4, 4))},
    ),
    ("fp8_v4", "a.0.q", {".weight": ("F8_E4M3", (512, 512)), ".scale": ("F8_E8M0", (4, 4))}),
    (
        "fp8_3d",
        "a.0.experts",
        {
            ".down_proj": ("F8_E4M3", (4, 512, 512)),
            ".down_proj_scale_inv": ("F32", (4,)),
            ".down_proj_activation_scale": ("F32", ()),
        },
    ),
    (
        "fp8_3d",
        "a.0.moe.up_proj",
        {".weight": ("F8_E4M3", (4, 512, 512)), ".weight_scale_inv": ("F32", (4, 4, 4))},
    ),
    (
        "fp8_static",
        "a.0.q",
        {
            ".weight": ("F8_E4M3", (512, 512)),
            ".weight_scale_inv": ("BF16", ()),
            ".activation_scale": ("BF16", ()),
        },
    ),
    (
        "fp8_static",
        "a.0.q",
        {
            ".weight": ("F8_E4M3", (512, 512)),
            ".qscale_weight": ("F32", ()),
            ".qscale_act": ("F32", ()),
        },
    ),
    (
        "fp8_static",
        "a.0.q",
        {
            ".weight": ("F8_E4M3", (512, 512)),
            ".weight_scale": ("F32", (1,)),
            ".input_scale": ("F32", ()),
        },
    ),
    (
        "fp8_channel",
        "a.0.q",
        {".weight": ("F8_E4M3", (512, 256)), ".weight_scale": ("F32", (512, 1))},
    ),
    ("fp8_block", "a.0.q", {".weight": ("F8_E4M3", (512, 256)), ".weight_scale": ("F32", (4, 2))}),
    ("mxfp8", "a.0.q", {".weight": ("F8_E4M3", (512, 256)), ".weight_scale": ("U8", (512, 8))}),
    ("mxfp8", "a.0.q", {".weight": ("F8_E4M3", (512, 256)), ".weight_scale_inv": ("U8", (512, 8))}),
    (
        "mxfp4_ct",
        "a.0.q",
        {".weight_packed": ("U8", (512, 128)), ".weight_scale": ("U8", (512, 8))},
    ),
    (
        "mxfp6_ct",
        "a.0.q",
        {".weight_packed": ("U8", (512, 192)), ".weight_scale": ("U8", (512, 8))},
    ),
    (
        "mxfp4_gptoss",
        "a.0.mlp.experts",
        {".down_proj_blocks": ("U8", (4, 64, 8, 16)), ".down_proj_scales": ("U8", (4, 64, 8))},
    ),
    ("mxfp4_v4", "a.0.q", {".weight": ("I8", (512, 128)), ".scale": ("F8_E8M0", (512, 8))}),
    (
        "nvfp4_modelopt",
        "a.0.q",
        {
            ".weight": ("U8", (512, 128)),
            ".weight_scale": ("F8_E4M3", (512, 16)),
            ".weight_scale_2": ("F32", ()),
            ".input_scale": ("F32", ()),
        },
    ),
    (
        "nvfp4_ct",
        "a.0.q",
        {
            ".weight_packed": ("U8", (512, 128)),
            ".weight_scale": ("F8_E4M3", (512, 16)),
            ".weight_global_scale": ("F32", (1,)),
            ".input_global_scale": ("F32", (1,)),
        },
    ),
    (
        "nvfp4_bare",
        "a.0.experts",
        {
            ".w13_weight": ("U8", (4, 512, 128)),
            ".w13_weight.scale": ("F8_E4M3", (4, 512, 16)),
            ".w13_weight.scale2": ("F32", (4,)),
            ".w13_weight.input_amax": ("F32", ()),
            ".w13_weight.original_shape": ("I64", (3,)),
        },
    ),
    (
        "int_pack",
        "a.0.q",
        {
            ".weight_packed": ("I32", (512, 32)),
            ".weight_scale": ("BF16", (512, 8)),
            ".weight_shape": ("I64", (2,)),
            ".weight_zero_point": ("I32", (64, 8)),
        },
    ),
    (
        "gptq",
        "a.0.q",
        {
            ".qweight": ("I32", (64, 512)),
            ".qzeros": ("I32", (4, 64)),
            ".scales": ("F16", (4, 512)),
            ".g_idx": ("I32", (512,)),
        },
    ),
    (
        "gptq",
        "a.0.q",
        {".qweight": ("I32", (64, 512)), ".qzeros": ("I32", (4, 64)), ".scales": ("F16", (4, 512))},
    ),
    (
        "awq",
        "a.0.q",
        {".qweight": ("I32", (512, 64)), ".qzeros": ("I32", (4, 64)), ".scales": ("F16", (4, 512))},
    ),
    (
        "bnb4",
        "a.0.q",
        {
            ".weight": ("U8", (65536, 1)),
            ".weight.absmax": ("U8", (2048,)),
            ".weight.quant_map": ("F32", (16,)),
            ".weight.quant_state.bitsandbytes__nf4": ("U8", (92,)),
        },
    ),
    (
        "bnb4",
        "a.0.q",
        {".weight": ("BF16", (32768, 1)), ".weight.absmax": ("F32", (2048,))},
    ),
    ("bnb8", "a.0.q", {".weight": ("I8", (512, 512)), ".SCB": ("F32", (512,))}),
    ("int8_channel", "a.0.q", {".weight": ("I8", (512, 512)), ".weight_scale": ("F32", (512, 1))}),
    (
        "mlx",
        "a.0.q",
        {
            ".weight": ("U32", (512, 64)),
            ".scales": ("BF16", (512, 8)),
            ".biases": ("BF16", (512, 8)),
        },
    ),
]


def _refs(base: str, spec: Spec) -> list[TensorRef]:
    return [TensorRef(base + s, "x", dtype, shape, 0, 0) for s, (dtype, shape) in spec.items()]


@pytest.mark.parametrize(("kind", "base", "spec"), SOURCES)
def test_kind_is_recognised_and_paired(kind: str, base: str, spec: Spec) -> None:
    bias = TensorRef(f"{base}.bias", "x", "BF16", (512,), 0, 0)
    found = find_companions([bias, *reversed(_refs(base, spec))])
    assert [c.name for c in found] == [base + suffix for suffix in reversed(spec)]
    assert {(c.kind, c.paired) for c in found} == {(kind, True)}
    assert [c.part for c in found] == ["parameter"] * (len(spec) - 1) + ["codes"]
    assert len({c.weight for c in found}) == 1


@pytest.mark.parametrize(("kind", "base", "spec"), SOURCES)
def test_codes_have_the_role_of_their_weight(kind: str, base: str, spec: Spec) -> None:
    verdicts = list(assign_roles(_refs(base, spec), None).values())
    assert verdicts[0].role in (Role.LINEAR, Role.EXPERT_STACK)
    assert {(v.role, v.rule) for v in verdicts[1:]} == {(Role.COMPANION, f"source:{kind}")}


def _marked_alone(kind: str, spec: Spec) -> bool:
    """False where nothing but the scale tells codes from a plain tensor."""
    return kind != "nvfp4_bare" and spec.get(".weight", ("", None))[0] != "BF16"


@pytest.mark.parametrize(("base", "spec"), [(base, spec) for kind, base, spec in SOURCES if _marked_alone(kind, spec)])
def test_codes_without_scale_are_unpaired(base: str, spec: Spec) -> None:
    codes = _refs(base, spec)[0]
    (found,) = find_companions([codes])
    assert (found.name, found.part, found.paired) == (codes.name, "codes", False)
    assert assign_roles([codes], None)[codes.name].role is Role.UNKNOWN


def test_every_kind_in_the_table_is_tested() -> None:
    assert {kind for kind, _, _ in SOURCES} == {source.id for source in load_families().sources}


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        (".weight_scale_inv", "fp8_block"),
        (".weight_scale", "fp8_channel"),
        (".qzeros", "gptq"),
        (".weight.absmax", "bnb4"),
    ],
)
def test_scale_without_codes_is_unpaired(suffix: str, kind: str) -> None:
    weight = TensorRef("a.0.q.weight", "x", "BF16", (512, 512), 0, 0)
    lone = TensorRef(f"a.0.k{suffix}", "x", "F32", (4, 4), 0, 0)
    assert find_companions([weight, lone]) == (
        Companion(lone.name, kind, "parameter", lone.name, paired=False, shape=None),
    )
    assert assign_roles([weight, lone], None)[lone.name].role is Role.COMPANION


def test_lone_e8m0_is_a_scale() -> None:
    (found,) = find_companions([TensorRef("a.0.q.scale", "x", "F8_E8M0", (4, 4), 0, 0)])
    assert (found.kind, found.part, found.paired) == ("scale_without_weight", "parameter", False)


@pytest.mark.parametrize(
    "spec",
    [
        {".norm.scale": ("BF16", (64,))},  # gpt-oss's own names
        {".q.weight": ("BF16", (64, 64)), ".q.scale": ("F32", ())},  # a clip scale
        {".q.weight": ("BF16", (64, 64)), ".q.scales": ("F32", (64,)), ".q.biases": ("F32", (64,))},
        {".router.weight": ("F32", (64, 64)), ".router.per_expert_scale": ("F32", (64,))},
        {".ids": ("I64", (64, 64)), ".mask": ("U8", (64, 64)), ".counts.weight": ("I32", (64,))},
        {".table.weight": ("I64", (64, 64))},
        {".self_attn.k_scale": ("F32", ()), ".self_attn.k_proj.weight": ("BF16", (64, 64))},
    ],
)
def test_full_precision_has_no_companions(spec: Spec) -> None:
    assert find_companions(_refs("model.layers.0", spec)) == ()


def test_names_alone_tell_in_an_index() -> None:
    kinds = {
        "a.0.q.weight": "mlx",
        "a.0.q.scales": "mlx",
        "a.0.q.biases": "mlx",
        "a.0.k.weight": "fp8_v4",
        "a.0.k.scale": "fp8_v4",
    }
    found = find_companions([TensorRef(n, "x", None, None, -1, -1) for n in (*kinds, "a.0.v.scale", "a.0.v.scales")])
    assert {c.name: c.kind for c in found} == kinds


def test_families_file_refuses_unknown_words() -> None:
    text = (
        "[names]\nblock=''\nhead=[]\nvocab_head=[]\nembed=''\ntables=[]\nnorm=''\nconv=''\nrouter=''\nmoe_parent=''\n"
        "projection=''\nmtp=''\nlayer_index=''\nnontext=''\nsmall=''\ngate_like=''\ngate_like_max=1\nmin_dim=1\n"
        "[config]\nvocab_size=''\nexpert_count=[]\nlayer_count=[]\ntext=[]\nhidden_size=[]\nexpert_size=[]\n"
        "[experts]\ncontainer=''\nstacked=''\n[lone]\n"
        "[[stack]]\nid='a'\nwritten={a=['b']}\ndown='a'\n"
        "[[keep_3d]]\nid='a'\npattern=''\nrole='conv'\n"
        "[[fused]]\nid='a'\nmembers=[]\n"
        "[[family]]\nid='a'\nmodel_types=[]\ntransposed=[]\nwide=[]\n"
        "[[published]]\nid='a'\nmodel_types=[]\nkeep=''\n"
        "[[source]]\nid='odd'\ncodes='.w'\ndtypes=[]\nscale='.s'\ngrid='ragged'\n"
    )
    with pytest.raises(ValueError, match=r"odd.*ragged"):
        parse_families(text)


def test_families_file_names_only_roles_that_exist() -> None:
    assert {Role(row.role) for row in load_families().keep_3d} <= set(Role)
