"""Learned weights that stand in for a block's own, tile by tile and matrix by matrix: bit for bit what whole ones give
that torch differentiates."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from shardq.layouts import find_layout
from shardq.schemes import Scheme, parse_scheme
from shardq.tune import rounding_parts
from shardq.tune.learned_weights import Standing, Weight, Whole
from shardq.tune.rounding import Grid, Learned, make_grid
from shardq.tune.rounding_parts import Part, in_groups
from shardq.tune.rounding_tiles import keep_codes, make_values, pull_values
from shardq.tune.steps import Moved, SignSteps, move_part

ROWS, COLUMNS = 48, 80  # groups of 32 end in a short one
PARTS = (slice(0, 30), slice(30, ROWS))
STEP = 0.125


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of seven rows, and one thread."""
    monkeypatch.setattr(rounding_parts, "TILE_WEIGHTS", 7 * COLUMNS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _scheme(name: str, layout: str) -> Scheme:
    return find_layout(layout).settle(parse_scheme(name).scheme)


SCHEMES = [
    _scheme(*of)
    for of in (
        ("W4A16G32", "auto_round"), ("W3A16G32-ASYM", "auto_round"), ("W4A16G32", "mlx"),
        ("W8A16", "compressed-tensors"), ("MXFP4", "auto_round"), ("MXFP4", "mlx"), ("MXINT4", "auto_round"),
        ("NVFP4A16", "compressed-tensors"), ("NVFP4_E5M3", "auto_round"), ("FP8_DYNAMIC", "compressed-tensors"),
        ("FP8_BLOCK", "fp8"), ("FPW8A16_TENSOR", "compressed-tensors"),
    )
]  # fmt: skip
IDS = [f"{s.name}-{s.numbers}" for s in SCHEMES]


def _grid(weight: Tensor, scheme: Scheme) -> Grid:
    parts = [Part(r, float(weight[r].float().abs().max()) if scheme.reach != "group" else None) for r in PARTS]
    return make_grid(weight, scheme, "BF16", parts)


def _weight(seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=random) * 0.1
    weight[0, :32], weight[1, 0], weight[2, :16] = 0, -0.0, -0.0
    return weight.bfloat16()


def _learned(grid: Grid, seed: int) -> Learned:
    random = torch.Generator().manual_seed(seed)
    v = (torch.rand(grid.form, generator=random) - 0.5) * 0.8
    v[v.abs() < 0.1] = 0
    factors = tuple(torch.rand(e.shape, generator=random) * 0.5 + 0.5 for e in grid.extremes)
    return Learned(v.requires_grad_(), tuple(f.requires_grad_() for f in factors))


class _Plain(torch.autograd.Function):
    """All rows at once, with whatever a grid makes on its way."""

    @staticmethod
    def forward(ctx: Any, grid: Grid, v: Tensor, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(v, *factors)
        ctx.grid, ctx.rounded = grid, grid.round(v, *factors)
        return grid.values(ctx.rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v, *factors = ctx.saved_tensors
        by_v, *sums = ctx.grid.pull(grads[0], v, factors, ctx.rounded)
        return None, by_v, *ctx.grid.gather(sums, factors)


def _plain_values(grid: Grid, learned: Learned, dtype: torch.dtype) -> Tensor:
    made: Tensor = _Plain.apply(grid, *learned.all)  # type: ignore[no-untyped-call]
    return made.reshape(grid.rows, -1)[:, : grid.columns].to(dtype)


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_tiles_are_all_rows_at_once(scheme: Scheme) -> None:
    grid = _grid(_weight(1), scheme)
    learned = _learned(grid, 2)
    v, *factors = (p.detach() for p in learned.all)
    rounded = grid.round(v, *factors)
    whole = grid.values(rounded).reshape(ROWS, -1)[:, :COLUMNS]
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(make_values(grid, learned, dtype), whole.to(dtype))
    grad = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)).bfloat16()
    by_v, *sums = grid.pull(in_groups(grad.float(), v.shape[-1]).reshape(v.shape), v, factors, rounded)
    found = torch.full(grid.form, torch.nan)
    by_factors = pull_values(grid, learned, grad, lambda lines, part: found[lines].copy_(part))
    assert torch.equal(found, by_v)
    for mine, plain in zip(by_factors, grid.gather(sums, factors), strict=True):
        assert mine.any()
        assert torch.equal(mine, plain)
    assert torch.equal(keep_codes(grid, learned).levels.view(torch.uint8), grid.keep(v, rounded).view(torch.uint8))


class _Block(nn.Module):
    """Linear layers with and without a bias, one of them run twice, and a stack of weights that no layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(COLUMNS, ROWS)
        self.twice = nn.Linear(COLUMNS, ROWS, bias=False)
        self.stack = nn.Parameter(torch.zeros(2, ROWS // 2, COLUMNS))

    def forward(self, x: Tensor) -> Tensor:
        assert self.stack.dtype == x.dtype
        made = self.up(x).mul_(2) * torch.tanh(self.twice(x)) + self.twice(x.flip(1))
        halves = [x[..., :COLUMNS] @ part.mT for part in self.stack.unbind(0)]
        return made + torch.cat(halves, -1) + nn.functional.linear(x, self.stack[1]).repeat(1, 1, 2)


NAMES = ("up.weight", "twice.weight", "stack")


class _Made:
    def __init__(self, weight: Weight, shape: torch.Size) -> None:
        self.weight, self.shape = weight, shape

    def values(self, dtype: torch.dtype) -> Tensor:
        assert dtype == self.weight.dtype
        self.weight.uses += 1
        made: Tensor = Whole.apply(self.weight, *self.weight.learned.all)  # type: ignore[no-untyped-call]
        return made.reshape(self.shape)


def _block(dtype: torch.dtype) -> tuple[_Block, dict[str, Grid]]:
    block = _Block()
    for p in block.parameters():
        p.requires_grad_(False)
    grids = {}
    for seed, name in enumerate(NAMES):
        shape = block.get_parameter(name).shape
        weight = _weight(seed)
        grids[name] = _grid(weight, SCHEMES[0])
        owner, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(owner), leaf, nn.Parameter(weight.to(dtype).reshape(shape), requires_grad=False))
    block.up.bias = nn.Parameter(torch.linspace(-1, 1, ROWS).to(dtype), requires_grad=False)
    return block, grids


def _run(block: _Block, grids: Mapping[str, Grid], learned: Mapping[str, Learned], x: Tensor, at_once: bool) -> Tensor:
    weights = {
        name: Weight(grids[name], learned[name], x.dtype, (lambda v, g: move_part(v, g, STEP)) if at_once else None)
        for name in NAMES
    }
    made = {name: _Made(w, block.get_parameter(name).shape) for name, w in weights.items()}
    with Standing(block, made, {n: w for n, w in weights.items() if n != "stack"}):
        out: Tensor = block(x)
    assert {n: w.uses for n, w in weights.items()} == {"up.weight": 1, "twice.weight": 2, "stack": 1}
    return out


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_runs_and_moves_as_with_whole_weights(dtype: torch.dtype, at_once: bool) -> None:
    block, grids = _block(dtype)
    mine, plain = ({n: _learned(g, 5) for n, g in grids.items()} for _ in range(2))
    inputs = [torch.randn(3, 9, COLUMNS, generator=torch.Generator().manual_seed(6)).to(dtype) for _ in range(2)]
    for x in inputs:
        x.requires_grad_()
    whole = {n: _plain_values(grids[n], plain[n], dtype).reshape(block.get_parameter(n).shape) for n in NAMES}
    expected: Tensor = functional_call(block, whole, (inputs[1],))
    found = _run(block, grids, mine, inputs[0], at_once)
    assert torch.equal(found, expected)
    pull = torch.randn(found.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    (found * pull).sum().backward()
    (expected * pull).sum().backward()  # type: ignore[no-untyped-call]
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert (mine["up.weight"].v.grad is None) == at_once  # moved already
    assert mine["twice.weight"].v.grad is not None  # is a sum, and moves later
    for of in (mine, plain):
        moved = [m for own in of.values() for m in (Moved((own.v,), STEP, False), Moved(own.factors, STEP, True))]
        SignSteps(moved, momentum=0).move(1)
    for name in NAMES:
        for a, b in zip(mine[name].all, plain[name].all, strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(mine[name].v, _learned(grids[name], 5).v)
