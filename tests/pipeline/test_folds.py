"""Folded runs: what they write is what the same run makes of a checkpoint that was folded beforehand, however they are
cut; and all of it can be verified and audited."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import shardq
from shardq import Limits, dequantize_recipe, find_fold, make_recipe
from shardq.errors import BadFold, BadOption, NotExact, VerifyFailed
from shardq.fold import FOLD, Fold, read_fold, write_fold
from shardq.importance_files import Provenance, write_importance
from shardq.importance_vectors import BothRef, SizesRef, read_vector, weights_of
from shardq.kernels import sets
from shardq.ledger import LEDGER, decode_ledger
from shardq.opening import make_orders
from shardq.run import quantize_all
from shardq.sources.demo import open_demo

ONE: Final = Limits(parallel=1)
SCHEMES: Final[Mapping[str, Mapping[str, Any]]] = {
    "W4A16": {}, "W4A16_ASYM@gptq_v2": {}, "NVFP4A16": {}, "FP8_DYNAMIC": {}, "W4A16@mlx": {"group_size": 64},
    "W4A16@compressed-tensors": {}, "MXFP4": {"ignore": ["re:.*[qkv]_proj"]},
}  # fmt: skip
FED: Final = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("gate", "gate_proj", "up_proj", "shared_expert_gate"),
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as a folder, with columns of other sizes, so that there is something to move."""
    folder = tmp_path_factory.mktemp("demo")
    for name, content in open_demo().contents.items():
        (folder / name).write_bytes(content)
    rng = torch.Generator().manual_seed(2)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, value in tensors.items():
            if value.ndim == 2 and ".layers." in name:
                value.mul_(torch.exp2(1.5 * torch.randn(value.shape[1], generator=rng)).to(value.dtype))
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def fold(demo: Path) -> Fold:
    found = find_fold(demo).fold
    assert len(found.exponents) == len(found.sizes) == 3 * 3 + 1 + 2 * 5
    assert all(set(x) == {0, 1, 255} for x in found.exponents.values())  # one step at most
    return found


