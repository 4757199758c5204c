"""Scales of activations that a server does not compute for each token: by the largest magnitude that comes into each
matrix of a block while the samples run through it.

As auto-round 0.16.1 (`AlgorithmComposer._register_act_max_hooks`) and llm-compressor 0.14 (`StaticMinMaxObserver`) find
it: the block has its own weights, and the inputs that it is tuned with. Activations are not quantized on their way.
Matrices that a server runs as one share the largest; an expert that no token goes to gets the largest of its siblings.

The order is auto-round's (`AlgorithmComposer.compress_block`): AWQ scales the block first, then the largest magnitudes
are collected, then codes are found. Where norms and biases are learned beside codes, auto-round keeps what it collected
before, times a factor that it learns (`act_max_scale`, at most 1). Here the block runs once more, with the codes, norms
and biases that a server gets, and these magnitudes are written; those of before are what rounding is learned under.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shardq.errors import NonFiniteWeight, UnsupportedSource
from shardq.fused import fused_groups
from shardq.quantizers.input_scales import input_scale
from shardq.tune.inputs import SECOND, between, first_of, given, is_stacks
from shardq.tune.subjects import Subject
from shardq.tune.work import Work
from shardq.tuned import InputScale

InputScales = dict[str, InputScale]  # by tensor
Largest = dict[tuple[str, int | None], float]  # parameter of the block, and expert of a stack -> largest magnitude


@torch.no_grad()
def find_input_scales(work: Work, config: Mapping[str, Any] | None) -> InputScales:
    """Of each tensor whose scheme wants one; `config`: config.json, which tells what servers fuse. A sample at a time.

    Raises UnsupportedSource for a matrix that the block does not use, NonFiniteWeight for inputs that are NaN or
    infinite, or too large for the scale's type.
    """
    subjects = [s for s in work.subjects if s.scheme.calibrated]
    if not subjects:
        return {}
    with watching(work.block, subjects) as largest:
        for part in work.inputs.split(1):
            work.run(part)
    own = {s.module: largest.get((s.place.parameter, s.place.expert)) for s in subjects}
    found = _with_siblings(own)
    groups = fused_groups(own, config)
    scales = {}
    for s in subjects:
        amax = max(found[m] for m in groups.get(s.module, (s.module,)))
        value = input_scale(s.scheme, amax, s.dtype)
        if value is None:
            raise NonFiniteWeight(
                f"{s.tensor}: its inputs reach {amax:g}, which has no scale in {s.dtype}; is the checkpoint "
                "damaged, or --dtype too narrow for this model?"
            )
        scales[s.tensor] = InputScale(value, own[s.module] is None)
    return scales


def _with_siblings(own: Mapping[str, float | None]) -> dict[str, float]:
    """Magnitudes of all modules of a block: what nothing came into has the largest of those whose names differ in
    numbers alone, but for that of the block. Raises UnsupportedSource."""
    by_form: dict[str, list[float]] = {}
    for module, amax in own.items():
        by_form.setdefault(_form(module), []).extend([] if amax is None else [amax])
    for module in own:
        if not by_form[_form(module)]:
            raise UnsupportedSource(
                f"{module} gets no input when its block runs, so its activations have no scale: --ignore it"
            )
    return {m: max(by_form[_form(m)]) if amax is None else amax for m, amax in own.items()}


def _form(module: str) -> str:
    block, number, inner = re.split(r"(\.\d+\.|$)", module, maxsplit=1)
    return block + number + re.sub(r"(?<=\.)\d+(?=\.|$)", "*", inner)


@contextmanager
def watching(block: nn.Module, subjects: list[Subject]) -> Iterator[Largest]:
    """Magnitudes of what comes into matrices while a block runs; nothing for what no token goes to, infinity for
    NaN. Raises UnsupportedSource for experts of a form that is not known."""
    largest: Largest = {}
    hooks = []
    try:
        for name, inner in dict.fromkeys(_split(s.place.parameter) for s in subjects):
            module = block.get_submodule(name)
            if is_stacks(module, name):
                hook = _stack_hook(largest, f"{name}.{inner}", first=inner != SECOND)
            else:
                hook = _hook(largest, f"{name}.{inner}" if name else inner)
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield largest
    finally:
        for handle in hooks:
            handle.remove()


def _add(largest: Largest, key: tuple[str, int | None], rows: torch.Tensor) -> None:
    found = float(rows.abs().amax())
    largest[key] = max(largest.get(key, 0.0), math.inf if math.isnan(found) else found)


def _hook(largest: Largest, parameter: str) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _add(largest, (parameter, None), [*args, *kwargs.values()][0])

    return hook


def _split(parameter: str) -> tuple[str, str]:
    module, _, name = parameter.rpartition(".")
    return module, name


def _stack_hook(largest: Largest, parameter: str, first: bool) -> Callable[..., None]:
    """Each expert by the tokens that the router gives it: what its `first` matrix gets, or its second."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, chosen = given(module, args, kwargs, parameter)
        for index in range(module.num_experts):
            rows = x[(chosen == index).any(-1)]
            if len(rows):
                _add(largest, (parameter, index), rows if first else between(module, rows, first_of(module), index))

    return hook
