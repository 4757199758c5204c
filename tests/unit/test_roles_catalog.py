"""The default rule against the model types of transformers 5.23 and against real repositories."""

import gzip
import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from shardq.checkpoint import TensorRef
from shardq.companions import find_companions
from shardq.roles import Role, Verdict, assign_roles, may_be_linear

DATA = Path(__file__).parents[1] / "data" / "hub_index"

# Model type, name pattern, owning class, shape, verdict
Row = tuple[str, str, str, tuple[int, ...], Verdict]


def _load_gz(path: Path) -> Any:
    return json.loads(gzip.decompress(path.read_bytes()))


def _config_of(model_type: str, patterns: dict[str, Any]) -> dict[str, Any]:
    """The catalogue holds no configs: the largest table is taken to be the vocabulary."""
    tables = [shape[0] for owner, shape, _ in patterns.values() if owner == "Embedding"]
    return {
        "model_type": model_type,
        "vocab_size": max(tables, default=0),
        "num_experts": 4,
        "num_hidden_layers": 8,
    }


@pytest.fixture(scope="module")
def catalog() -> dict[str, Any]:
    table = _load_gz(DATA / "catalog.json.gz")
    assert isinstance(table, dict)
    return table


@pytest.fixture(scope="module")
def rows(catalog: dict[str, Any]) -> list[Row]:
    result: list[Row] = []
    for model_type, entry in catalog.items():
        patterns = entry["patterns"]
        refs = {n: _ref(n.replace("#", "0"), "BF16", shape) for n, (_, shape, _) in patterns.items()}
        verdicts = assign_roles(refs.values(), _config_of(model_type, patterns))
        for name, (owner, shape, _) in patterns.items():
            result.append((model_type, name, owner, tuple(shape), verdicts[refs[name].name]))
    return result


def _ref(name: str, dtype: str | None, shape: list[int] | None) -> TensorRef:
    return TensorRef(name, "x", dtype, None if shape is None else tuple(shape), 0, 0)


def _in_block(pattern: str) -> bool:
    return re.search(r"(^|\.)#\.", pattern.rpartition(".")[0]) is not None


def test_catalog_has_no_wrong_pick(rows: list[Row]) -> None:
    def is_linear(name: str, owner: str) -> bool:
        # A module that holds all experts owns the slice of each; I-BERT's QuantLinear is a Linear.
        expert = re.fullmatch(r"Param:\w*Experts", owner) and ".experts.#." in name
        return owner in ("Linear", "Param:QuantLinear") or expert is not None

    wrong = [r for r in rows if r[4].role is Role.LINEAR and not is_linear(r[1], r[2])]
    assert wrong == []


def test_catalog_stacks_are_experts(rows: list[Row]) -> None:
    stacks = [r for r in rows if r[4].role is Role.EXPERT_STACK]
    assert all(re.search(r"Param:\w*(Experts|MoE)", owner) for _, _, owner, _, _ in stacks)
    assert all(len(shape) == 3 for _, _, _, shape, _ in stacks)


def test_catalog_transposed_exactly_conv1d(rows: list[Row]) -> None:
    transposed = {r[:2] for r in rows if r[4].role is Role.TRANSPOSED}
    assert transposed == {r[:2] for r in rows if r[2] == "Conv1D" and len(r[3]) == 2}


def test_catalog_picks_are_pinned(rows: list[Row]) -> None:
    roles = Counter(r[4].role for r in rows)
    assert (roles[Role.LINEAR], roles[Role.EXPERT_STACK], roles[Role.TRANSPOSED]) == (3085, 46, 16)
    assert roles[Role.UNKNOWN] == 0
    assert roles[Role.COMPANION] == 0


def test_catalog_missed_linears_are_explained(rows: list[Row]) -> None:
    """Every Linear inside a block that is kept, by the rule that kept it."""
    kept = Counter(
        rule.rule
        for _, name, owner, _, rule in rows
        if owner == "Linear" and rule.role is not Role.LINEAR and _in_block(name)
    )
    assert kept == KEPT_LINEARS


# `nontext` is a policy, `small` and `router` are about accuracy. The others lose oddly named
# modules of encoders (LED's `self_attn.output`, ConvBERT's `conv_out_layer`) and, by `vocab`, five
# of vision models whose largest table has as many rows as a layer.
KEPT_LINEARS = {
    "nontext": 610,
    "small": 86,
    "router": 13,
    "conv": 10,
    "min_dim": 9,
    "leaf": 8,
    "head": 4,
    "vocab": 5,
    "embed": 1,
    "router_shape": 1,
}


def test_no_linear_of_the_catalog_is_taken_for_a_table(rows: list[Row]) -> None:
    """Kept or not, it has to stand in configurations; tables that are never Linear need not."""
    matrices = [r for r in rows if r[1].endswith(".weight") and len(r[3]) == 2]
    named: dict[str, list[bool]] = {owner: [] for owner in ("Linear", "Embedding")}
    for _, name, owner, shape, verdict in matrices:
        if owner in named and verdict.role is not Role.LINEAR:
            named[owner].append(may_be_linear(_ref(name, "BF16", list(shape)), verdict.role))
    assert len(named["Linear"]) > 500
    assert all(named["Linear"])
    assert sum(named["Embedding"]) < 0.25 * len(named["Embedding"])


