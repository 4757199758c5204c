"""Learned rounding of integers: numbers and gradients of auto-round's formulas, and codes for what the loss saw."""

import numpy as np
import pytest
import torch

from shardq.errors import BadOption
from shardq.kernels import load
from shardq.layouts import find_layout
from shardq.quantizers.decode import decode_rows
from shardq.schemes import BLOCKS, Scheme, parse_name
from shardq.tune.rounding import Learned, make_grid
from shardq.tune.rounding_integers import IntegerGrid, make_integers
from shardq.tune.rounding_parts import TYPES
from shardq.tune.rounding_tiles import keep_codes

ROWS, COLUMNS = 6, 80  # groups of 32 end in a short one


def _scheme(name: str, layout: str) -> Scheme:
    return find_layout(layout).settle(parse_name(name))


CASES = [
    (_scheme(name, layout), dtype)
    for name, layout, dtype in (
        ("W4A16G32", "auto_round", "BF16"),
        ("W2A16G32", "auto_round", "BF16"),
        ("W3A16G32-ASYM", "auto_round", "F16"),
        ("W4A16G32", "compressed-tensors", "BF16"),
        ("W8A16G32", "compressed-tensors", "F32"),
        ("W4A16G32-ASYM", "compressed-tensors", "BF16"),
        ("W4A16G32", "mlx", "BF16"),
    )
]


def _weight() -> torch.Tensor:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)) * 0.1
    weight[0, :32] = 0  # a group of zeros
    weight[1, :32] = weight[1, :32].abs()  # extremes on one side
    weight[2, 0], weight[2, 1] = 0.75, -0.75
    weight[2, 2:32] = 0.1  # extremes of one size
    return weight.bfloat16().float()


def _parameters(grid: IntegerGrid, seed: int) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    v = (torch.rand(grid.form, generator=random) - 0.5) * 0.8
    factors = [torch.rand(grid.form[0], generator=random) * 0.5 + 0.5 for _ in range(2)]
    return tuple(p.requires_grad_() for p in (v, *factors))


def _through(values: torch.Tensor) -> torch.Tensor:
    """Rounded, with the gradient of the identity."""
    return values + (values.round() - values).detach()


def _plain(grid: IntegerGrid, v: torch.Tensor, low_factor: torch.Tensor, high_factor: torch.Tensor) -> torch.Tensor:
    """The formulas, as torch differentiates them."""

    def kept(values: torch.Tensor) -> torch.Tensor:  # with the gradient in fp32, which torch rounds with the values
        return values + (values.to(TYPES[grid.stored]).float() - values).detach()

    def stored(scales: torch.Tensor) -> torch.Tensor:
        least = torch.tensor(1e-5).to(TYPES[grid.stored]).float()
        found = torch.where(scales < 0, torch.minimum(kept(scales), -least), torch.maximum(kept(scales), least))
        return found[:, None]

    low, high = grid.low * low_factor, grid.high * high_factor
    if grid.rule == "symmetric":
        most = 1 << (grid.bits - 1)
        sign = 2 * (high < -low).int() - 1
        scale = stored(sign * torch.max(high, -low) / most)
        return scale * torch.clamp(_through(grid.weight / scale + v), -most, most - 1)
    most = (1 << grid.bits) - 1
    scale = stored((high - low) / most)
    if grid.rule == "zero":
        zero = _through(-low[:, None] / scale)
        return scale * (torch.clamp(_through(grid.weight / scale + v) + zero, 0, most) - zero)
    bias = kept(low)[:, None]
    return scale * torch.clamp(_through((grid.weight - bias) / scale + v), 0, most) + bias


@pytest.mark.parametrize(("scheme", "dtype"), CASES)
def test_values_and_gradients_are_those_of_the_formulas(scheme: Scheme, dtype: str) -> None:
    grid = make_integers(_weight(), scheme, dtype)
    ours, plain = _parameters(grid, 5), _parameters(grid, 5)
    pull = torch.randn(grid.form, generator=torch.Generator().manual_seed(7))
    v, *factors = (p.detach() for p in ours)
    rounded = grid.round(v, *factors)
    expected = _plain(grid, *plain)
    torch.testing.assert_close(grid.values(rounded), expected, rtol=0, atol=1e-7)
    by_v, *sums = grid.pull(pull, v, factors, rounded)
    (expected * pull).sum().backward()  # type: ignore[no-untyped-call]
    for mine, theirs in zip((by_v, *grid.gather(sums, factors)), plain, strict=True):
        assert theirs.grad is not None
        assert theirs.grad.abs().max() > 0
        torch.testing.assert_close(mine, theirs.grad, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("scheme", "dtype"), CASES)
def test_codes_stand_for_what_the_loss_saw(scheme: Scheme, dtype: str) -> None:
    grid = make_integers(_weight(), scheme, dtype)
    v, *factors = (p.detach() for p in _parameters(grid, 9))
    rounded = grid.round(v, *factors)
    codes = grid.take_codes(keep_codes(grid, Learned(v, tuple(factors))), slice(0, ROWS), load())
    assert codes.codes.shape == (ROWS, COLUMNS)
    assert int(codes.codes.max()) < 1 << scheme.bits
    seen = grid.values(rounded).reshape(ROWS, -1)[:, :COLUMNS].numpy()
    np.testing.assert_array_equal(decode_rows(codes, scheme, load()), seen)


def test_a_scheme_whose_scales_come_with_its_codes_is_refused() -> None:
    with pytest.raises(BadOption, match="Q4_K has both at once"):
        make_grid(_weight(), BLOCKS["Q4_K"], "BF16")
