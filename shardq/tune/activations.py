"""What goes into the blocks of a model: hidden states, and what else each is called with (masks, tables of rotary
embeddings), as the model's own forward calls them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn

from shardq.errors import UnsupportedSource
from shardq.tune.spool import CPU, Hidden

HIDDEN: Final = "hidden_states"


@dataclass(frozen=True, slots=True)
class Own:
    """A value that each sample has one of, [1, ...]."""

    values: tuple[torch.Tensor, ...]

    def on(self, device: torch.device) -> "Own":
        """The same on a device."""
        return Own(tuple(v.to(device) for v in self.values))


@dataclass(frozen=True, slots=True)
class Call:
    """What a block is called with beside hidden states; tensors have one sample, or an Own stands in their place."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples on their way through a model."""

    hidden: Hidden  # [samples, tokens, width]
    calls: tuple[Call, ...]  # of each block
    device: torch.device = CPU  # where blocks are computed; what lies elsewhere goes there when one is called

    @property
    def states(self) -> torch.Tensor:
        """Hidden states in memory: themselves, or a copy of all that a file has."""
        return self.hidden if isinstance(self.hidden, torch.Tensor) else self.hidden[:]

    def part(self, start: int, stop: int) -> "Batch":
        """Some of the samples in memory; their hidden states are a view, or a copy of what a file has."""
        calls = tuple(_map(c, lambda own: Own(own.values[start:stop])) for c in self.calls)
        return replace(self, hidden=self.hidden[start:stop], calls=calls)

    def pick(self, samples: Sequence[int]) -> "Batch":
        """Some of the samples, in any order; their hidden states are a copy."""
        calls = tuple(_map(c, lambda own: Own(tuple(own.values[i] for i in samples))) for c in self.calls)
        return replace(self, hidden=self.hidden[list(samples)], calls=calls)

    def shortened(self, tokens: int) -> "Batch":
        """The first tokens of each sample; hidden states are a view. What blocks are called with is cut where it has as
        many entries as a sample has tokens: vectors, rows of tables, columns and rows of masks."""
        length = self.hidden.shape[1]
        if length <= tokens:
            return self

        def cut(value: torch.Tensor) -> torch.Tensor:
            return _shortened(value, length, tokens)

        calls = tuple(_map(c, lambda own: Own(tuple(cut(v) for v in own.values)), cut) for c in self.calls)
        return replace(self, hidden=self.states[:, :tokens], calls=calls)

    def moved(self, hidden: Hidden) -> "Batch":
        """The same samples with other hidden states."""
        return replace(self, hidden=hidden)

    def on(self, device: torch.device, whole: bool) -> "Batch":
        """The same samples, whose blocks are computed on a device: all that they are there, or only what all of them
        share, and of the others what a call needs."""
        calls = tuple(_map(c, lambda own: own.on(device) if whole else own, lambda t: t.to(device)) for c in self.calls)
        return Batch(self.states.to(device) if whole else self.hidden, calls, device)

    def split(self, samples: int) -> Iterator["Batch"]:
        """Parts of so many samples."""
        for start in range(0, len(self.hidden), samples):
            yield self.part(start, start + samples)


def call_block(module: Callable[..., Any], batch: Batch, index: int) -> torch.Tensor:
    """Hidden states behind a block, [samples, tokens, width]."""
    call = _map(batch.calls[index], lambda own: torch.cat(own.values).to(batch.device), lambda t: t.to(batch.device))
    found = module(batch.states.to(batch.device), *call.args, **call.kwargs)
    made: torch.Tensor = found[0] if isinstance(found, tuple | list) else found
    return made


class _Done(Exception):
    """What was wanted of a forward is there."""


