"""Runs whose scales are searched: what is chosen, that it is better by its own measure, and that all can be proven."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import shardq
from shardq import Limits, make_recipe
from shardq.errors import BadImportance, BadOption
from shardq.importance_files import Provenance, write_importance
from shardq.ledger import LEDGER, decode_ledger

ONE = Limits(parallel=1)
SEARCHED = [
    ("W4A16", {}),
    ("W2A16G32", {}),
    ("W3A16@compressed-tensors", {}),
    ("W4A16_ASYM@gptq_v2", {}),
    ("W4A16@mlx", {"group_size": 64, "ignore": ["lm_head"]}),
    ("MXFP4", {}),
    ("MXFP8", {}),
    ("NVFP4A16", {}),
]


def entries(folder: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = decode_ledger((folder / LEDGER).read_bytes())["tensors"]
    return found


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def importance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Peaked, as that of real models."""
    rng = np.random.default_rng(3)
    modules = {d.tensor.module: d.tensor.shape for d in shardq.plan("demo").decisions if d.scheme}
    vectors = {m: rng.lognormal(0, 2, shape[1]).astype(np.float32) for m, shape in modules.items() if shape}
    path = tmp_path_factory.mktemp("importance") / "demo.importance"
    write_importance(path, vectors, Provenance("text", 8192, None, "demo", None, None))
    return path


