"""What SignRound learns with, beside auto-round 0.16.1's own functions: the same V and factors give the same weights
and the same gradients; inputs of matrices become its numbers, or those of compressed-tensors 0.20.0; steps go alike.

NVFP4 multiplies by reciprocals there, and divides here as its readers do, so single numbers next to a tie may differ.
Gradients of scales of fp16 are of fp16 there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from shardq.layouts import find_layout
from shardq.schemes import ACTIVATIONS, Scheme, parse_scheme
from shardq.tune.rounding import make_grid
from shardq.tune.rounding_parts import Part
from shardq.tune.served import fake_quantize
from shardq.tune.steps import Moved, SignSteps

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("one_thread")]
ROWS, COLUMNS, BLOCK = 256, 512, 128
THRESHOLD: Final = 1e-5


@pytest.fixture
def peer() -> Callable[[str], Any]:
    """A module of auto-round."""
    pytest.importorskip("auto_round", reason="`nox -s oracles` installs it")
    return lambda name: import_module(f"auto_round.data_type.{name}")


def _scheme(name: str, layout: str = "auto_round", **changed: Any) -> Scheme:
    return replace(find_layout(layout).settle(parse_scheme(name).scheme), **changed)


Theirs = Callable[[Callable[[str], Any], Scheme, Tensor, Tensor, tuple[Tensor, ...]], Tensor]


def _integers(peer: Callable[[str], Any], s: Scheme, w: Tensor, v: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    kind = {"fp16": torch.float16, "weight": torch.float32}[s.scale]
    function = peer("int").quant_tensor_sym if s.symmetric else peer("int").quant_tensor_asym
    found: Tensor = function(
        w, s.bits, s.group_size, v.flatten(0, -2), min_scale=factors[0], max_scale=factors[1], scale_dtype=kind,
        q_scale_thresh=THRESHOLD,
    )[0]  # fmt: skip
    return found


def _mx(peer: Callable[[str], Any], s: Scheme, w: Tensor, v: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    kind = "mx_int4" if s.element == "e0m3" else "mx_fp"
    found: Tensor = peer("mxfp").quant_mx(w, s.bits, 32, v.flatten(0, 1), factors[0].flatten(), data_type=kind)[0]
    return found


def _nvfp4(peer: Callable[[str], Any], s: Scheme, w: Tensor, v: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    del s
    whole = peer("nvfp").calculate_gparam(w)
    found: Tensor = peer("nvfp").nv_fp4(w, 4, 16, v.flatten(0, 1), whole, factors[0].flatten())[0]
    return found


def _e5m3(peer: Callable[[str], Any], s: Scheme, w: Tensor, v: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    del s
    found: Tensor = peer("nvfp").nvfp4_v2(w, 4, 16, v.flatten(0, 1), factors[0].flatten())[0]
    return found


def _fp8(peer: Callable[[str], Any], s: Scheme, w: Tensor, v: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    size = 0 if s.reach == "tensor" else -1
    v = v.reshape(1, -1) if s.reach == "tensor" else v.flatten(1)
    found: Tensor = peer("fp8").quant_fp8_sym(w, factors[0].flatten(), group_size=size, v=v)[0]
    return found


def _fp8_block(peer: Callable[[str], Any], s: Scheme, w: Tensor, v: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    del s
    blocks = v.reshape(ROWS // BLOCK, BLOCK, COLUMNS // BLOCK, BLOCK).permute(0, 2, 1, 3)
    found: Tensor = peer("fp8").quant_block_fp_sym(w, factors[0], group_size=(BLOCK, BLOCK), v=blocks)[0]
    return found


@dataclass(frozen=True, slots=True)
class Case:
    scheme: Scheme
    theirs: Theirs
    near: float = 0.0  # share of weights that may be others
    slack: float = 1e-3  # of gradients


CASES: Final = {
    "W4A16G32": Case(_scheme("W4A16G32"), _integers, slack=2e-2),
    "W2A16": Case(_scheme("W2A16"), _integers, slack=2e-2),
    "W4A16_ASYM": Case(_scheme("W4A16_ASYM"), _integers, slack=2e-2),
    "W8A8": Case(_scheme("W8A8", "compressed-tensors"), _integers),
    "MXFP4": Case(_scheme("MXFP4"), _mx),
    "MXFP8": Case(_scheme("MXFP8"), _mx),
    "MXFP6": Case(_scheme("MXFP6A16", numbers="auto_round", exponent="floor"), _mx),
    "MXINT4": Case(_scheme("MXINT4"), _mx),
    "NVFP4": Case(_scheme("NVFP4A16", "compressed-tensors"), _nvfp4, near=1e-4),
    "NVFP4_E5M3": Case(_scheme("NVFP4_E5M3"), _e5m3),
    "FP8_DYNAMIC": Case(_scheme("FP8_DYNAMIC", "compressed-tensors", scale="fp32"), _fp8),
    "FP8_TENSOR": Case(_scheme("FP8_TENSOR", "compressed-tensors", scale="fp32"), _fp8),
    "FP8_BLOCK": Case(_scheme("FP8_BLOCK", "fp8"), _fp8_block),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_and_gradients_are_auto_rounds(name: str, peer: Callable[[str], Any]) -> None:
    case = CASES[name]
    random = torch.Generator().manual_seed(8)
    weight = torch.randn(ROWS, COLUMNS, generator=random) * 0.05
    amax = float(weight.abs().max()) if case.scheme.reach != "group" else None
    grid = make_grid(weight, case.scheme, "F32", [Part(slice(0, ROWS), amax)])
    v = (torch.rand(grid.form, generator=random) - 0.5) * 0.8
    factors = [torch.rand(e.shape, generator=random) * 0.4 + 0.6 for e in grid.extremes]
    pull = torch.randn(ROWS, COLUMNS, generator=random)
    theirs = [p.clone().requires_grad_() for p in (v, *factors)]
    rounded = grid.round(v, *factors)
    found = grid.values(rounded).reshape(ROWS, COLUMNS)
    expected = case.theirs(peer, case.scheme, weight, theirs[0], tuple(theirs[1:]))
    same = torch.isclose(found, expected, rtol=2e-6, atol=1e-9)
    assert 1 - float(same.float().mean()) <= case.near
    by_v, *sums = grid.pull(pull.reshape(grid.form), v, factors, rounded)
    (expected * pull).sum().backward()  # type: ignore[no-untyped-call]
    for ours, other in zip((by_v, *grid.gather(sums, factors)), theirs, strict=True):
        assert other.grad is not None
        assert other.grad.abs().mean() > 0
        alike = torch.isclose(ours, other.grad, rtol=case.slack, atol=case.slack * float(other.grad.abs().mean()))
        assert 1 - float(alike.float().mean()) <= max(16 * case.near, 1e-4)


def _x() -> Tensor:
    random = torch.Generator().manual_seed(9)
    return torch.randn(64, COLUMNS, generator=random) * torch.randn(COLUMNS, generator=random).exp()


@pytest.mark.parametrize(
    ("name", "module", "function", "words"),
    [
        ("mxfp4", "mxfp", "quant_mx", {"bits": 4, "group_size": 32}),
        ("mxfp8", "mxfp", "quant_mx", {"bits": 8, "group_size": 32}),
        ("mxint4", "mxfp", "quant_mx", {"bits": 4, "group_size": 32, "data_type": "mx_int4"}),
        ("mxfp4-rceil", "mxfp", "quant_mx_rceil", {"bits": 4, "group_size": 32}),
        ("mxfp8-rceil", "mxfp", "quant_mx_rceil", {"bits": 8, "group_size": 32}),
        ("nvfp4", "nvfp", "nv_fp4_with_static_gs", {}),
        ("nvfp4-e5m3", "nvfp", "nvfp4_v2", {"group_size": 16}),
        ("fp8", "fp8", "quant_fp8_sym", {"group_size": -1}),
        ("fp8-g128", "fp8", "quant_fp8_sym", {"group_size": 128}),
    ],
)
def test_inputs_become_auto_rounds(
    name: str, module: str, function: str, words: dict[str, Any], peer: Callable[[str], Any]
) -> None:
    x = _x()
    expected = getattr(peer(module), function)(x.clone(), **words)[0]
    found = fake_quantize(x, ACTIVATIONS[name], "floor")
    same = torch.isclose(found, expected, rtol=2e-6, atol=1e-9)
    assert 1 - float(same.float().mean()) <= (1e-4 if name == "nvfp4" else 0)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("int4", {"num_bits": 4, "type": "int", "strategy": "token"}),
        ("int8", {"num_bits": 8, "type": "int", "strategy": "token"}),
        ("fp8", {"num_bits": 8, "type": "float", "strategy": "token"}),
        ("fp8-g128", {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128}),
    ],
)
def test_inputs_become_compressed_tensors(name: str, args: dict[str, Any]) -> None:
    quantization: Any = pytest.importorskip(
        "compressed_tensors.quantization", reason="`nox -s oracles` installs compressed-tensors"
    )
    forward = import_module("compressed_tensors.quantization.lifecycle.forward")
    helpers = import_module("compressed_tensors.quantization.utils.helpers")
    wanted = quantization.QuantizationArgs(dynamic=True, symmetric=True, **args)
    x = _x()
    scale, zero = helpers.compute_dynamic_scales_and_zp(x[None], wanted, torch.nn.Linear(1, 1))
    expected = forward.fake_quantize(x[None], scale, zero, wanted)[0]
    torch.testing.assert_close(fake_quantize(x, ACTIVATIONS[name], ""), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_are_those_of_auto_rounds_sign_sgd(momentum: float) -> None:
    peer: Any = pytest.importorskip(
        "auto_round.algorithms.quantization.sign_round.sign_sgd", reason="`nox -s oracles` installs auto-round"
    )
    random = torch.Generator().manual_seed(2)
    ours, theirs = torch.zeros(50, requires_grad=True), torch.zeros(50, requires_grad=True)
    steps = SignSteps([Moved((ours,), 0.1, bounded=False)], momentum)
    sgd = peer.SignSGD([theirs], lr=torch.tensor(0.1), momentum=momentum, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(sgd, start_factor=1.0, end_factor=0.0, total_iters=10)
    for step in range(10):
        grad = torch.randn(50, generator=random)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        steps.move(1 - step / 10)
        sgd.step()
        schedule.step()
        torch.testing.assert_close(ours, theirs)
