"""SignRound of a block: rounding, and the factors of the extremes, learned by the signs of gradients so that the block
gives what it gave with its own weights.

Source: W. Cheng et al., arXiv:2309.05516, as auto-round 0.16.1 does it (`algorithms/quantization/sign_round`): V from
0 and factors from 1, kept in [0, 1]; steps of lr times the sign, lr falling linearly to 0; the loss is the mean square
of the block's output, the last token of a sample left out; the parameters of the step with the least loss, taken
before it moved them, are kept. Samples come in a shuffled order, and what fills no batch is left for another one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from shardq.errors import BadOption, NonFiniteWeight
from shardq.tune.activations import call_block
from shardq.tune.awq_sites import Plain
from shardq.tune.data_random import shuffled
from shardq.tune.norms_biases import FreeUnit, make_free_units
from shardq.tune.rounding import Grid, Learned, begin_learning, make_grid, values_of
from shardq.tune.rounding_parts import Part
from shardq.tune.settings import FEW_BITS, SignRoundOptions
from shardq.tune.steps import Moved, Steps, make_steps
from shardq.tune.subjects import Subject
from shardq.tune.work import Changes, Codes, Ranges, Work, largest_of


@dataclass(frozen=True, slots=True)
class Beside:
    """What a block has beside matrices."""

    plain: Mapping[str, Plain]  # parameters that may be others in the output, by their names
    changes: Changes  # filled


@dataclass(frozen=True, slots=True)
class _Unit:
    """A parameter of a block whose matrices get codes."""

    parameter: str
    shape: tuple[int, ...]  # [..., rows, columns]
    turned: bool  # the parameter is [..., columns, rows]
    subjects: tuple[Subject, ...]
    grid: Grid
    learned: Learned
    rates: tuple[float, float]

    def values(self, dtype: torch.dtype) -> Tensor:
        """The parameter as codes make it, which gradients flow through."""
        whole = values_of(self.grid, self.learned).reshape(self.shape).to(dtype)
        return whole.mT if self.turned else whole

    def moved(self, factors: bool) -> Iterator[Moved]:
        """What is to move."""
        yield Moved((self.learned.v,), self.rates[0], bounded=False)
        if factors:
            yield Moved(self.learned.factors, self.rates[1], bounded=True)


def tune_signround(
    work: Work, options: SignRoundOptions, ranges: Ranges | None = None, beside: Beside | None = None
) -> Codes:
    """Codes of all matrices of a block. `ranges`: ends of groups [rows, groups] that matrices which are whole
    parameters begin with; `beside`: what may be learned with `enable_norm_bias_tuning`. Raises BadOption for schemes
    without scales of their own, NonFiniteWeight."""
    begin = _Begin(options, largest_of(work), ranges or {})
    units = [_make_unit(work.block, name, of, begin) for name, of in _by_parameter(work.subjects).items()]
    rates = {u.parameter: u.rates[0] for u in units}
    plain = beside.plain if beside and options.enable_norm_bias_tuning else {}
    free = [*make_free_units(work.block, plain, work.subjects, rates, options.rates(FEW_BITS + 1)[0])]
    best = _learn(work, [*units, *free], options)
    codes: Codes = {}
    with torch.no_grad():
        for extra, learned in zip(free, best[len(units) :], strict=True):
            assert beside is not None
            beside.changes.replaced[extra.plain.tensor] = extra.stored(learned.v)
        for unit, learned in zip(units, best[: len(units)], strict=True):
            rounded = unit.grid.round(learned.v, *learned.factors)
            if not (torch.isfinite(rounded.scales).all() and torch.isfinite(unit.grid.weight).all()):
                raise NonFiniteWeight(
                    f"{unit.subjects[0].tensor}: holds NaN or infinity, or needs a scale beyond {unit.grid.stored}"
                )
            for s in unit.subjects:
                codes[s.tensor] = unit.grid.take_codes(learned.v, rounded, _rows(unit.shape, s), work.kernels)
    return codes


def _learn(work: Work, units: Sequence[_Unit | FreeUnit], options: SignRoundOptions) -> list[Learned]:
    """What is learned, of each unit, at the best step."""
    assert work.wanted is not None
    least, best, since = float("inf"), [u.learned.copied() for u in units], 0
    moved = [m for u in units for m in u.moved(options.enable_minmax_tuning)]
    steps = make_steps(moved, adam=options.enable_adam, momentum=options.momentum)
    drawn = _batches(len(work.wanted), options.batch_size * options.gradient_accumulate_steps, work.seed)
    for step in range(options.iters):
        loss = _sum_losses(work, units, next(drawn), options.batch_size, steps)
        if loss < least and not options.not_use_best_mse:
            least, best, since = loss, [u.learned.copied() for u in units], step
        elif not options.not_use_best_mse and 0 < options.dynamic_max_gap <= step - since:
            break
        if options.not_use_best_mse and step + 1 == options.iters:
            best = [u.learned.copied() for u in units]
        steps.move(1 - step / options.iters)
    return best


def _sum_losses(
    work: Work, units: Sequence[_Unit | FreeUnit], indices: list[int], batch_size: int, steps: Steps
) -> float:
    """Of all samples of a step, whose gradients are added up."""
    loss = 0.0
    for begin in range(0, len(indices), batch_size):
        part = _loss(work, units, indices[begin : begin + batch_size])
        (part * steps.loss_scale / len(indices)).backward()  # type: ignore[no-untyped-call]
        loss += float(part.detach())
    return loss


def _loss(work: Work, units: Sequence[_Unit | FreeUnit], indices: list[int]) -> Tensor:
    """Sum over samples of the mean square of what a block gives beside what it should."""
    assert work.wanted is not None
    batch = work.inputs.pick(indices)
    weights = {u.parameter: u.values(work.block.get_parameter(u.parameter).dtype) for u in units}

    def run(*args: Any, **kwargs: Any) -> Any:
        return functional_call(work.block, weights, args, kwargs)

    found = call_block(run, batch, work.index)
    wanted = work.wanted[indices].to(found.device)
    if found.shape[1] > 1:
        found, wanted = found[:, :-1], wanted[:, :-1]
    return (found.float() - wanted.float()).square().mean() * len(indices)


def _batches(samples: int, size: int, seed: int) -> Iterator[list[int]]:
    """Indices, as auto-round's IndexSampler deals them out."""
    size, order, turn = min(size, samples), list[int](), 0
    while True:
        if len(order) < size:
            order, turn = shuffled(range(samples), seed + turn), turn + 1
        chosen, order = order[:size], order[size:]
        yield chosen


