"""SignRound of a block: rounding, and the factors of the extremes, learned by the signs of gradients so that the block
gives what it gave with its own weights.

Source: W. Cheng et al., arXiv:2309.05516, as auto-round 0.16.1 does it (`algorithms/quantization/sign_round`): V from
0 and factors from 1, kept in [0, 1]; steps of lr times the sign, lr falling linearly to 0; the loss is the mean square
of the block's output, the last token of a sample left out; the parameters of the step with the least loss, taken
before it moved them, are kept. Samples come in a shuffled order, and what fills no batch is left for another one.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from shardq.errors import BadOption, NonFiniteWeight
from shardq.tune.activations import call_block
from shardq.tune.arithmetic import EAGER, Arithmetic
from shardq.tune.awq_sites import Plain
from shardq.tune.data_random import shuffled
from shardq.tune.learned_weights import Standing, Weight, Whole
from shardq.tune.norms_biases import FreeUnit, make_free_units
from shardq.tune.rounding import Grid, Learned, begin_learning, make_grid
from shardq.tune.rounding_parts import Kept, Part
from shardq.tune.rounding_tiles import keep_codes
from shardq.tune.settings import FEW_BITS, SignRoundOptions
from shardq.tune.steps import Moved, Steps, make_steps, move_part
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
    arithmetic: Arithmetic

    def stand_in(self, block: nn.Module, step: float | None) -> "_StandIn":
        """The parameter as codes make it. V is moved by `step` when its gradient is there, or left with it."""
        move = None if step is None else partial(move_part, step=step)
        weight = Weight(self.grid, self.learned, block.get_parameter(self.parameter).dtype, move, self.arithmetic)
        return _StandIn(weight, self.shape, self.turned)

    def keep(self) -> Kept:
        """Its codes of now."""
        return keep_codes(self.grid, self.learned)

    def moved(self, factors: bool) -> Iterator[Moved]:
        """What is to move."""
        yield Moved((self.learned.v,), self.rates[0], bounded=False)
        if factors:
            yield Moved(self.learned.factors, self.rates[1], bounded=True)


@dataclass(frozen=True, slots=True)
class _StandIn:
    """What stands in for a parameter while a loss is computed."""

    weight: Weight
    shape: tuple[int, ...]
    turned: bool

    def values(self, dtype: torch.dtype) -> Tensor:
        """The whole parameter, which gradients flow through."""
        assert dtype == self.weight.dtype
        self.weight.uses += 1
        made: Tensor = Whole.apply(self.weight, *self.weight.learned.all)  # type: ignore[no-untyped-call]
        whole = made.reshape(self.shape)
        return whole.mT if self.turned else whole


def tune_signround(
    work: Work, options: SignRoundOptions, ranges: Ranges | None = None, beside: Beside | None = None
) -> Codes:
    """Codes of all matrices of a block. `ranges`: ends of groups [rows, groups] that matrices which are whole
    parameters begin with; `beside`: what may be learned with `enable_norm_bias_tuning`. Raises BadOption for schemes
    without scales of their own, NonFiniteWeight."""
    begin = _Begin(options, largest_of(work), ranges or {}, _arithmetic_of(options))
    units = [_make_unit(work.block, name, of, begin) for name, of in _by_parameter(work.subjects).items()]
    rates = {u.parameter: u.rates[0] for u in units}
    plain = beside.plain if beside and options.enable_norm_bias_tuning else {}
    free = [*make_free_units(work.block, plain, work.subjects, rates, options.rates(FEW_BITS + 1)[0])]
    best = _learn(work, units, free, options)
    for extra, values in zip(free, best.free, strict=True):
        assert beside is not None
        beside.changes.replaced[extra.plain.tensor] = values
    grids = [(u.grid, u.shape, u.subjects) for u in units]
    del units, free  # and with them V
    codes: Codes = {}
    for (grid, shape, subjects), kept in zip(grids, best.codes, strict=True):
        if not (torch.isfinite(kept.scales).all() and grid.is_finite):
            raise NonFiniteWeight(f"{subjects[0].tensor}: holds NaN or infinity, or needs a scale beyond {grid.stored}")
        for s in subjects:
            codes[s.tensor] = grid.take_codes(kept, _rows(shape, s), work.kernels)
    return codes


@dataclass(frozen=True, slots=True)
class _Best:
    """What was learned at the best step."""

    codes: Sequence[Kept]  # of each unit
    free: Sequence[Tensor]  # what is learned without codes, as it is stored


def _keep(units: Sequence[_Unit], free: Sequence[FreeUnit]) -> _Best:
    with torch.no_grad():
        return _Best([u.keep() for u in units], [f.stored(f.learned.v) for f in free])


@dataclass(slots=True)
class _Course:
    """Which steps are worth keeping, and how many there are."""

    options: SignRoundOptions
    least: float = math.inf  # loss
    since: int = 0  # the step that had it

    def keeps(self, step: int, loss: float) -> bool:
        """True if what a step had learned before is the best so far; of losses that are no numbers the first is."""
        if self.options.not_use_best_mse:
            return self.is_last(step)
        if better := loss < self.least:
            self.least, self.since = loss, step
        return better or step == 0

    def is_last(self, step: int) -> bool:
        """True if nothing needs to move any more."""
        o = self.options
        idle = not o.not_use_best_mse and 0 < o.dynamic_max_gap <= step - self.since
        return idle or step + 1 == o.iters


def _learn(work: Work, units: Sequence[_Unit], free: Sequence[FreeUnit], options: SignRoundOptions) -> _Best:
    """What is learned, at the best step."""
    assert work.wanted is not None
    best, course = _Best((), ()), _Course(options)
    learning: list[_Unit | FreeUnit] = [*units, *free]
    moved = [m for u in learning for m in u.moved(options.enable_minmax_tuning)]
    steps = make_steps(moved, adam=options.enable_adam, momentum=options.momentum)
    drawn = _batches(len(work.wanted), options.batch_size * options.gradient_accumulate_steps, work.seed)
    for step in range(options.iters):
        share, indices = 1 - step / options.iters, next(drawn)
        first, *more = (indices[at : at + options.batch_size] for at in range(0, len(indices), options.batch_size))
        at_once = share if steps.at_once and not more else None
        found = _loss(work, units, free, first, at_once)
        loss = float(found.detach())
        for part in more:
            _go_back(found, steps, len(indices))
            found = _loss(work, units, free, part, at_once)
            loss += float(found.detach())
        if course.keeps(step, loss):  # before anything moves
            best = _Best((), ())  # whose memory the next one needs
            best = _keep(units, free)
        if course.is_last(step):
            break
        _go_back(found, steps, len(indices))
        steps.move(share)
    return best


def _go_back(loss: Tensor, steps: Steps, samples: int) -> None:
    """Gradients of a part of a step that has so many samples."""
    (loss * steps.loss_scale / samples).backward()  # type: ignore[no-untyped-call]


def _loss(
    work: Work, units: Sequence[_Unit], free: Sequence[FreeUnit], indices: list[int], share: float | None
) -> Tensor:
    """Sum over samples of the mean square of what a block gives beside what it should. With `share` V moves by so much
    of its rates on the way back, else it gets gradients."""
    assert work.wanted is not None
    batch = work.inputs.pick(indices)
    made = {u.parameter: u.stand_in(work.block, None if share is None else u.rates[0] * share) for u in units}
    linear = {u.parameter: made[u.parameter].weight for u in units if len(u.shape) == 2 and not u.turned}
    with Standing(work.block, {**made, **{f.parameter: f for f in free}}, linear):
        found = call_block(work.block, batch, work.index)
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
    arithmetic: Arithmetic


def _arithmetic_of(options: SignRoundOptions) -> Arithmetic:
    if not options.enable_torch_compile:
        return EAGER
    from shardq.tune.compiling import compile_arithmetic  # brings torch's compiler along

    return compile_arithmetic()


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
    weight = parameter.detach().reshape(-1, shape[-1])
    parts = [Part(_rows(shape, s), begin.amax.get(s.tensor)) for s in subjects]
    grid = make_grid(weight, first.scheme, first.dtype, parts, begin.ranges.get(first.tensor))
    learned = begin_learning(grid, begin.options.enable_minmax_tuning)
    rates = begin.options.rates(first.scheme.bits)
    return _Unit(name, shape, turned, tuple(subjects), grid, learned, rates, begin.arithmetic)


def _rows(shape: tuple[int, ...], s: Subject) -> slice:
    """Those of a matrix among all rows of a parameter."""
    begin, lines = (s.place.expert or 0) * shape[-2], s.place.lines or range(shape[-2])
    return slice(begin + lines.start, begin + lines.stop, lines.step)
