"""What a server does to the inputs of matrices, done while a block runs: numbers of few bits under scales that are
found for each token or that data gave, so that rounding is learned, and the next block's inputs are made, with the
errors of that.

As auto-round 0.16.1 does it (`wrapper.py`: WrapperLinear, WrapperWALayer) with the Linear layers that it tunes. The
arithmetic, in fp32, is that of compressed-tensors 0.20 for integers and FP8 (`calculate_qparams`: scales of fp32, the
largest magnitude over half the range, or 448) and auto-round's for the others; powers of two go by the scheme's rule
where the activation has none. Gradients pass as if nothing had happened; auto-round's would also move the largest
magnitude of each group.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from shardq.quantizers.float_scales import E4M3, E5M3, global_scale
from shardq.schemes import ACTIVATIONS, WEIGHT_TYPE, Activation, Exponent, Scheme
from shardq.tune.float_elements import nearest
from shardq.tune.float_scales import Plain, Powers, ScaleRule, Scales, SmallE4m3, SmallE5m3
from shardq.tune.inputs import FIRST, SECOND, between, given, is_stacks
from shardq.tune.rounding_floats import divisors
from shardq.tune.subjects import Subject
from shardq.tuned import InputScale

Change = Callable[[Tensor], Tensor]


def fake_quantize(x: Tensor, activation: Activation, exponent: Exponent, known: float | None = None) -> Tensor:
    """Inputs [..., columns] of a matrix as a server has them, in their own type; `exponent`: the rule of scales that
    are powers of two; `known`: the number that data gave (quantizers/input_scales.py), where activations are
    calibrated. A short last group has a scale of its own; a group of zeros stays, NaN makes NaN of its group. Where a
    global scale is calibrated and not known, that of these very inputs is taken, as auto-round does without data."""
    columns = x.shape[-1]
    group = columns if activation.group_size < 1 else min(activation.group_size, columns)
    grouped = functional.pad(x.float(), (0, -columns % group)).reshape(-1, -(-columns // group), group)
    absmax = grouped.abs().amax(-1)
    steps = _RULES[activation.scale](activation, exponent, absmax, known).make(absmax, torch.ones_like(absmax)).steps
    made = nearest(grouped / divisors(steps)[..., None], activation.element) * steps[..., None]
    return made.flatten(1)[:, :columns].reshape(x.shape).to(x.dtype)


@dataclass(frozen=True, slots=True)
class _Known:
    """One scale for all, which no input changes."""

    scale: float

    def make(self, absmax: Tensor, factor: Tensor) -> Scales:
        """See ScaleRule."""
        steps = torch.full_like(absmax, self.scale)
        return Scales(steps, steps, torch.zeros_like(factor))


def _static(activation: Activation, exponent: Exponent, absmax: Tensor, known: float | None) -> ScaleRule:
    del exponent, absmax
    assert known is not None, f"{activation.name} is calibrated"
    return _Known(known)


def _plain(activation: Activation, exponent: Exponent, absmax: Tensor, known: float | None) -> ScaleRule:
    del exponent, absmax, known
    top = activation.format.max_value
    return Plain(top - 0.5 if activation.format.is_integer else top, activation.scale)


def _powers(activation: Activation, exponent: Exponent, absmax: Tensor, known: float | None) -> ScaleRule:
    del absmax, known
    return Powers(activation.element, activation.exponent or exponent)


def _e4m3(activation: Activation, exponent: Exponent, absmax: Tensor, known: float | None) -> ScaleRule:
    del exponent
    largest = activation.format.max_value
    own = float(global_scale(float(absmax.amax()), largest)) if known is None and absmax.numel() else 1.0
    return SmallE4m3(largest, torch.tensor(own if known is None else known, device=absmax.device))


def _e5m3(activation: Activation, exponent: Exponent, absmax: Tensor, known: float | None) -> ScaleRule:
    del exponent, absmax, known
    return SmallE5m3(activation.format.max_value)


_RULES: Final[Mapping[str, Callable[[Activation, Exponent, Tensor, float | None], ScaleRule]]] = {
    WEIGHT_TYPE: _static,
    "fp32": _plain,
    "e8m0": _powers,
    E4M3: _e4m3,
    E5M3: _e5m3,
}


class _Through(torch.autograd.Function):
    """Inputs that have become others, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Change) -> Tensor:
        """What `change` makes."""
        del ctx
        return change(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """As it comes."""
        del ctx
        return grads[0], None


@contextmanager
def serving(block: nn.Module, subjects: Iterable[Subject], scales: Mapping[str, InputScale]) -> Iterator[None]:
    """A context in which the block quantizes the inputs of these matrices, where their schemes say so; `scales`: of
    those that are calibrated, by tensor. Experts in stacks run one after the other. Raises UnsupportedSource for
    experts of a form that is not known."""
    changes = {
        (s.place.parameter, s.place.expert): _change_of(s.scheme, scales.get(s.tensor))
        for s in subjects
        if s.scheme.activation
    }
    handles, replaced = [], []
    try:
        for name in dict.fromkeys(parameter.rpartition(".")[0] for parameter, _ in changes):
            module = block.get_submodule(name)
            prefix = f"{name}." if name else ""
            if is_stacks(module, name):
                own = {(p.removeprefix(prefix), e): c for (p, e), c in changes.items() if p.startswith(prefix)}
                replaced.append((module, module.__dict__.get("forward")))
                module.__dict__["forward"] = partial(run_experts, module, name, own)
            else:
                handles.append(module.register_forward_pre_hook(_hook(changes[f"{prefix}weight", None])))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, before in replaced:
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before


def _change_of(scheme: Scheme, scale: InputScale | None) -> Change:
    activation, known = ACTIVATIONS[scheme.activation], scale.value if scale else None

    def quantize(x: Tensor) -> Tensor:
        return fake_quantize(x, activation, scheme.exponent, known)

    def change(x: Tensor) -> Tensor:
        made: Tensor = _Through.apply(x, quantize)  # type: ignore[no-untyped-call]
        return made

    return change


def _hook(change: Change) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def replace(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (change(args[0]), *args[1:])

    return replace


def run_experts(
    module: Any, name: str, changes: Mapping[tuple[str, int | None], Change], *args: Any, **kwargs: Any
) -> Tensor:
    """The arithmetic of transformers' own (integrations/moe.py), with changed inputs of both matrices. Experts that the
    module does not have, as -1, give nothing."""
    x, chosen = given(module, args, kwargs, name)
    weights = _weights_of(args, kwargs, chosen)
    first = FIRST[0] if module.has_gate else FIRST[1]
    out = torch.zeros_like(x)
    for index in range(module.num_experts):
        tokens, places = (chosen == index).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        rows = changes.get((first, index), _same)(x[tokens])
        rows = changes.get((SECOND, index), _same)(between(module, rows, first, index))
        down = getattr(module, SECOND)[index]
        made = rows @ down if module.is_transposed else functional.linear(rows, down)
        if module.has_bias:
            made = made + getattr(module, f"{SECOND}_bias")[index]
        if getattr(module, "has_post_expert_norm", False):
            made = module.post_expert_norm(made)
        out = out.index_add(0, tokens, (made * weights[tokens, places, None]).to(out.dtype))
    return out.reshape((args[0] if args else next(iter(kwargs.values()))).shape)


def _weights_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], chosen: Tensor) -> Tensor:
    """How much each expert of a token counts, in the shape of `chosen`."""
    values = [v for v in [*args, *kwargs.values()][1:] if isinstance(v, Tensor) and v.is_floating_point()]
    return values[0].reshape(chosen.shape)


def _same(x: Tensor) -> Tensor:
    return x
