"""SignRound of a block: rounding, and the factors of the extremes, learned by the signs of gradients so that the block
gives what it gave with its own weights.

Source: W. Cheng et al., arXiv:2309.05516, as auto-round 0.16.1 does it (`algorithms/quantization/sign_round`): V from
0 and factors from 1, kept in [0, 1]; steps of lr times the sign, lr falling linearly to 0; the loss is the mean square
of the block's output, the last token of a sample left out; the parameters of the step with the least loss, taken
before it moved them, are kept. Samples come in a shuffled order, and what fills no batch is left for another one.
Activations that a server quantizes are left as they are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from shardq.errors import BadOption, NonFiniteWeight
from shardq.tune.activations import call_block
from shardq.tune.data_random import shuffled
from shardq.tune.rounding import Grid, RoundingGradient, make_grid, round_groups, take_codes
from shardq.tune.subjects import Subject
from shardq.tune.work import Codes, Work

LOSS_SCALE: Final = 1000.0
LONG_RUN: Final = 1000  # iterations from which codes of 3 bits and fewer take steps twice as large
FEW_BITS: Final = 3


@dataclass(frozen=True, slots=True)
class SignRoundOptions:
    """Under auto-round's names."""

    iters: int = 200
    nblocks: int = 1  # blocks that are learned together, by what the last of them gives
    batch_size: int = 8
    gradient_accumulate_steps: int = 1
    lr: float | None = None  # None: 1 / iters
    minmax_lr: float | None = None  # None: lr
    enable_minmax_tuning: bool = True
    not_use_best_mse: bool = False
    dynamic_max_gap: int = -1  # steps without a better one, after which a block is done; -1: never

    def __post_init__(self) -> None:
        """Raises BadOption."""
        if min(self.iters, self.batch_size, self.gradient_accumulate_steps, self.nblocks) < 1:
            raise BadOption("SignRound needs at least one of iters, batch_size, gradient_accumulate_steps and nblocks")

    def rates(self, bits: int) -> tuple[float, float]:
        """First steps of V and of factors."""
        lr = self.lr or (2.0 if self.iters >= LONG_RUN and bits <= FEW_BITS else 1.0) / self.iters
        return lr, self.minmax_lr or lr


@dataclass(frozen=True, slots=True)
class _Unit:
    """A parameter of a block whose matrices get codes."""

    parameter: str
    shape: tuple[int, ...]  # [..., rows, columns]
    turned: bool  # the parameter is [..., columns, rows]
    subjects: tuple[Subject, ...]
    grid: Grid
    v: Tensor
    factors: tuple[Tensor, Tensor]  # of the lower and the higher extreme
    rates: tuple[float, float]

    def values(self, dtype: torch.dtype) -> Tensor:
        """The parameter as codes make it, which gradients flow through."""
        made: Tensor = RoundingGradient.apply(self.v, *self.factors, self.grid)  # type: ignore[no-untyped-call]
        width = self.grid.groups * self.grid.weight.shape[1]
        whole = made.view(-1, width)[:, : self.grid.columns].reshape(self.shape).to(dtype)
        return whole.mT if self.turned else whole

    def step(self, share: float, factors: bool) -> None:
        """Move by the signs of gradients."""
        with torch.no_grad():
            self.v.sub_(self.v.grad.sign_(), alpha=self.rates[0] * share) if self.v.grad is not None else None
            for f in self.factors if factors else ():
                if f.grad is not None:
                    f.sub_(f.grad.sign_(), alpha=self.rates[1] * share).clamp_(0, 1)
        for p in (self.v, *self.factors):
            p.grad = None

    def copied(self) -> tuple[Tensor, ...]:
        """Of all that is learned."""
        return tuple(p.detach().clone() for p in (self.v, *self.factors))


def tune_signround(work: Work, options: SignRoundOptions) -> Codes:
    """Codes of all matrices of a block. Raises BadOption for schemes without integers, NonFiniteWeight."""
    units = [_make_unit(work.block, name, of, options) for name, of in _by_parameter(work.subjects).items()]
    best = _learn(work, units, options)
    codes: Codes = {}
    with torch.no_grad():
        for unit, (v, low, high) in zip(units, best, strict=True):
            rounded = round_groups(unit.grid, v, low, high)
            if not (torch.isfinite(rounded.scales).all() and torch.isfinite(unit.grid.weight).all()):
                raise NonFiniteWeight(
                    f"{unit.subjects[0].tensor}: holds NaN or infinity, or needs a scale beyond {unit.grid.stored}"
                )
            whole = take_codes(unit.grid, rounded, unit.subjects[0].scheme)
            for s in unit.subjects:
                codes[s.tensor] = whole.rows(_rows(unit, s))
    return codes


def _learn(work: Work, units: list[_Unit], options: SignRoundOptions) -> list[tuple[Tensor, ...]]:
    """What is learned, of each unit, at the best step."""
    assert work.wanted is not None
    least, best, since = float("inf"), [u.copied() for u in units], 0
    drawn = _batches(len(work.wanted), options.batch_size * options.gradient_accumulate_steps, work.seed)
    for step in range(options.iters):
        indices = next(drawn)
        loss = 0.0
        for begin in range(0, len(indices), options.batch_size):
            part = _loss(work, units, indices[begin : begin + options.batch_size])
            (part * LOSS_SCALE / len(indices)).backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
        if loss < least and not options.not_use_best_mse:
            least, best, since = loss, [u.copied() for u in units], step
        elif not options.not_use_best_mse and 0 < options.dynamic_max_gap <= step - since:
            break
        if options.not_use_best_mse and step + 1 == options.iters:
            best = [u.copied() for u in units]
        for u in units:
            u.step(1 - step / options.iters, options.enable_minmax_tuning)
    return best


def _loss(work: Work, units: list[_Unit], indices: list[int]) -> Tensor:
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


def _make_unit(block: nn.Module, name: str, subjects: list[Subject], options: SignRoundOptions) -> _Unit:
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
    weight = parameter.detach().float().reshape(-1, parameter.shape[-1])
    grid = make_grid(weight, first.scheme, first.dtype)
    v = torch.zeros_like(grid.weight, requires_grad=True)
    factors = [torch.ones_like(grid.low, requires_grad=options.enable_minmax_tuning) for _ in range(2)]
    rates = options.rates(first.scheme.bits)
    return _Unit(name, tuple(parameter.shape), turned, tuple(subjects), grid, v, (factors[0], factors[1]), rates)


def _rows(unit: _Unit, s: Subject) -> slice:
    """Those of a matrix among all rows of the parameter."""
    begin, lines = (s.place.expert or 0) * unit.shape[-2], s.place.lines or range(unit.shape[-2])
    return slice(begin + lines.start, begin + lines.stop, lines.step)
