"""What comes into the matrices of a block while it runs: sums of squares by column, for Linear layers and for experts
that are stored as stacks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from shardq.errors import UnsupportedSource

Experts = Literal["all", "routed"]
FIRST: Final = ("gate_up_proj", "up_proj")  # parameters of stacks with the input of the experts
SECOND: Final = "down_proj"
FLOOR: Final = 1e-4  # of the mean: what a column's importance is at least (quality.md, section 6 D)
SORTED: Final = ("Llama4TextExperts",)  # each expert gets a row of every token, 0 for those that are not its own


@dataclass(slots=True)
class Sums:
    """Sums of squares and of values, in double precision; of a stack each row is an expert's."""

    squares: NDArray[np.float64]  # [columns] or [experts, columns]
    values: NDArray[np.float64]  # of the inputs themselves
    tokens: NDArray[np.int64]  # [] or [experts]


@dataclass(slots=True)
class Inputs:
    """Of one block: sums by the name of the parameter that they are the input of."""

    sums: dict[str, Sums]
    routed: dict[str, NDArray[np.int64]]  # module with stacks -> tokens that the router gave each expert


def squares(rows: torch.Tensor) -> NDArray[np.float64]:
    """Sums of squares of the columns of [..., columns], in double precision."""
    wide = rows.detach().reshape(-1, rows.shape[-1]).double()
    found: NDArray[np.float64] = (wide * wide).sum(0).cpu().numpy()
    return found


def column_sums(rows: torch.Tensor) -> NDArray[np.float64]:
    """Sums of the columns of [..., columns], in double precision."""
    found: NDArray[np.float64] = rows.detach().reshape(-1, rows.shape[-1]).double().sum(0).cpu().numpy()
    return found


def importance_by(squares: NDArray[np.float64]) -> NDArray[np.float32] | None:
    """What an error counts in columns, from sums or means of squares [columns]: these beside their mean, none below
    FLOOR; None where nothing came in."""
    mean = float(squares.mean())
    return np.maximum(squares / mean, FLOOR).astype(np.float32) if mean > 0 else None


@contextmanager
def recording(module: nn.Module, name: str, experts: Experts) -> Iterator[Inputs]:
    """Record while the block `module`, which is called `name`, runs. Raises UnsupportedSource for experts of a form
    that is not known."""
    inputs = Inputs({}, {})
    hooks = []
    try:
        for inner, part in module.named_modules():
            full = f"{name}.{inner}" if inner else name
            if isinstance(part, nn.Linear):
                hooks.append(part.register_forward_pre_hook(_linear_hook(inputs, f"{full}.weight")))
            elif is_stacks(part, full):
                hooks.append(part.register_forward_pre_hook(_stack_hook(inputs, full, experts), with_kwargs=True))
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def is_stacks(module: nn.Module, name: str) -> bool:
    """True for a module with experts as stacks, in the form that transformers 5 gives to most of them, or that of
    Llama 4. Raises UnsupportedSource for another form."""
    least = 1 if hasattr(module, "num_experts") else 2  # one device may have one expert
    stacks = [n for n, p in module.named_parameters(recurse=False) if p.ndim == 3 and p.shape[0] >= least]
    if not stacks or "conv" in name:
        return False
    known = all(hasattr(module, word) for word in ("is_transposed", "has_bias", "has_gate", SECOND))
    if not (known or _is_sorted(module)) or not set(stacks) <= {*FIRST, SECOND}:
        raise UnsupportedSource(f"{name} ({type(module).__name__}) has experts in a form that is not known")
    return True


def _linear_hook(inputs: Inputs, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        add(inputs, name, args[0])

    return hook


def add(inputs: Inputs, name: str, rows: torch.Tensor) -> None:
    """Count the input of a matrix, [..., columns]."""
    found = squares(rows)
    own = inputs.sums.setdefault(name, Sums(np.zeros_like(found), np.zeros_like(found), np.zeros((), np.int64)))
    own.squares += found
    own.values += column_sums(rows)
    own.tokens += rows.numel() // rows.shape[-1]


def _stack_hook(inputs: Inputs, name: str, experts: Experts) -> Callable[..., None]:
    """`all`: each token through every expert, whatever the router says; `routed`: as the model does it, and as
    llama-imatrix counts. The arithmetic is that of transformers' own (integrations/moe.py)."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, chosen = given(module, args, kwargs, name)
        first = first_of(module)
        count = module.num_experts
        width = getattr(module, SECOND).shape[1 if _is_turned(module) else 2]
        gate = inputs.sums.setdefault(f"{name}.{first}", _empty(count, x.shape[-1]))
        down = inputs.sums.setdefault(f"{name}.{SECOND}", _empty(count, width))
        routed = inputs.routed.setdefault(name, np.zeros(count, np.int64))
        everything, sums = (squares(x), column_sums(x)) if experts == "all" else (None, None)
        for index in range(count):
            hit = (chosen == index).any(-1)
            tokens = int(hit.sum())
            routed[index] += tokens
            rows = x if experts == "all" else x[hit]
            if not len(rows):
                continue
            second = between(module, rows, first, index)
            gate.squares[index] += squares(rows) if everything is None else everything
            gate.values[index] += column_sums(rows) if sums is None else sums
            down.squares[index] += squares(second)
            down.values[index] += column_sums(second)
            gate.tokens[index] += len(rows)
            down.tokens[index] += len(rows)

    return hook


def given(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [tokens, columns], and the experts of each [tokens, experts of a token]. Where the router's weights are in
    the tokens, there is one for each expert of a token."""
    values = [*args, *kwargs.values()]
    x = values[0].reshape(-1, values[0].shape[-1])
    if _is_sorted(module):
        own = x.any(-1).nonzero()[:, 0]
        return x[own], (own // (len(x) // module.num_experts))[:, None]
    for value in values[1:]:
        if isinstance(value, torch.Tensor) and not value.is_floating_point() and value.numel() % len(x) == 0:
            return x, value.reshape(len(x), -1)
    raise UnsupportedSource(f"{name} ({type(module).__name__}) is not told which experts a token goes to")


def between(module: Any, rows: torch.Tensor, first: str, index: int) -> torch.Tensor:
    """What the second matrix of an expert gets."""
    weight = getattr(module, first)[index]
    out = rows @ weight if _is_turned(module) else functional.linear(rows, weight)
    if _is_sorted(module):
        gate, up = out.chunk(2, dim=-1)
        gated: torch.Tensor = up * module.act_fn(gate)
        return gated
    if module.has_bias:
        out = out + getattr(module, f"{first}_bias")[index]
    made: torch.Tensor = module._apply_gate(out) if module.has_gate else module.act_fn(out)
    return made


def first_of(module: Any) -> str:
    """The parameter with the input of the experts."""
    return FIRST[0] if _is_sorted(module) or module.has_gate else FIRST[1]


def is_cuttable(module: nn.Module) -> bool:
    """True for stacks whose module is told which experts each token goes to, so that some of them can be elsewhere."""
    return not _is_sorted(module)


def _is_sorted(module: nn.Module) -> bool:
    return type(module).__name__ in SORTED


def _is_turned(module: Any) -> bool:
    """True if slices are [inputs, outputs]."""
    return _is_sorted(module) or bool(module.is_transposed)


def _empty(experts: int, columns: int) -> Sums:
    return Sums(np.zeros((experts, columns)), np.zeros((experts, columns)), np.zeros(experts, np.int64))
