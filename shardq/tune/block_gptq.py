"""GPTQ of a block: matrix after matrix in the order in which the block uses them, each by the inputs that it gets when
those before it have their codes already.

Source: E. Frantar et al., arXiv:2210.17323, section 4 and its code: H of a matrix is of inputs through what is
quantized. Matrices with one input share an H, and a pass of all samples through the block. So do, of experts in stacks,
those that get the hidden states: their H is of all tokens. The second matrix of an expert has its own, of the tokens
that the router gives it, or of all where these are fewer than it has columns.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from shardq.quantizers.quantized import Quantized
from shardq.tune.coded_weights import Aside, Making, set_aside
from shardq.tune.freeing import give_back
from shardq.tune.gptq import quantize_gptq
from shardq.tune.hessians import Factored, factor_hessian
from shardq.tune.inputs import SECOND, between, first_of, given
from shardq.tune.settings import GptqOptions
from shardq.tune.subjects import Subject
from shardq.tune.work import Codes, Work, largest_of, put_codes, quantize_alone, rows_of

TOGETHER: Final = 1 << 22  # weights of matrices that one call quantizes, at most


@dataclass(frozen=True, slots=True)
class Stage:
    """Matrices of one module, or of several that get the same input."""

    modules: tuple[str, ...]  # in the block; of the first the input is taken
    subjects: tuple[Subject, ...]

    @property
    def is_wide(self) -> bool:
        """True if H is larger than the matrices, so that samples go through weights that are made for each of them: for
        all of a block and such an H there is no room."""
        return sum(s.shape[0] for s in self.subjects) < self.subjects[0].shape[1]


@torch.no_grad()
def tune_gptq(work: Work, options: GptqOptions) -> Codes:
    """Codes of all matrices of a block, whose weights become what they stand for. What no token reaches gets the
    nearest codes. Raises what `factor_hessian` and `quantize_gptq` do."""
    amax = largest_of(work)
    codes: Codes = {}
    compensate = _Compensate(work, options, amax, codes)
    for stage in find_stages(work):
        give_back()  # what the stage before has left, for H
        if stage.subjects[0].place.expert is None:
            hessian = None if stage.is_wide else _hessian_of(work, stage.modules[0])
            with compensate.alone() as aside:
                if hessian is None:
                    with Making(aside):
                        hessian = _hessian_of(work, stage.modules[0])
                factored = compensate.factor(hessian)
                compensate.all(stage.subjects, factored)
                del hessian, factored  # before what was set aside comes back
                give_back()
        else:
            _tune_experts(work, stage, compensate)
    for s in work.subjects:
        if s.tensor not in codes:
            codes[s.tensor] = quantize_alone(rows_of(work.block, [s]), s, work.kernels, amax.get(s.tensor))
            put_codes(work.block, [s], codes, work.kernels)
    return codes


@dataclass(frozen=True, slots=True)
class _Compensate:
    """Matrices of a block with an H, into codes and back into the block."""

    work: Work
    options: GptqOptions
    amax: Mapping[str, float]
    codes: Codes  # filled

    def factor(self, hessian: Any) -> Factored:
        """H, whose memory it takes."""
        o = self.options
        return factor_hessian(hessian, damping=o.damping, shrinkage=o.shrinkage, order=o.order)

    def all(self, subjects: Sequence[Subject], factored: Factored) -> None:
        """Those that share an H."""
        work, o = self.work, self.options
        for group in _alike(subjects, self.amax):
            first = group[0]
            made = quantize_gptq(
                rows_of(work.block, group), factored, first.scheme, work.kernels, block=o.block, scales=o.scales,
                amax=self.amax.get(first.tensor), stored=first.dtype,
            ).quantized  # fmt: skip
            self.codes.update(zip((s.tensor for s in group), _split(made, group), strict=True))
        put_codes(work.block, subjects, self.codes, work.kernels)

    def alone(self) -> AbstractContextManager[Sequence[Aside]]:
        """A context in which there is room for H: without weights of what has its codes."""
        return set_aside(self.work.block, self.work.subjects, self.codes, self.work.kernels)


def _tune_experts(work: Work, stage: Stage, compensate: _Compensate) -> None:
    """Experts in stacks: first the matrices that get hidden states, then the others, one expert after the other."""
    (name,) = stage.modules
    module: Any = work.block.get_submodule(name)
    tokens, chosen = _routed(work, name)
    first = first_of(module)
    by_expert: dict[tuple[str, int], list[Subject]] = {}
    for s in stage.subjects:
        assert s.place.expert is not None
        by_expert.setdefault((s.place.parameter.rpartition(".")[2], s.place.expert), []).append(s)
    with compensate.alone():
        factored = compensate.factor(_hessian(tokens))
        for (parameter, _), subjects in by_expert.items():
            if parameter == first:
                compensate.all(subjects, factored)
        del factored
        for (parameter, expert), subjects in by_expert.items():
            if parameter == SECOND:
                own = tokens[(chosen == expert).any(-1)]
                x = between(module, own if len(own) >= subjects[0].shape[1] else tokens, first, expert)
                compensate.all(subjects, compensate.factor(_hessian(x)))


def _hessian(inputs: torch.Tensor) -> Any:
    x = inputs.float()
    return (x.T @ x).cpu().numpy()


def _routed(work: Work, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens that come into a module with experts, [tokens, columns], and the experts of each."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(given(module, args, kwargs, name))
        raise _Met

    handle = work.block.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for part in work.inputs.split(1):
            with suppress(_Met):
                work.run(part)
    finally:
        handle.remove()
    return torch.cat([x for x, _ in found]), torch.cat([c for _, c in found])


def find_stages(work: Work) -> list[Stage]:
    """Modules with matrices that get codes, in the order in which one sample meets them."""
    by_module: dict[str, list[Subject]] = {}
    for s in work.subjects:
        by_module.setdefault(s.place.parameter.rpartition(".")[0], []).append(s)
    met: dict[str, torch.Tensor] = {}  # inputs are kept, so that no other gets their place in memory

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def catch(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            met.setdefault(name, args[0])

        return catch

    with _hooked({work.block.get_submodule(n): hook(n) for n in by_module}):
        work.run(work.inputs.part(0, 1))
    groups: list[tuple[list[str], torch.Tensor]] = []
    for name, x in met.items():
        stacked = any(s.place.expert is not None for s in by_module[name])
        if groups and groups[-1][1] is x and not stacked:
            groups[-1][0].append(name)
        else:
            groups.append(([name], x if not stacked else x[:0]))
    return [Stage(tuple(names), tuple(s for n in names for s in by_module[n])) for names, _ in groups]


class _Met(Exception):
    """The input that was wanted is there."""


def _hessian_of(work: Work, module: str) -> Any:
    """H [columns, columns], fp32: the sum of x x^T over all that comes into a Linear layer, sample by sample."""
    found: list[torch.Tensor] = []

    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        if found:
            found[0].addmm_(x.T, x)
        else:
            found.append(x.T @ x)
        raise _Met

    with _hooked({work.block.get_submodule(module): hook}):
        for part in work.inputs.split(1):
            with suppress(_Met):
                work.run(part)
    return found[0].cpu().numpy()


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    # before what takes an input to the device of its matrix: matrices that share one get the same tensor
    handles = [module.register_forward_pre_hook(hook, prepend=True) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _alike(subjects: Sequence[Subject], amax: Mapping[str, float]) -> list[list[Subject]]:
    """Matrices that one call quantizes, one below the other: rows know nothing of each other. Together they are copied,
    so that those with many weights stay alone."""
    groups: dict[Any, list[list[Subject]]] = {}
    for s in subjects:
        alone = s.tensor if s.shape[0] % s.scheme.group_rows else ""
        of = groups.setdefault((s.scheme, s.dtype, amax.get(s.tensor), alone), [[]])
        if of[-1] and sum(math.prod(other.shape) for other in (*of[-1], s)) > TOGETHER:
            of.append([])
        of[-1].append(s)
    return [group for of in groups.values() for group in of]


def _split(made: Quantized, subjects: Sequence[Subject]) -> Iterator[Quantized]:
    begin = 0
    for s in subjects:
        yield made.rows(slice(begin, begin + s.shape[0]))
        begin += s.shape[0]
