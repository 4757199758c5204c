"""Our MLX checkpoints against mlx-lm's own converter, to the byte, and in mlx-lm itself."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest
import torch

import shardq
from shardq import Limits, Recipe, make_recipe
from shardq.errors import LayoutRefuses
from shardq.layouts import find_layout
from shardq.ledger import LEDGER, decode_ledger
from shardq.schemes import Scheme

pytestmark = pytest.mark.oracle
MLX: Final = find_layout("mlx")
MODELS: Final = Path(__file__).parents[1] / "layouts" / "golden" / "mlx" / "models"
SCHEMES: Final = {
    **{f"affine{bits}": Scheme(f"int{bits}", 64, symmetric=False) for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": Scheme("e2m1", 32, symmetric=True, scale="e8m0", exponent="ceil"),
    "mxfp8": Scheme("e4m3fn", 32, symmetric=True, scale="e8m0", exponent="ceil"),
    "nvfp4": Scheme("e2m1", 16, symmetric=True, scale="e4m3fn"),
}
QUESTION: Final = [{"role": "user", "content": "What is the capital of France?"}]
KNOWING: Final = {"affine5", "affine8"}  # modes in which so small a model, its embedding included, still answers
ROUTERS: Final = {"include": ["**.mlp.gate"], "layer_config": {"**.mlp.gate": {"scheme": "W8A16G64"}}}


@pytest.fixture(scope="module")
def peer(load_beside: Callable[[str], ModuleType]) -> ModuleType:
    if find_spec("mlx_lm") is None:
        pytest.skip("mlx-lm is not installed here; `nox -s oracles` installs it")
    return load_beside("peers_mlx")


@pytest.fixture(scope="module")
def convert(peer: ModuleType) -> Callable[..., Path]:
    """A function that runs mlx-lm's converter, on the CPU, for a scheme."""
    peer.mx.set_default_device(peer.mx.cpu)
    run = import_module("mlx_lm.convert").convert

    def convert_folder(source: Path, out: Path, mode: str) -> Path:
        affine = {"q_bits": SCHEMES[mode].bits, "q_group_size": SCHEMES[mode].group_size}
        run(
            str(source), mlx_path=str(out), quantize=True, **(affine if mode.startswith("affine") else {"q_mode": mode})
        )
        return out

    return convert_folder


def make_mlx_recipe(mode: str, **options: Any) -> Recipe:
    return replace(make_recipe("W4A16@mlx", **options), scheme=MLX.settle(SCHEMES[mode]))


def read_tensors(folder: Path, peer: ModuleType) -> dict[str, Any]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in peer.mx.load(str(path)).items()}


def differences(ours: Path, theirs: Path, peer: ModuleType) -> tuple[int, list[str]]:
    """Number of their tensors, and names of those that differ in type, shape or a byte, or that one lacks."""
    a, b = read_tensors(ours, peer), read_tensors(theirs, peer)
    same = {n for n in a.keys() & b.keys() if a[n].dtype == b[n].dtype and peer.mx.array_equal(a[n], b[n]).item()}
    return len(b), sorted((a.keys() | b.keys()) - same)


def load_wide(folder: Path, peer: ModuleType) -> tuple[Any, Any, Any]:
    """Model, tokenizer and prompt, to compute in float32: on a CPU mlx 0.32.4 sums quantized products in the type of
    the scales, and in bf16 even 8-bit weights then answer otherwise than those that they stand for."""
    model, tokenizer = import_module("mlx_lm").load(str(folder))
    wide = import_module("mlx.utils").tree_map(
        lambda x: x.astype(peer.mx.float32) if x.dtype == peer.mx.bfloat16 else x, model.parameters()
    )
    model.update(wide)
    return model, tokenizer, tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)


def make_dense(model: Any, read: dict[str, torch.Tensor], peer: ModuleType) -> None:
    """Put plain layers in the place of quantized ones, with the weights that those stand for."""
    plain: list[tuple[str, Any]] = []
    for name, weight in read.items():
        rows, columns = weight.shape
        embeds = isinstance(dict(model.named_modules())[name], peer.nn.QuantizedEmbedding)
        layer = peer.nn.Embedding(rows, columns) if embeds else peer.nn.Linear(columns, rows, bias=False)
        layer.weight = peer.mx.array(weight.numpy())
        plain.append((name, layer))
    model.update_modules(import_module("mlx.utils").tree_unflatten(plain))