@pytest.mark.parametrize(("scheme", "options"), SEARCHED, ids=[s for s, _ in SEARCHED])
def test_searched_scales_weigh_less_and_can_be_audited(
    scheme: str, options: dict[str, Any], importance: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(scheme, importance=importance, **options)
    out = tmp_path / "out"
    shardq.quantize("demo", recipe, output_dir=out, limits=ONE)
    found = [e for e in entries(out).values() if e["outcome"] == "quantized" and e.get("weighed")]
    assert len(found) >= 45
    before, after = (sum(e["losses"][i] for e in found) for i in range(2))
    assert after <= before if scheme == "MXFP8" else after < before  # whose exponents are the best already
    assert all(e["losses"][1] <= e["losses"][0] * 1.001 for e in found)  # scales are rounded after they are found
    assert shardq.verify(out, deep=True, source="demo").problems == ()
    assert shardq.audit(out, source="demo", importance=importance).problems == ()
    with pytest.raises(BadOption, match="--importance gives none"):
        shardq.audit(out, source="demo")


def test_the_same_bytes_for_any_number_of_workers_and_outputs(importance: Path, tmp_path: Path) -> None:
    """Four ways over the same rows: with and without search, two layouts of one scheme."""
    words: list[tuple[str, dict[str, Any]]] = [
        ("W4A16@gptq", {"importance": importance}),
        ("W4A16@auto_round", {"search": "none"}),
        ("W4A16@awq", {"importance": importance}),
        ("NVFP4A16", {"search": "auto"}),
    ]
    recipes = [make_recipe(s, **kw) for s, kw in words]
    together = shardq.quantize_many("demo", recipes, output_dir=tmp_path / "many", limits=Limits(parallel=2))
    for number, (recipe, result) in enumerate(zip(recipes, together, strict=True)):
        alone = tmp_path / f"alone-{number}"
        shardq.quantize("demo", recipe, output_dir=alone, limits=ONE)
        assert shards(alone) == shards(result.output)
        assert entries(alone) == entries(result.output)


@pytest.mark.parametrize("scheme", ["W4A16", "W3A16_ASYM", "W5A16_ASYM", "MXINT4"])
def test_without_importance_integers_that_may_lose_are_left_to_round_to_nearest(scheme: str, tmp_path: Path) -> None:
    """In decoders a search makes them worse."""
    plain, auto = tmp_path / "plain", tmp_path / "auto"
    shardq.quantize("demo", make_recipe(scheme), output_dir=plain, limits=ONE)
    shardq.quantize("demo", make_recipe(scheme, search="auto"), output_dir=auto, limits=ONE)
    assert shards(plain) == shards(auto)
    assert not any("search" in e for e in entries(auto).values())


@pytest.mark.parametrize("scheme", ["MXFP4", "NVFP4A16", "W4A16_ASYM", "W4A16G64@mlx"])
def test_without_importance_what_never_loses_is_searched(scheme: str, tmp_path: Path) -> None:
    plain, auto = tmp_path / "plain", tmp_path / "auto"
    shardq.quantize("demo", make_recipe(scheme), output_dir=plain, limits=ONE)
    made = shardq.quantize("demo", make_recipe(scheme, search="auto"), output_dir=auto, limits=ONE)
    assert shards(plain) != shards(auto)
    found = [e for e in entries(auto).values() if e["outcome"] == "quantized"]
    assert all(e["search"]["rule"] == "least_squares" and not e["weighed"] for e in found)
    assert made.errors is not None


def test_another_importance_is_another_run(importance: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(importance.read_bytes())
    recipe, copy = make_recipe("W4A16", importance=importance), make_recipe("W4A16", importance=other)
    assert shardq.plan("demo", recipe).fingerprint == shardq.plan("demo", copy).fingerprint
    assert shardq.plan("demo", recipe).fingerprint != shardq.plan("demo", make_recipe("W4A16")).fingerprint


def test_missing_modules_are_named_before_a_weight_is_read(importance: Path, tmp_path: Path) -> None:
    with pytest.raises(BadImportance, match="lm_head"):
        shardq.plan("demo", make_recipe("W4A16", importance=importance, quant_lm_head=True))
    with pytest.raises(BadOption, match="--search none wants none"):
        make_recipe("W4A16", importance=importance, search="none")
    with pytest.raises(BadOption, match="symmetric integers"):
        shardq.plan("demo", make_recipe("MXFP4", search="auto-round"))


@pytest.fixture(scope="module")
def centered(importance: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same importance, with means of inputs."""
    rng, vectors = np.random.default_rng(4), load_file(importance)
    means = {m: np.sqrt(v) * rng.uniform(-1, 1, len(v)) for m, v in vectors.items()}
    path = tmp_path_factory.mktemp("centered") / "demo.importance"
    write_importance(path, vectors, Provenance("text", 8192, None, "demo", None, None), means)
    return path


@pytest.mark.parametrize(
    ("scheme", "folded"),
    [
        ("W2A16G64", False),
        ("W3A16", False),
        ("W4A16@gptq", False),
        ("W4A16@compressed-tensors", False),
        ("W4A16", True),
        ("W4A16_ASYM", False),
        ("W4A16G64@mlx", False),
        ("NVFP4A16", False),
    ],
)
def test_means_of_text_move_scales_and_can_be_audited(
    scheme: str, folded: bool, importance: Path, centered: Path, tmp_path: Path
) -> None:
    fold, made = shardq.find_fold("demo").fold if folded else None, {}
    for name, path, limits in (("old", importance, ONE), ("new", centered, ONE), ("two", centered, Limits(parallel=2))):
        ignore = ["lm_head"] if "mlx" in scheme else []  # which MLX quantizes, and the file does not know
        recipe = make_recipe(scheme, importance=path, fold=fold, ignore=ignore)
        shardq.quantize("demo", recipe, output_dir=tmp_path / name, limits=limits)
        made[name] = shards(tmp_path / name)
    assert made["old"] != made["new"] == made["two"]
    found = [
        e["search"] for e in entries(tmp_path / "new").values() if e["outcome"] == "quantized" and e.get("weighed")
    ]
    assert len(found) >= 45
    assert all(s["centered"] for s in found)
    assert not any(e["search"]["centered"] for e in entries(tmp_path / "old").values() if "search" in e)
    assert shardq.verify(tmp_path / "new", deep=True, source="demo").problems == ()
    assert shardq.audit(tmp_path / "new", source="demo", importance=centered).problems == ()


def test_means_of_random_ids_or_for_other_schemes_move_nothing(
    importance: Path, centered: Path, tmp_path: Path
) -> None:
    """By few ids they lose, and other scales were not measured."""
    vectors = load_file(centered)
    plain = {n: v for n, v in vectors.items() if not n.startswith("mean ")}
    means = {n.removeprefix("mean "): v for n, v in vectors.items() if n.startswith("mean ")}
    ids, bare = tmp_path / "ids", tmp_path / "bare"
    write_importance(ids, plain, Provenance("random ids", 64, 0, "demo", None, ""), means)
    write_importance(bare, plain, Provenance("random ids", 64, 0, "demo", None, ""))
    for scheme, one, other in (
        ("W4A16", ids, bare),
        ("W5A16", centered, importance),
        ("MXFP4", centered, importance),
    ):
        for name, path in (("one", one), ("other", other)):
            recipe = make_recipe(scheme, importance=path)
            shardq.quantize("demo", recipe, output_dir=tmp_path / (scheme + name), limits=ONE)
        assert shards(tmp_path / f"{scheme}one") == shards(tmp_path / f"{scheme}other")
