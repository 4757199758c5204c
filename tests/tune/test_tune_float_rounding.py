"""Learned rounding of small floats: round-to-nearest where nothing is learned, the gradients of auto-round's formulas,
and codes that stand for what the loss saw."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from shardq.kernels import load
from shardq.layouts import LAYOUTS, find_layout
from shardq.quantizers.buffers import Buffers, buffer_shapes
from shardq.quantizers.decode import decode_rows
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.rtn import quantize_rows
from shardq.schemes import PRESETS, Scheme, parse_scheme
from shardq.tune.float_elements import lowest_exponent
from shardq.tune.rounding import Learned, begin_learning, make_grid
from shardq.tune.rounding_floats import FloatGrid, make_floats
from shardq.tune.rounding_parts import Part
from shardq.tune.rounding_tiles import keep_codes, make_values, pull_values

ROWS, COLUMNS = 160, 192
PARTS = (slice(0, 100), slice(100, ROWS))  # matrices one below the other, whose blocks of rows are cut
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def _schemes() -> Iterator[Scheme]:
    """All arithmetics of presets in layouts that hold them, but for integers that are not auto-round's: those learn
    from its scales, whatever the layout's round-to-nearest does."""
    for preset in PRESETS.values():
        for layout in LAYOUTS:
            scheme = layout.settle(preset.scheme)
            own = scheme.numbers == "auto_round" and scheme.symmetric
            if layout.refuse(scheme, scheme, 256, 256) is None and (own or not scheme.format.is_integer):
                yield replace(scheme, activation="")


NEAREST = tuple(dict.fromkeys(_schemes()))


def _weight(dtype: str) -> Tensor:
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(ROWS, COLUMNS, generator=random) * torch.randn(ROWS, 1, generator=random).exp() * 0.02
    weight[0, :32] = 0  # a group of zeros
    weight[1, 0], weight[2, :16], weight[3] = -0.0, -0.0, 0
    weight[4, :32], weight[5, :64] = 2.0**-130, 1e-9
    weight[6, :32], weight[7, :32] = torch.arange(32) / 4, torch.arange(32) / -8  # ties
    weight[8, :16] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6] * 2)
    weight[40:45] *= 1e4
    return weight.to(DTYPES[dtype]).float()


def _parts(weight: Tensor, scheme: Scheme, rows: tuple[slice, ...] = PARTS) -> list[Part]:
    found = [float(weight[r].abs().max()) for r in rows]
    return [Part(r, max(found) if scheme.reach == "fused" else f) for r, f in zip(rows, found, strict=True)]


def _nearest(weight: Tensor, scheme: Scheme, dtype: str, amax: float | None) -> Quantized:
    buffers = Buffers(*(np.zeros(shape, kind) for shape, kind in buffer_shapes(*weight.shape, scheme)))
    raw = weight.to(DTYPES[dtype])
    source = raw.numpy() if dtype == "F32" else raw.view(torch.uint16).numpy()
    stats = np.empty((len(weight), 6))
    found, bad = quantize_rows(source, dtype, scheme, buffers, stats, load(), amax if scheme.reach != "group" else None)
    assert bad == 0
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", NEAREST, ids=lambda s: f"{s.name}-{s.numbers}-{s.exponent}-{s.scale}")
def test_without_learning_it_is_round_to_nearest(scheme: Scheme, dtype: str) -> None:
    rows = PARTS if dtype != "F16" else (slice(0, ROWS, 2), slice(1, ROWS, 2))  # matrices that take turns
    weight = _weight(dtype)
    parts = _parts(weight, scheme, rows)
    grid = make_grid(weight, scheme, dtype, parts)
    kept = keep_codes(grid, begin_learning(grid, factors=True))
    for part in parts:
        found = grid.take_codes(kept, part.rows, load())
        nearest = _nearest(weight[part.rows], scheme, dtype, part.amax)
        np.testing.assert_array_equal(found.codes, nearest.codes)
        np.testing.assert_array_equal(found.scales, nearest.scales)
        assert found.global_scale == nearest.global_scale