def test_catalog_gives_the_same_picks_without_shapes_for_plain_models(
    catalog: dict[str, Any],
) -> None:
    for model_type in (
        "mistral",
        "qwen2",
        "mixtral",
        "falcon",
        "starcoder2",
        "deepseek_v2",
        "bert",
    ):
        patterns = catalog[model_type]["patterns"]
        full = [_ref(n.replace("#", "0"), "BF16", p[1]) for n, p in patterns.items()]
        bare = [_ref(ref.name, None, None) for ref in full]
        config = _config_of(model_type, patterns)
        assert _linears(assign_roles(full, config)) == _linears(assign_roles(bare, config))


@pytest.mark.parametrize("conv1d_type", ["gpt2", "openai-gpt", "imagegpt", "decision_transformer"])
def test_catalog_conv1d_is_recognised_without_config(catalog: dict[str, Any], conv1d_type: str) -> None:
    patterns = catalog[conv1d_type]["patterns"]
    refs = [_ref(n.replace("#", "0"), "F32", p[1]) for n, p in patterns.items()]
    verdicts = assign_roles(refs, None)
    assert not _linears(verdicts)
    assert sum(v.role is Role.TRANSPOSED for v in verdicts.values()) == 4


def _linears(verdicts: dict[str, Verdict]) -> set[str]:
    return {name for name, verdict in verdicts.items() if verdict.role is Role.LINEAR}


# --- real repositories -----------------------------------------------------------------------


def _load_dump(folder: str) -> tuple[list[TensorRef], dict[str, Any]]:
    path = DATA / folder
    config = json.loads((path / "config.json").read_text())
    if (path / "headers.json.gz").exists():
        shards = _load_gz(path / "headers.json.gz")
        refs = [_ref(n, *entry) for tensors in shards.values() for n, entry in tensors.items()]
    else:
        index = _load_gz(path / "model.safetensors.index.json.gz")
        refs = [_ref(name, None, None) for name in index["weight_map"]]
    return refs, config


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        (
            "mistral-7b",
            {Role.LINEAR: 224, Role.NORM: 65, Role.HEAD: 1, Role.EMBEDDING: 1},
        ),
        (
            "wizardlm-2-8x22b",
            {
                Role.LINEAR: 1568,
                Role.NORM: 113,
                Role.ROUTER: 56,
                Role.HEAD: 1,
                Role.EMBEDDING: 1,
            },
        ),
        (
            "qwen-72b",
            {
                Role.LINEAR: 400,
                Role.NORM: 161,
                Role.VECTOR: 80,
                Role.HEAD: 1,
                Role.EMBEDDING: 1,
            },
        ),
        (
            "bloom",
            {Role.LINEAR: 280, Role.NORM: 141, Role.VECTOR: 422, Role.EMBEDDING: 2},
        ),
        (
            "gpt-oss-20b",
            {
                Role.LINEAR: 96,
                Role.EXPERT_STACK: 48,
                Role.COMPANION: 48,
                Role.NORM: 49,
                Role.VECTOR: 144,
                Role.BUFFER: 48,
                Role.ROUTER: 24,
                Role.HEAD: 1,
                Role.EMBEDDING: 1,
            },
        ),
    ],
)
def test_real_checkpoint_census(folder: str, expected: dict[Role, int]) -> None:
    refs, config = _load_dump(folder)
    verdicts = assign_roles(refs, config)
    assert list(verdicts) == [ref.name for ref in refs]
    assert Counter(v.role for v in verdicts.values()) == expected


def test_real_moe_experts_are_separate() -> None:
    verdicts = assign_roles(*_load_dump("wizardlm-2-8x22b"))
    experts = [n for n in _linears(verdicts) if ".block_sparse_moe.experts." in n]
    assert len(experts) == 1344


def test_real_gpt_oss_blocks_and_scales_are_paired() -> None:
    refs, _ = _load_dump("gpt-oss-20b")
    companions = find_companions(refs)
    assert {(c.kind, c.paired) for c in companions} == {("mxfp4_gptoss", True)}
    assert Counter(c.part for c in companions) == {"codes": 48, "parameter": 48}


def test_seventy_thousand_tensors_stay_cheap() -> None:
    """Measured 0.7 to 1.1 s; the bound only catches a loss of linearity."""
    refs = [
        _ref(f"layers.{layer}.ffn.experts.{expert}.{part}", dtype, shape)
        for layer in range(43)
        for expert in range(272)
        for w in ("w1", "w2", "w3")
        for part, dtype, shape in (
            (f"{w}.weight", "I8", [2048, 2048]),
            (f"{w}.scale", "F8_E8M0", [2048, 128]),
        )
    ]
    assert len(refs) > 70_000
    start_s = time.process_time()
    verdicts = assign_roles(refs, {"n_routed_experts": 272})
    assert time.process_time() - start_s < 10
    assert Counter(v.role for v in verdicts.values()) == {
        Role.LINEAR: len(refs) // 2,
        Role.COMPANION: len(refs) // 2,
    }