def _by_parameter(subjects: tuple[Subject, ...]) -> Mapping[str, list[Subject]]:
    found: dict[str, list[Subject]] = {}
    for s in subjects:
        found.setdefault(s.place.parameter, []).append(s)
    return found


@dataclass(frozen=True, slots=True)
class _Begin:
    """What learning begins with."""

    options: SignRoundOptions
    amax: Mapping[str, float]  # by tensor
    ranges: Ranges


def _make_unit(block: nn.Module, name: str, subjects: list[Subject], begin: _Begin) -> _Unit:
    first = subjects[0]
    turned = first.place.turned
    stored = block.get_parameter(name)
    parameter = stored.mT if turned else stored
    if (
        len({(s.scheme, s.dtype) for s in subjects}) > 1
        or sum(s.shape[0] for s in subjects) != parameter[..., 0].numel()
    ):
        raise BadOption(
            f"{first.module}: SignRound tunes all experts of a stack under one scheme; take --algorithm gptq, or give "
            "them one"
        )
    shape = tuple(parameter.shape)
    weight = parameter.detach().float().reshape(-1, shape[-1])
    parts = [Part(_rows(shape, s), begin.amax.get(s.tensor)) for s in subjects]
    grid = make_grid(weight, first.scheme, first.dtype, parts, begin.ranges.get(first.tensor))
    learned = begin_learning(grid, begin.options.enable_minmax_tuning)
    return _Unit(name, shape, turned, tuple(subjects), grid, learned, begin.options.rates(first.scheme.bits))


def _rows(shape: tuple[int, ...], s: Subject) -> slice:
    """Those of a matrix among all rows of a parameter."""
    begin, lines = (s.place.expert or 0) * shape[-2], s.place.lines or range(shape[-2])
    return slice(begin + lines.start, begin + lines.stop, lines.step)