def catch_input(module: nn.Module, forward: Callable[[], Any]) -> torch.Tensor:
    """What `forward` gives to a module, which is not run."""
    met: list[torch.Tensor] = []

    def catch(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        met.append(args[0])
        raise _Done

    handle = module.register_forward_pre_hook(catch)
    try:
        with contextlib.suppress(_Done):
            forward()
    finally:
        handle.remove()
    return met[0]


@dataclass(slots=True)
class _Record:
    """What one pass through a model's forward met."""

    count: int
    as_tuple: bool  # what stands in for blocks gives a tuple
    calls: list[Call]
    hidden: torch.Tensor | None = None
    last: Any = None  # what was given back
    strange: int | None = None  # a block that got something else than what the one before gave

    def recorder(self, index: int) -> Callable[..., Any]:
        """What stands in for a block."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            named = dict(kwargs)
            hidden, rest = (named.pop(HIDDEN), args) if HIDDEN in named else (args[0], args[1:])
            if index == 0:
                self.hidden = hidden
            elif hidden is not self.last and self.strange is None:
                self.strange = index
            self.last = hidden
            self.calls.append(Call(rest, named))
            if index == self.count - 1:
                raise _Done
            return (hidden,) if self.as_tuple else hidden

        return forward


@dataclass(frozen=True, slots=True)
class Recorded:
    """What one pass through a model's forward does with its blocks."""

    hidden: torch.Tensor  # before the first
    calls: list[Call]
    as_tuple: bool  # blocks give a tuple whose first member is hidden states


def record_calls(blocks: Sequence[nn.Module], forward: Callable[[], Any], label: str) -> Recorded:
    """Hidden states before the first block, and the call of each, as `forward` makes them. Raises UnsupportedSource for
    a model that does more between its blocks than to call one after the other."""
    for as_tuple in (False, True):
        record = _Record(len(blocks), as_tuple, [])
        with _replaced(blocks, record.recorder):
            try:
                with contextlib.suppress(_Done):
                    forward()
            except (RuntimeError, IndexError, ValueError):
                if as_tuple or record.strange is None:
                    raise
        if record.strange is None and len(record.calls) == len(blocks):
            assert record.hidden is not None
            return Recorded(record.hidden, record.calls, as_tuple)
    where = f"before block {record.strange}" if record.strange is not None else "around its blocks"
    raise UnsupportedSource(f"{label}: the model computes something {where}: expected blocks one after the other")


def replace_blocks(blocks: Sequence[nn.Module], hidden: torch.Tensor, as_tuple: bool) -> AbstractContextManager[None]:
    """A context in which the blocks of a model give `hidden` whatever they get."""
    given = (hidden,) if as_tuple else hidden

    def give(*_: Any, **__: Any) -> Any:
        return given

    return _replaced(blocks, lambda _: give)


@contextmanager
def _replaced(blocks: Sequence[nn.Module], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Other forwards for blocks: as attributes of the modules, which keep all others that a model asks for."""
    for index, block in enumerate(blocks):
        block.__dict__["forward"] = make(index)
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


def join_calls(first: Sequence[Call], more: Sequence[Call], count: int) -> list[Call]:
    """The calls of `count` samples and those of one more, for each block: what is equal for all is kept once."""
    return [
        Call(
            tuple(_join(a, b, count) for a, b in zip(x.args, y.args, strict=True)),
            {key: _join(value, y.kwargs[key], count) for key, value in x.kwargs.items()},
        )
        for x, y in zip(first, more, strict=True)
    ]


def _join(value: Any, more: Any, count: int) -> Any:
    if isinstance(value, Own):
        return Own((*value.values, more))
    if isinstance(value, torch.Tensor):
        alike = value is more or torch.equal(value, more)
        return value if alike else Own((*(value,) * count, more))
    if isinstance(value, tuple | list):
        return type(value)(_join(a, b, count) for a, b in zip(value, more, strict=True))
    if isinstance(value, dict):
        return {key: _join(a, more[key], count) for key, a in value.items()}
    return value


def _shortened(value: torch.Tensor, length: int, tokens: int) -> torch.Tensor:
    """[tokens], [x, tokens], [x, tokens, width], [x, heads, tokens(, tokens or width)], as models call their blocks."""
    axes = {1: (0,), 2: (1,), 3: (1,), 4: (2, 3)}.get(value.ndim, ())
    for axis in axes:
        if value.shape[axis] == length and (axis < 3 or value.shape[2] in {1, tokens}):
            value = value.narrow(axis, 0, tokens)
    return value


def _map(
    call: Call, change: Callable[[Own], Any], shared: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Call:
    """A call with other values of samples, and of tensors that all of them share."""

    def changed(value: Any) -> Any:
        if isinstance(value, Own):
            return change(value)
        if isinstance(value, torch.Tensor):
            return value if shared is None else shared(value)
        if isinstance(value, tuple | list):
            return type(value)(changed(v) for v in value)
        if isinstance(value, dict):
            return {key: changed(v) for key, v in value.items()}
        return value

    return Call(tuple(changed(v) for v in call.args), {k: changed(v) for k, v in call.kwargs.items()})