@pytest.mark.slow
@pytest.mark.parametrize("mode", SCHEMES)
def test_a_real_model_has_the_bytes_of_mlx_lm_and_generates(
    mode: str, peer: ModuleType, convert: Callable[..., Path], smollm2: Path, tmp_path: Path
) -> None:
    shardq.quantize(smollm2, make_mlx_recipe(mode), output_dir=tmp_path / "ours", limits=Limits(parallel=1))
    count, differ = differences(tmp_path / "ours", convert(smollm2, tmp_path / "theirs", mode), peer)
    assert count > 400
    assert differ == []
    model, tokenizer, prompt = load_wide(tmp_path / "ours", peer)
    text = import_module("mlx_lm").generate(model, tokenizer, prompt, max_tokens=8)
    assert text.strip()
    assert mode not in KNOWING or "Paris" in text
    logits = model(peer.mx.array([prompt]))
    make_dense(model, peer.read_folder(tmp_path / "ours"), peer)
    expected = model(peer.mx.array([prompt]))
    assert (peer.mx.linalg.norm(logits - expected) / peer.mx.linalg.norm(expected)).item() < 1e-4


@pytest.mark.parametrize("mode", ["affine4", "mxfp4", "mxfp8", "nvfp4"])
def test_mlx_reads_what_the_ledger_says(mode: str, peer: ModuleType, tmp_path: Path) -> None:
    """A dense model: errors that mlx's own arithmetic gives are those of our ledger."""
    source = MODELS / "llama-source"
    recipe = make_mlx_recipe(mode, layer_config={"**.q_proj": {"scheme": "W8A16G32"}})
    shardq.quantize(source, recipe, output_dir=tmp_path / "out", limits=Limits(parallel=1))
    weights = {n: torch.tensor(v.astype(peer.mx.float32)) for n, v in read_tensors(source, peer).items()}
    check_ledger(peer.read_folder(tmp_path / "out"), tmp_path / "out", weights)


def check_ledger(read: dict[str, torch.Tensor], folder: Path, weights: dict[str, torch.Tensor]) -> None:
    entries = decode_ledger((folder / LEDGER).read_bytes())["tensors"]
    quantized = {n.removesuffix(".weight"): e for n, e in entries.items() if e["outcome"] == "quantized"}
    places = MLX.places(list(quantized), json.loads((folder / "config.json").read_text()))
    for module, entry in quantized.items():
        weight = read[places[module].module][places[module].index] if module in places else read[module]
        difference = weights[f"{module}.weight"] - weight
        assert difference.abs().max().item() == pytest.approx(entry["max_error"], rel=1e-5), module
        assert difference.double().square().sum().item() == pytest.approx(entry["squared_error"], rel=1e-4), module


@pytest.mark.parametrize("mode", ["affine4", "mxfp4", "nvfp4"])
def test_a_mixture_of_experts_is_stacked_and_loads(mode: str, peer: ModuleType, tmp_path: Path) -> None:
    """The whole way: byte-equal to mlx-lm's converter, router included, and read by its strict loader."""
    source, golden = MODELS / "qwen3_moe-source", MODELS / f"qwen3_moe-{mode}"
    recipe = make_mlx_recipe(mode, **ROUTERS)
    if mode == "affine4":
        recipe = replace(recipe, scheme=replace(recipe.scheme, group_size=32))  # as the golden file has it
    shardq.quantize(source, recipe, output_dir=tmp_path / "out", limits=Limits(parallel=1))
    assert differences(tmp_path / "out", golden, peer)[1] == []
    weights = {n: torch.tensor(v.astype(peer.mx.float32)) for n, v in read_tensors(source, peer).items()}
    check_ledger(peer.read_folder(tmp_path / "out"), tmp_path / "out", weights)


def test_a_family_that_mlx_lm_changes_while_it_loads_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(MODELS / "llama-source", source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "falcon_h1"}))
    with pytest.raises(LayoutRefuses, match="multiplies weights"):
        shardq.quantize(source, make_mlx_recipe("affine4"), output_dir=tmp_path / "out", limits=Limits(parallel=1))
