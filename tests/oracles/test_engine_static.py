"""Checkpoints with scales of activations in transformers with compressed-tensors (5.23.0, 0.20.0): what a torch model
computes that has our dequantized weights and rounds what comes into its matrices by these scales."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file

import shardq
from shardq import Limits, make_recipe
from shardq.kernels import load
from shardq.quantizers.decode import decode_rows
from shardq.schemes import ACTIVATIONS, PRESETS, Scheme
from shardq.sources import open_source
from shardq.tuned import TunedCodes, load_tuned, read_tuned

pytestmark = pytest.mark.oracle
NAME: Final = "llama"
NEAR: Final = 1e-5  # of logits in fp32, relative; 0 was measured, and 0.02 to 0.07 without rounding
NEAR_FP4: Final = 0.03  # of one matrix in BF16, which is all that the library computes NVFP4 in: 0.015; else 0.095


@pytest.fixture(scope="module")
def models() -> Any:
    if find_spec("compressed_tensors") is None:
        pytest.skip("compressed-tensors is not installed here; `nox -s engine_transformers` installs it")
    pytest.importorskip("transformers", reason="`nox -s engine_transformers` installs transformers")
    import tuned_models

    return tuned_models


@pytest.fixture(scope="module")
def make(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Path]]:
    """A function that makes the source, the folder of tuned codes and the output of a scheme."""
    from shardq.tune.driver import Place, tune_blocks
    from shardq.tune.options import DataOptions, TuneOptions

    base = tmp_path_factory.mktemp("static")
    source = models.make_model(NAME, base / "source")

    def make(scheme: str) -> tuple[Path, Path, Path]:
        tuned, out = base / f"{scheme}.tuned", base / scheme
        options = TuneOptions("rtn", DataOptions("random", nsamples=8, seqlen=32))
        tune_blocks(open_source(str(source)), make_recipe(scheme), options, Place(tuned))
        shardq.quantize(source, make_recipe(scheme, tuned=tuned), output_dir=out, limits=Limits(parallel=1))
        return source, tuned, out

    return make


def rounded(x: torch.Tensor, scheme: Scheme, scale: float) -> torch.Tensor:
    """Activations as a server of the scheme has them."""
    a, wide = ACTIVATIONS[scheme.activation], x.float()
    if a.element == "int8":
        return (torch.clamp(torch.round(wide / scale), -128, 127) * scale).to(x.dtype)
    if a.element == "e4m3fn":
        return (torch.clamp(wide / scale, -448, 448).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)
    groups = wide.unflatten(-1, (-1, a.group_size))
    steps = (scale * groups.abs().amax(-1, keepdim=True) / 6).clamp(max=448).to(torch.float8_e4m3fn).float() / scale
    values, limits = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    codes = torch.bucketize((groups / steps).abs(), limits)
    return (values[codes] * groups.sign() * steps).flatten(-2).to(x.dtype)


@torch.no_grad()
def put(model: Any, tuned: TunedCodes, scheme: Scheme, round_inputs: bool = True) -> Any:
    """The model with the weights that codes stand for, which rounds what comes into them."""
    for name, ref in tuned.refs.items():
        module = model.get_submodule(name)
        codes = read_tuned(ref, 0, tuned.shapes[name][0])
        module.weight.copy_(torch.from_numpy(decode_rows(codes, Scheme(**tuned.schemes[name]), load())))
        assert ref.input_scale
        if round_inputs:
            scale = ref.input_scale.value
            module.register_forward_pre_hook(lambda _, args, s=scale: (rounded(args[0], scheme, s), *args[1:]))
    return model


def load_engine(out: Path, dtype: torch.dtype) -> Any:
    """As a user loads it; fails where a tensor is missing or left over."""
    import transformers

    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=dtype, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(found.values()), found
    return model.eval()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@torch.no_grad()
@pytest.mark.parametrize("name", ["FP8_STATIC", "FP8_STATIC_TENSOR", "W8A8_STATIC"])
def test_logits_are_those_of_rounded_activations(name: str, models: Any, make: Any) -> None:
    source, folder, out = make(name)
    tuned, scheme, ids = load_tuned(folder), PRESETS[name].scheme, models.some_ids()
    theirs = load_engine(out, torch.float32)(ids).logits
    ours = put(models.load_whole(source), tuned, scheme)(ids).logits
    plain = put(models.load_whole(source), tuned, scheme, round_inputs=False)(ids).logits
    assert difference(theirs, ours) < NEAR
    assert difference(theirs, plain) > 1000 * NEAR


@torch.no_grad()
@pytest.mark.parametrize("layout", ["compressed-tensors", "auto_round"])
def test_nvfp4_rounds_activations_below_their_global_scale(layout: str, models: Any, make: Any) -> None:
    """auto-round's own reader computes just what is expected here."""
    if layout == "auto_round" and find_spec("auto_round") is None:
        pytest.skip("auto-round is not installed here; `nox -s oracles` installs it")
    source, folder, out = make(f"NVFP4@{layout}")
    tuned, scheme, ids = load_tuned(folder), PRESETS["NVFP4"].scheme, models.some_ids()
    engine, ours, plain = (
        load_engine(out, torch.bfloat16),
        put(models.load_whole(source, torch.bfloat16), tuned, scheme),
        put(models.load_whole(source, torch.bfloat16), tuned, scheme, round_inputs=False),
    )
    found = []
    for model in (engine, ours, plain):
        module = model.get_submodule("model.layers.0.self_attn.q_proj")
        module.register_forward_hook(lambda _, args, result: found.append(result))
        model(ids)
    theirs, expected, other = found
    assert difference(theirs, expected) < NEAR_FP4
    assert difference(theirs, other) > 2 * NEAR_FP4


def test_files_have_the_tensors_that_compressed_tensors_registers(models: Any, make: Any) -> None:
    """Names, types and shapes are those of the modules that the library initializes."""
    for name in ("FP8_STATIC", "W8A8_STATIC", "NVFP4"):
        _, _, out = make(name)
        engine = load_engine(out, torch.bfloat16)
        module = engine.get_submodule("model.layers.1.mlp.down_proj")
        registered = {n: p for n, p in module.named_parameters() if n.startswith("input")}
        tensors = load_file(out / "model.safetensors")
        written = {n: tensors[f"model.layers.1.mlp.down_proj.{n}"] for n in registered}
        assert {n: (t.dtype, t.shape) for n, t in written.items()} == {
            n: (p.dtype, p.shape) for n, p in registered.items()
        }
        assert len(registered) == 1
        assert all(torch.equal(written[n], p.data) for n, p in registered.items())
