"""GPTQ leaves less error, as H counts it, than gptqmodel's with the same bits, groups, order and damping."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from shardq.kernels import load
from shardq.schemes import parse_name
from shardq.tune.gptq import quantize_gptq
from shardq.tune.hessians import factor_hessian

pytestmark = pytest.mark.oracle
ROWS, COLUMNS, TOKENS, GROUP = 64, 256, 1024, 64


def their_weight(weight: torch.Tensor, inputs: torch.Tensor, bits: int, first: bool) -> torch.Tensor:
    """What gptqmodel's GPTQ makes of a weight; `first`: the largest inputs first, with static groups."""
    gptqmodel = pytest.importorskip("gptqmodel.quantization.gptq", reason="`nox -s oracles` installs it")
    config = pytest.importorskip("gptqmodel.quantization").QuantizeConfig(
        bits=bits, group_size=GROUP, desc_act=first, static_groups=first, sym=True, damp_percent=0.01,
        act_group_aware=False, device="cpu",
    )  # fmt: skip
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = weight.clone()
    peer = gptqmodel.GPTQ(linear, config)
    peer.quantizer.configure(perchannel=True)
    with torch.no_grad():
        peer.add_batch(inputs[None], linear(inputs[None]), None)
        made: torch.Tensor = peer.quantize()[0].float().cpu()
    return made


@pytest.mark.parametrize("first", [True, False], ids=["static", "in order"])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_errors_are_less_than_gptqmodels(bits: int, first: bool, one_thread: None) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * 0.05
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) * 0.2 + torch.eye(COLUMNS)
    sizes = torch.exp(torch.randn(COLUMNS, generator=generator) * 0.5)
    inputs = torch.randn(TOKENS, COLUMNS, generator=generator) @ mixing * sizes
    hessian = inputs.double().T @ inputs.double()
    e = (weight - their_weight(weight, inputs, bits, first)).double()
    theirs = float(((e @ hessian) * e).sum())
    scheme = replace(parse_name(f"W{bits}A16"), group_size=GROUP)
    factored = factor_hessian(hessian.clone().numpy(), order="static" if first else "none")
    ours = quantize_gptq(weight.numpy(), factored, scheme, load())
    plain = float(ours.nearest_errors.sum())
    assert ours.errors.sum() < 0.95 * theirs
    assert theirs < 3 * plain  # it has quantized the same matrix
    assert np.isfinite(theirs)