FLOATS = [
    (find_layout(layout).settle(parse_scheme(name).scheme), dtype)
    for name, layout, dtype in (
        ("MXFP4", "auto_round", "BF16"),
        ("MXFP4", "compressed-tensors", "F16"),
        ("MXFP4", "mlx", "BF16"),
        ("MXFP8", "auto_round", "F32"),
        ("MXFP8", "fp8", "BF16"),
        ("MXFP6A16", "compressed-tensors", "BF16"),
        ("MXINT4", "auto_round", "BF16"),
        ("NVFP4A16", "compressed-tensors", "BF16"),
        ("NVFP4A16", "mlx", "BF16"),
        ("NVFP4_E5M3", "auto_round", "BF16"),
        ("FP8_DYNAMIC", "compressed-tensors", "BF16"),
        ("FP8_BLOCK", "compressed-tensors", "F32"),
        ("FP8_BLOCK", "fp8", "BF16"),
        ("FPW8A16_TENSOR", "compressed-tensors", "F16"),
    )
]
IDS = [f"{s.name}-{s.numbers}" for s, _ in FLOATS]


def _learned(grid: FloatGrid, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    v = (torch.rand(grid.form, generator=random) - 0.5) * 0.8
    factor = torch.rand(grid.absmax.shape, generator=random) * 0.5 + 0.5
    return v.requires_grad_(), factor.requires_grad_()


def _seen(values: Tensor, wanted: Tensor) -> Tensor:
    """Numbers that have become others, with the gradient of the identity."""
    return values + (wanted - values).detach()


def _steps(grid: FloatGrid, factor: Tensor) -> Tensor:
    """Scales [cells, groups], as auto-round's formulas come to them."""
    scheme = grid.scheme
    wanted = grid.rule.make(grid.absmax, factor.detach())
    reached = grid.absmax * factor
    if scheme.scale == "e8m0":
        zero = reached == 0
        exponent = _seen(torch.where(zero, 1, reached).log2(), wanted.steps.log2())
        return torch.where(zero, wanted.steps, 2**exponent)
    whole = torch.tensor(grid.global_scales)[:, None] if grid.global_scales else 1
    ratio = reached / scheme.format.max_value * whole
    most = {"e4m3fn": 448.0, "e5m3": 114688.0}.get(scheme.scale, torch.inf)
    kept = torch.where(reached == 0, wanted.kept, _seen(ratio.clamp(max=most), wanted.kept))
    return kept / whole


def _elements(t: Tensor, scheme: Scheme, wanted: Tensor) -> Tensor:
    """Elements, as auto-round rounds them: of MX in units of their own power of two."""
    most = scheme.format.max_value
    t = t.clamp(-most, most)
    if scheme.scale in ("e4m3fn", "e5m3"):
        return _seen(t.abs(), wanted.abs()) * t.sign()
    if scheme.scale != "e8m0":
        return _seen(t, wanted)
    log = torch.where(t == 0, 1, t.abs()).log2()
    power = 2 ** _seen(log, log.floor()).clamp(min=lowest_exponent(scheme.format))
    units = t.abs() / power
    return t.sign() * _seen(units, wanted.abs() / power) * power


@pytest.mark.parametrize(("scheme", "dtype"), FLOATS, ids=IDS)
def test_gradients_are_those_of_the_formulas(scheme: Scheme, dtype: str) -> None:
    weight = _weight(dtype)
    weight[4:6] = 0.01  # far from the ends of scales, where fp32 has no gradients
    grid = make_floats(weight, scheme, dtype, _parts(weight, scheme))
    (v, factor), (plain_v, plain_factor) = _learned(grid, 5), _learned(grid, 5)
    steps = grid.cells.spread(_steps(grid, plain_factor))[..., None]
    rounded = grid.round(v.detach(), factor.detach())
    found, levels = grid.values(rounded), rounded.levels.float()
    zero = steps == 0
    t = torch.where(zero, 0, grid.weight / torch.where(zero, 1, steps)) + plain_v
    expected = _elements(t, scheme, levels) * steps
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    pull = torch.randn(grid.form, generator=torch.Generator().manual_seed(7))
    by_v, *sums = grid.pull(pull, v.detach(), (factor.detach(),), rounded)
    (expected * pull).sum().backward()  # type: ignore[no-untyped-call]
    (by_factor,) = grid.gather(sums, (factor.detach(),))
    for mine, theirs in ((by_v, plain_v.grad), (by_factor, plain_factor.grad)):
        assert theirs is not None
        assert theirs.isfinite().all()
        assert (theirs != 0).float().mean() > 0.5
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3 * float(theirs.abs().mean()))


