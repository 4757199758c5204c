"""Weights of a block that have their codes: set aside while there is no room for them, and made of their codes for one
operation at a time where the block runs all the same."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from shardq.quantizers.quantized import Quantized
from shardq.schemes import Scheme
from shardq.tune.settings import CPU
from shardq.tune.subjects import Subject
from shardq.tune.work import put_rows

if TYPE_CHECKING:
    from shardq.kernels import KernelSet


@dataclass(frozen=True, slots=True)
class Aside:
    """A parameter without content."""

    parameter: nn.Parameter
    shape: tuple[int, int]
    stride: tuple[int, ...]
    codes: Quantized
    scheme: Scheme
    kernels: "KernelSet"

    @property
    def extent(self) -> int:
        """Weights from the first to behind the last, with what may lie between."""
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    def make(self, room: torch.Tensor | None = None) -> torch.Tensor:
        """What its codes stand for, lying as it lay: in memory of its own, or at the front of `room`."""
        if room is None:
            made = self.parameter.new_empty_strided(self.shape, self.stride)
        else:
            made = room.as_strided(self.shape, self.stride)
        put_rows(made, self.codes, self.scheme, self.kernels)
        return made


@contextmanager
def set_aside(
    block: nn.Module, subjects: Iterable[Subject], codes: Mapping[str, Quantized], kernels: "KernelSet"
) -> Iterator[tuple[Aside, ...]]:
    """A context without the weights of matrices that have their codes, where these are whole parameters in main memory;
    at its end they are what their codes stand for."""
    coded = [(s, block.get_parameter(s.place.parameter)) for s in subjects if s.tensor in codes]
    aside = tuple(
        Aside(p, s.shape, p.stride(), codes[s.tensor], s.scheme, kernels)
        for s, p in coded
        if p.device.type == CPU and s.weight(block) is p
    )
    for a in aside:
        a.parameter.data = a.parameter.new_empty(0)
    try:
        yield aside
    finally:
        with torch.no_grad():
            for a in aside:
                a.parameter.data = a.make()


class Making(TorchFunctionMode):
    """A context in which a block runs though some of its weights are set aside: each operation that is given one gets
    what its codes stand for, made for it, so that no two matrices are there at once; Linear layers one after the other
    in the same memory."""

    def __init__(self, aside: Sequence[Aside]) -> None:
        super().__init__()
        self._of = {id(a.parameter): a for a in aside}
        self._room: torch.Tensor | None = None
        self._most = max((a.extent for a in aside), default=0)

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """What torch calls in place of any operation."""
        own = self._of.get(id(args[1])) if func is linear and len(args) > 1 else None
        if own is not None:  # alone gives what is no view of its weight
            if self._room is None or self._room.dtype != own.parameter.dtype:
                self._room = own.parameter.new_empty(self._most)
            args = (args[0], own.make(self._room), *args[2:])
        return func(*self._changed(args), **{k: self._changed(v) for k, v in (kwargs or {}).items()})

    def _changed(self, value: Any) -> Any:
        if type(value) in {tuple, list}:
            return type(value)(self._changed(v) for v in value)
        found = self._of.get(id(value))
        return value if found is None else found.make()