@pytest.fixture(scope="module")
def folded(demo: Path, fold: Fold, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with its scales moved, by means that are this test's own."""
    folder = tmp_path_factory.mktemp("folded")
    exponents = {m: torch.from_numpy(np.frombuffer(x, np.int8).astype(np.float32)) for m, x in fold.exponents.items()}
    powers = {m: torch.exp2(x) for m, x in exponents.items()}
    for path in demo.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
            continue
        tensors = load_file(path)
        for name, value in tensors.items():
            module, _, leaf = name.rpartition(".")
            layer, _, below = module.rpartition(".layers.")[2].partition(".")
            for norm, fed in FED.items():
                if below.endswith(fed) and leaf == "weight" and layer.isdigit():
                    value.div_(powers[f"model.layers.{layer}.{norm}"].to(value.dtype))
            if below.endswith("o_proj"):  # two query heads for each of two others
                own = powers[f"model.layers.{layer}.self_attn.v_proj"].reshape(2, 1, 64)
                value.div_(own.expand(2, 2, 64).reshape(-1).to(value.dtype))
            if below.endswith("down_proj"):
                value.div_(powers[module.replace("down_proj", "up_proj")].to(value.dtype))
            if module in powers:
                value.mul_(powers[module].to(value.dtype).reshape(-1, *[1] * (value.ndim - 1)))
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
    return folder


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_folded_run_writes_what_a_folded_checkpoint_gives(
    scheme: str, demo: Path, fold: Fold, folded: Path, tmp_path: Path
) -> None:
    options = SCHEMES[scheme]
    recipe = make_recipe(scheme, fold=fold, search="none", **options)
    shardq.quantize(demo, recipe, output_dir=tmp_path / "out", limits=ONE)
    shardq.quantize(folded, make_recipe(scheme, **options), output_dir=tmp_path / "expected", limits=ONE)
    assert shards(tmp_path / "out") == shards(tmp_path / "expected")
    found = shardq.verify(tmp_path / "out", deep=True, source=demo)
    assert found.problems == ()
    assert shardq.audit(tmp_path / "out", source=demo, sample=1000).problems == ()
    assert shardq.verify(tmp_path / "out", source=folded).problems != ()


@pytest.mark.parametrize("mode", ["file", "stream"])
@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16"])
def test_the_same_by_any_way(
    scheme: str, mode: str, demo: Path, fold: Fold, make_model: Callable[[Path], Any], short_spans: int, tmp_path: Path
) -> None:
    recipe = make_recipe(scheme, fold=fold)
    del short_spans  # is set
    shardq.quantize(demo, recipe, output_dir=tmp_path / "folder", limits=ONE)
    limits = Limits(parallel=3, stream=mode == "stream")
    source = make_model(demo).open()
    order = make_orders([recipe], source.label, tmp_path / mode)
    quantize_all(source, order, limits, restart=False, report=lambda _: None, check=lambda _: None)
    assert shards(tmp_path / mode) == shards(tmp_path / "folder")


def test_several_outputs_share_one_fold(demo: Path, fold: Fold, tmp_path: Path) -> None:
    recipes = [make_recipe(s, fold=fold) for s in ("W4A16@gptq", "MXFP4")]
    made = shardq.quantize_many(demo, recipes, output_dir=tmp_path, limits=ONE)
    for recipe, result in zip(recipes, made, strict=True):
        shardq.quantize(demo, recipe, output_dir=tmp_path / "alone" / recipe.layout, limits=ONE)
        assert shards(Path(result.output)) == shards(tmp_path / "alone" / recipe.layout)
    with pytest.raises(BadOption, match="one --fold for all"):
        shardq.quantize_many(demo, [recipes[0], make_recipe("MXFP4")], output_dir=tmp_path, limits=ONE)


def test_what_is_moved_is_recorded(demo: Path, fold: Fold, tmp_path: Path) -> None:
    recipe = make_recipe("W4A16", fold=fold)
    shardq.quantize(demo, recipe, output_dir=tmp_path / "out", limits=ONE)
    kept = read_fold(tmp_path / "out" / FOLD)
    assert kept.exponents == fold.exponents
    record = json.loads((tmp_path / "out" / "shardq.json").read_text())
    assert record["identity"]["recipe.fold"] == fold.sha256
    assert f"--fold {FOLD}" in record["command"]
    write_fold(tmp_path / "out" / FOLD, replace(fold, power=3))
    with pytest.raises(VerifyFailed, match="has sha256"):
        shardq.verify(tmp_path / "out")
    (tmp_path / "out" / FOLD).write_bytes(b"no frame")
    with pytest.raises(VerifyFailed, match="no readable"):
        shardq.audit(tmp_path / "out", source=demo)


def test_a_wrong_bit_in_a_norm_is_found(demo: Path, fold: Fold, tmp_path: Path) -> None:
    made = shardq.quantize(demo, make_recipe("W4A16", fold=fold), output_dir=tmp_path / "out", limits=ONE)
    name = "model.layers.1.input_layernorm.weight"
    path = next(p for p in sorted(Path(made.output).glob("*.safetensors")) if name in load_file(p))
    tensors = load_file(path)
    tensors[name][7] *= 2
    save_file(tensors, path, metadata={"format": "pt"})
    problems = shardq.verify(made.output, source=demo).problems
    assert any(name in p for p in problems)
    assert any(name in p for p in shardq.audit(made.output, source=demo, sample=1000).problems)


def refused(demo: Path, fold: Fold, **options: Any) -> None:
    shardq.plan(demo, make_recipe("W4A16", fold=fold, **options))


def test_folds_that_do_not_fit_are_refused(demo: Path, fold: Fold) -> None:
    own = dict(fold.exponents)
    norm, rows = "model.layers.0.input_layernorm", "model.layers.0.mlp.up_proj"
    for wrong, text in (
        ({**own, norm: bytes(3)}, "expected 256 scales"),
        ({**own, rows: bytes(511) + b"\x40"}, "expected 512 scales"),  # 2**64
        ({**own, "model.layers.7.input_layernorm": bytes(256)}, "no place for"),
        ({**own, "model.norm": bytes(256)}, "no place for"),
    ):
        with pytest.raises(BadFold, match=text):
            refused(demo, replace(fold, exponents=wrong))
    ones = np.ones(256, "<f4").tobytes()
    with pytest.raises(BadFold, match="expected 256 scales, I8"):
        refused(demo, replace(fold, factors={norm: ones}))
    with pytest.raises(BadFold, match="another checkpoint"):
        refused(demo, replace(fold, factors={norm: ones}, source="of another one"))
    with pytest.raises(BadFold, match="expected 256 sizes, found 3"):
        refused(demo, replace(fold, sizes={norm: bytes(3)}))


def test_models_that_are_not_known_are_refused(demo: Path, tmp_path: Path) -> None:
    shutil.copytree(demo, tmp_path, dirs_exist_ok=True)
    config = json.loads((demo / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(BadOption, match="unheard_of"):
        find_fold(tmp_path)


def test_half_precision_is_folded_where_it_keeps_its_digits(demo: Path, tmp_path: Path) -> None:
    """Its exponents end early: what is quantized is taken in fp32, and what is kept is not folded."""
    source = tmp_path / "source"
    shutil.copytree(demo, source)
    for path in source.glob("*.safetensors"):
        half = {k: v.half() if v.dtype == torch.bfloat16 else v for k, v in load_file(path).items()}
        save_file(half, path, metadata={"format": "pt"})
    recipe = make_recipe("W4A16")
    found = find_fold(source, recipe)
    expected = [f"model.layers.{n}.post_attention_layernorm.weight" for n in (1, 2)]  # they feed gates, which are kept
    assert [line.partition(":")[0] for line in found.left] == expected
    recipe = make_recipe("W4A16", fold=found.fold)
    shardq.quantize(source, recipe, output_dir=tmp_path / "out", limits=ONE)
    assert shardq.verify(tmp_path / "out", deep=True, source=source).problems == ()
    assert shardq.audit(tmp_path / "out", source=source, sample=1000).problems == ()
    with pytest.raises(BadFold, match=r"_proj.weight is kept .*F16"):
        shardq.plan(source, make_recipe("W4A16", fold=found.fold, ignore=["re:.*[qkv]_proj"]))


def test_a_norm_of_half_precision_that_would_lose_digits_ends_the_run(demo: Path, fold: Fold, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(demo, source)
    for path in source.glob("*.safetensors"):
        half = {k: v.half() if v.ndim == 1 else v for k, v in load_file(path).items()}
        for name, value in half.items():
            if name.endswith("layernorm.weight"):
                value[5] = 3 * 2.0**-24
        save_file(half, path, metadata={"format": "pt"})
    down = replace(fold, exponents={m: bytes([255] * len(x)) for m, x in fold.exponents.items()})
    with pytest.raises(NotExact, match="layernorm"):
        shardq.quantize(source, make_recipe("W4A16", fold=down), output_dir=tmp_path / "out", limits=ONE)


def test_a_quantized_source_is_folded_as_what_it_stands_for(demo: Path, tmp_path: Path) -> None:
    shardq.quantize(demo, "FP8_BLOCK@fp8", output_dir=tmp_path / "fp8", limits=ONE)
    shardq.quantize(tmp_path / "fp8", dequantize_recipe(), output_dir=tmp_path / "plain", limits=ONE)
    fold = find_fold(tmp_path / "plain").fold
    assert find_fold(tmp_path / "fp8", make_recipe("W4A16", decode="rounded")).fold.exponents == fold.exponents
    for name in ("fp8", "plain"):
        recipe = make_recipe("W4A16", fold=fold, decode="rounded")
        shardq.quantize(tmp_path / name, recipe, output_dir=tmp_path / f"{name}-out", limits=ONE)
    assert shards(tmp_path / "fp8-out") == shards(tmp_path / "plain-out")
    assert shardq.verify(tmp_path / "fp8-out", deep=True, source=tmp_path / "fp8").problems == ()


def test_codes_are_not_carried_where_their_scales_were_moved(demo: Path, tmp_path: Path) -> None:
    shardq.quantize(demo, "W4A16@gptq", output_dir=tmp_path / "gptq", limits=ONE)
    fold = find_fold(tmp_path / "gptq").fold
    plain = shardq.plan(tmp_path / "gptq", make_recipe("W4A16@gptq"))
    moved = shardq.plan(tmp_path / "gptq", make_recipe("W4A16@gptq", fold=fold))
    assert sum(d.carried for d in plain.decisions) > 40
    assert [d.tensor.name for d in moved.decisions if d.carried] == []


def test_a_file_of_importance_counts_for_inputs_as_they_come_out(
    demo: Path, fold: Fold, folded: Path, tmp_path: Path
) -> None:
    """Inputs of columns that were divided are as much larger: what a file says of them is of the model as it was."""
    fold = replace(fold, sizes={})
    rng = np.random.default_rng(4)
    modules = {d.tensor.module: d.tensor.shape for d in shardq.plan(demo).decisions if d.scheme}
    vectors = {m: rng.lognormal(0, 2, shape[1]).astype(np.float32) for m, shape in modules.items() if shape}
    moved = {
        d.tensor.module: d.tensor for d in shardq.plan(demo, make_recipe("W4A16", fold=fold)).decisions if d.scheme
    }
    after = {}
    for module, vector in vectors.items():
        (e,) = moved[module].encoded
        assert e.scaling
        after[module] = np.ldexp(vector, -2 * np.frombuffer(e.scaling.columns, np.int8).astype(np.int32))
    for name, content in (("before", vectors), ("after", after)):
        write_importance(tmp_path / name, content, Provenance("unknown", None, None, "demo", None, ""))
    recipe = make_recipe("W4A16", fold=fold, importance=tmp_path / "before")
    shardq.quantize(demo, recipe, output_dir=tmp_path / "out", limits=ONE)
    expected = make_recipe("W4A16", importance=tmp_path / "after")
    shardq.quantize(folded, expected, output_dir=tmp_path / "expected", limits=ONE)
    assert shards(tmp_path / "out") == shards(tmp_path / "expected")
    audited = shardq.audit(tmp_path / "out", source=demo, sample=1000, importance=tmp_path / "before")
    assert audited.problems == ()


@pytest.mark.parametrize("scheme", ["W4A16", "W2A16G32", "W4A16_ASYM@gptq_v2", "NVFP4A16", "MXFP4"])
def test_sizes_of_columns_weigh_errors_without_data(scheme: str, demo: Path, tmp_path: Path) -> None:
    fold = find_fold(demo, scheme).fold
    assert any(any(x) for x in fold.exponents.values()) == (scheme != "W2A16G32")
    shardq.quantize(demo, make_recipe(scheme, fold=fold), output_dir=tmp_path / "out", limits=ONE)
    entries = decode_ledger((tmp_path / "out" / LEDGER).read_bytes())["tensors"]
    searched = [e for e in entries.values() if e["outcome"] == "quantized"]
    assert all(e["weighed"] for e in searched)
    assert {e["search"]["objective"] for e in searched} == {"none" if scheme.startswith("NV") else "root"}
    assert sum(e["losses"][1] for e in searched) < sum(e["losses"][0] for e in searched)
    assert shardq.verify(tmp_path / "out", deep=True, source=demo).problems == ()
    assert shardq.audit(tmp_path / "out", source=demo, sample=1000).problems == ()


def test_dead_columns_do_not_outweigh_the_others(demo: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(demo, source)
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        for name, value in tensors.items():
            if name.endswith("v_proj.weight"):
                value[:, 3] = 0
                value[:, 4] *= 1e-6
        save_file(tensors, path, metadata={"format": "pt"})
    fold, before = find_fold(source).fold, find_fold(demo).fold
    for layer in range(3):
        module = f"model.layers.{layer}.input_layernorm"
        sizes = np.frombuffer(fold.sizes[module], np.int8).astype(int)
        assert (sizes[3], sizes[4]) == (0, -64)
        assert np.abs(sizes - np.frombuffer(before.sizes[module], np.int8))[5:].max() <= 2
        vector = weights_of(read_vector(SizesRef(fold.sizes[module], 4)))
        assert len(set(vector.tolist())) > 20


def test_data_and_sizes_count_together(demo: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    modules = {d.tensor.module: d.tensor.shape for d in shardq.plan(demo).decisions if d.scheme}
    vectors = {m: rng.lognormal(0, 3, shape[1]).astype(np.float32) for m, shape in modules.items() if shape}
    path = tmp_path / "file"
    write_importance(path, vectors, Provenance("unknown", None, None, "demo", None, ""))
    recipe = make_recipe("W4A16", importance=path)
    fold = find_fold(demo, recipe).fold
    plan = shardq.plan(demo, replace(recipe, fold=fold))
    norm, module = "model.layers.1.input_layernorm", "model.layers.1.self_attn.q_proj"
    sizes, powers = (np.frombuffer(x[norm], np.int8).astype(float) for x in (fold.sizes, fold.exponents))
    expected = np.sqrt(weights_of(vectors[module])) * 2.0 ** (-4 * sizes / 16 + 2 * powers)
    found = read_vector(plan.searches.vectors[f"{module}.weight"])
    assert np.abs(found / expected - 1).max() < 1e-6
    assert {s.objective for s in plan.searches.searches.values()} == {"none"}
    shardq.quantize(demo, plan.recipe, output_dir=tmp_path / "out", limits=ONE)
    scales = json.loads((tmp_path / "out" / "shardq.json").read_text())["scales"]
    assert scales["importance"] == "file and the sizes of columns"
    assert shardq.audit(tmp_path / "out", source=demo, sample=1000, importance=path).problems == ()


@pytest.mark.parametrize(
    ("scheme", "with_data", "folds", "power"),
    [("W4A16", False, True, 4), ("W4A16", True, True, 4), ("W3A16", False, False, 2), ("W3A16", True, True, 4),
     ("W2A16G32", True, False, 2), ("NVFP4A16", False, True, 4), ("NVFP4A16", True, True, 2),
     ("MXFP4", False, True, 4)],
)  # fmt: skip
def test_each_scheme_has_the_fold_that_measured_best(
    scheme: str, with_data: bool, folds: bool, power: int, demo: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(scheme)
    if with_data:
        modules = {d.tensor.module: d.tensor.shape for d in shardq.plan(demo, recipe).decisions if d.scheme}
        ones = {m: np.ones(shape[1], np.float32) for m, shape in modules.items() if shape}
        write_importance(tmp_path / "ones", ones, Provenance("unknown", None, None, "demo", None, ""))
        recipe = make_recipe(scheme, importance=tmp_path / "ones")
    fold = find_fold(demo, recipe).fold
    assert (bool(fold.exponents), fold.power) == (folds, power)


def test_both_signs_are_tried_at_3_bits_where_data_and_sizes_count_together(demo: Path, tmp_path: Path) -> None:
    modules = {d.tensor.module: d.tensor.shape for d in shardq.plan(demo).decisions if d.scheme}
    ones = {m: np.ones(shape[1], np.float32) for m, shape in modules.items() if shape}
    write_importance(tmp_path / "ones", ones, Provenance("random ids", 64))
    found = {}
    for scheme, moved in (("W3A16", True), ("W3A16", False), ("W4A16", True)):
        recipe = make_recipe(scheme, importance=tmp_path / "ones")
        plan = shardq.plan(demo, replace(recipe, fold=find_fold(demo, recipe).fold) if moved else recipe)
        both = {n for n, v in plan.searches.vectors.items() if isinstance(v, BothRef)}
        assert bool(both) is moved
        found[scheme, moved] = {s.signs for n, s in plan.searches.searches.items() if n in both or not moved}
    assert found == {("W3A16", True): {"both"}, ("W3A16", False): {"range"}, ("W4A16", True): {"range"}}


def test_what_sizes_count() -> None:
    sizes, powers = bytes([0, 16, 240, 8, 127]), bytes([0, 1, 255, 0, 0])  # 240 is -16, 255 is -1
    found = read_vector(SizesRef(sizes, 4, powers))
    assert found.tolist() == [1, 2.0**-2, 2.0**2, 2.0**-2, np.float32(2.0 ** (-127 / 4))]


@pytest.mark.parametrize("name", [s.name for s in sets() if s.usable])
def test_any_kernel_set_writes_the_same(
    name: str, demo: Path, fold: Fold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("W4A16", fold=fold)
    shardq.quantize(demo, recipe, output_dir=tmp_path / "expected", limits=ONE)
    monkeypatch.setenv("SHARDQ_KERNELS", name)
    assert find_fold(demo).fold.sha256 == fold.sha256
    shardq.quantize(demo, recipe, output_dir=tmp_path / "out", limits=ONE)
    assert shards(tmp_path / "out") == shards(tmp_path / "expected")