@pytest.mark.parametrize(("scheme", "dtype"), FLOATS, ids=IDS)
def test_codes_stand_for_what_the_loss_saw(scheme: Scheme, dtype: str) -> None:
    weight = _weight(dtype)
    grid = make_floats(weight, scheme, dtype, _parts(weight, scheme))
    v, factor = (p.detach() for p in _learned(grid, 9))
    rounded = grid.round(v, factor)
    seen = grid.values(rounded).flatten(1)[:, :COLUMNS].numpy()
    kept = keep_codes(grid, Learned(v, (factor,)))
    for rows in PARTS:
        codes = grid.take_codes(kept, rows, load())
        assert codes.codes.shape == seen[rows].shape
        np.testing.assert_array_equal(decode_rows(codes, scheme, load()), seen[rows])


def test_a_short_last_group_has_a_scale_of_its_own() -> None:
    scheme = parse_scheme("MXFP4").scheme
    weight = _weight("BF16")[:, :80]
    grid = make_floats(weight, scheme, "BF16", [Part(slice(0, ROWS), None)])
    start = begin_learning(grid, factors=True)
    values = make_values(grid, start, torch.float32)
    assert values.shape == weight.shape
    by_v = torch.full(grid.form, torch.nan)
    pull_values(grid, start, torch.ones_like(values), lambda lines, grad: by_v[lines].copy_(grad))
    assert by_v[:, 2, :16].any()
    assert not by_v[:, 2, 16:].any()
    codes = grid.take_codes(keep_codes(grid, start), slice(0, ROWS), load())
    assert codes.codes.shape == (ROWS, 80)
    assert codes.scales.shape == (ROWS, 3)


def test_a_scale_of_a_tensor_needs_its_magnitude() -> None:
    with pytest.raises(ValueError, match="largest magnitude of the tensor"):
        make_floats(_weight("BF16"), parse_scheme("FP8_TENSOR").scheme, "BF16", [Part(slice(0, ROWS), None)])


def _finite_difference(loss: Callable[[Tensor], Tensor], at: Tensor, by: float) -> Tensor:
    return (loss(at + by) - loss(at - by)) / (2 * by)


def test_a_factor_pulls_where_a_finite_difference_does() -> None:
    """Of a plain scale, whose rounding hides little: the loss is smooth but for the steps of elements."""
    scheme = replace(find_layout("compressed-tensors").settle(parse_scheme("FP8_DYNAMIC").scheme), scale="fp32")
    weight = torch.full((1, 64), 0.3)
    weight[0, 0] = 1.0
    grid = make_floats(weight, scheme, "F32", [Part(slice(0, 1), None)])
    v, factor = torch.zeros(grid.form), torch.full_like(grid.absmax, 0.7)
    first = torch.zeros(grid.form)
    first[0, 0, 0] = 1  # saturated: 448 * scale
    _, *sums = grid.pull(first, v, (factor,), grid.round(v, factor))
    (by_factor,) = grid.gather(sums, (factor,))

    def loss(at: Tensor) -> Tensor:
        return grid.values(grid.round(v, at))[0, 0, 0]

    torch.testing.assert_close(by_factor, _finite_difference(loss, factor, 1e-2).reshape(1, 1), rtol=1e-4, atol=0)
