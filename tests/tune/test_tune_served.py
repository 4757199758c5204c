"""Inputs of matrices as servers quantize them: the numbers of round-to-nearest, for the modules that a scheme names."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from shardq.kernels import load
from shardq.quantizers.buffers import Buffers, buffer_shapes
from shardq.quantizers.decode import decode_rows
from shardq.quantizers.float_scales import global_scale
from shardq.quantizers.rtn import quantize_rows
from shardq.schemes import ACTIVATIONS, ALL_TOKENS, Activation, Exponent, Scheme, parse_scheme
from shardq.tune.served import fake_quantize, serving
from shardq.tune.subjects import Place, Subject

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, COLUMNS = 12, 256
GROUPS = "group_size", "calibrated"


def _inputs() -> Tensor:
    random = torch.Generator().manual_seed(4)
    x = torch.randn(TOKENS, COLUMNS, generator=random) * torch.randn(COLUMNS, generator=random).exp()
    x[0, :32], x[1] = 0, 0
    return x.bfloat16().float()


def _as_weight(x: Tensor, activation: Activation, exponent: Exponent) -> Tensor:
    """What round-to-nearest makes of a weight, with these groups and numbers."""
    numbers = "auto_round" if activation.scale in ("e8m0", "e5m3") and exponent == "floor" else "compressed_tensors"
    scheme = Scheme(
        activation.element, activation.group_size, symmetric=True, scale=activation.scale, numbers=numbers,
        exponent=activation.exponent or exponent if activation.scale == "e8m0" else "",
        reach="fused" if activation.calibrated else "group",
    )  # fmt: skip
    if scheme.exponent == "rceil":
        scheme = replace(scheme, exponent="ceil")  # the same for weights
    buffers = Buffers(*(np.zeros(shape, kind) for shape, kind in buffer_shapes(*x.shape, scheme)))
    amax = float(x.abs().max()) if scheme.reach == "fused" else None
    found, bad = quantize_rows(x.numpy(), "F32", scheme, buffers, np.empty((len(x), 6)), load(), amax)
    assert bad == 0
    return torch.from_numpy(decode_rows(found, scheme, load()))


@pytest.mark.parametrize(("name", "scale"), [("int8-static", 0.03), ("fp8-static", 0.005)])
def test_a_scale_that_data_gave_is_taken(name: str, scale: float) -> None:
    """Whatever comes in: what is beyond the range of the data ends at the end of the numbers."""
    x = _inputs()
    made = fake_quantize(x, ACTIVATIONS[name], "floor", scale)
    if name == "int8-static":
        expected = (x / scale).round().clamp(-128, 127) * scale
    else:
        expected = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(made, expected, rtol=0, atol=0)
    assert (made != fake_quantize(x, ACTIVATIONS[name], "floor", 2 * scale)).any()


def test_a_global_scale_that_data_gave_is_taken() -> None:
    x = _inputs()
    own = float(global_scale(float(x.abs().max()), 6.0))
    activation = ACTIVATIONS["nvfp4"]
    assert torch.equal(fake_quantize(x, activation, "floor", own), fake_quantize(x, activation, "floor"))
    assert not torch.equal(fake_quantize(x, activation, "floor", own / 3), fake_quantize(x, activation, "floor"))


@pytest.mark.parametrize("exponent", ["floor", "even", "ceil"])
@pytest.mark.parametrize("name", [n for n, a in ACTIVATIONS.items() if a.group_size != ALL_TOKENS])
def test_numbers_are_those_of_round_to_nearest(name: str, exponent: Exponent) -> None:
    activation = ACTIVATIONS[name]
    if exponent == "even" and activation.element == "e0m3":
        pytest.skip("compressed-tensors has no such element")
    x = _inputs()
    made = fake_quantize(x.reshape(3, 4, COLUMNS), activation, exponent)
    assert made.shape == (3, 4, COLUMNS)
    torch.testing.assert_close(made.reshape(x.shape), _as_weight(x, activation, exponent), rtol=0, atol=0)
    assert 0 < (made.reshape(x.shape) - x).abs().max() < 0.3 * x.abs().max()


def test_types_stay_and_short_groups_scale_themselves() -> None:
    x = _inputs()[:, :40].bfloat16()
    made = fake_quantize(x, ACTIVATIONS["mxfp4"], "floor")
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made[:, 32:], fake_quantize(x[:, 32:], ACTIVATIONS["mxfp4"], "floor"), rtol=0, atol=0)
    assert fake_quantize(x[:0], ACTIVATIONS["nvfp4"], "").shape == (0, 40)  # an expert that no token goes to


def _subject(parameter: str, scheme: str, expert: int | None = None) -> Subject:
    return Subject(parameter, parameter, (8, 8), "BF16", parse_scheme(scheme).scheme, (), Place(parameter, expert))


def test_only_matrices_of_such_schemes_are_changed_and_only_inside() -> None:
    block = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    x = torch.randn(5, 64, requires_grad=True)
    plain = block(x)
    with serving(block, [_subject("0.weight", "W8A8"), _subject("1.weight", "W8A16")], {}):
        found = block(x)
        quantized = fake_quantize(x.detach(), ACTIVATIONS["int8"], "")
        assert torch.equal(found, block[1](torch.nn.functional.linear(quantized, block[0].weight, block[0].bias)))
    assert not torch.equal(found, plain)
    assert torch.equal(block(x), plain)
    (ours,), (theirs,) = torch.autograd.grad(found.sum(), x), torch.autograd.grad(plain.sum(), x)
    assert torch.equal(ours, theirs)  # straight through


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_in_stacks_get_both_inputs_quantized(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="block mode needs transformers")
    import tuned_models as models

    from shardq.sources import open_source
    from shardq.tune.blocks import BlockModel

    folder = models.make_model(name, tmp_path / name)
    ids = models.some_ids()
    with BlockModel.open(open_source(str(folder)), dtype=torch.float32) as model, model.block(0) as block:
        batch = model.embed(ids)
        run = partial(model.run, block, batch, 0)
        with torch.no_grad():
            plain = run()
            experts = [_subject(f"mlp.experts.{p}", "W8A8", e) for p in ("gate_up_proj", "down_proj") for e in range(8)]
            errors = {}
            for part in (experts, experts[:8], experts[8:]):
                with serving(block, part, {}):
                    errors[len(part), part[0].tensor] = float((run() - plain).square().mean())
            with serving(block, [_subject("mlp.experts.down_proj", "W8A8", 99)], {}):  # nothing of it is used
                torch.testing.assert_close(run(), plain, rtol=1e-4, atol=1e-5)
            assert torch.equal(run(), plain)
    both, first, second = errors.values()
    scale = float(plain.square().mean())
    assert 0 < min(first, second) < both < 1e-2 * scale
    assert both > max(first, second) * 0.99
