"""Weights that are learned, in place of a block's own while it runs: made when an operation asks for one, and of a
Linear layer gone again when its product is there. The way back makes them once more, and hands the gradient of a weight
on tile by tile, so that at no time more than one matrix of a block is there as its codes make it, nor the gradient of
more than one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from shardq.tune.arithmetic import EAGER, Arithmetic
from shardq.tune.rounding import Grid, Learned
from shardq.tune.rounding_tiles import Give, make_values, pull_values

SAID: Final = frozenset(  # of a tensor, without its numbers
    {"shape", "dtype", "device", "ndim", "layout", "is_meta", "is_cuda", "is_cpu", "is_leaf", "requires_grad",
     "size", "dim", "numel", "element_size", "is_floating_point", "data_ptr"}
)  # fmt: skip
MOST_AXES: Final = 3  # of inputs that torch multiplies and adds a bias to in one step
Move = Callable[[Tensor, Tensor], None]  # moves a part of V by its gradient


@dataclass(slots=True)
class Weight:
    """A weight while a loss is computed."""

    grid: Grid
    learned: Learned
    dtype: torch.dtype  # that the block computes in
    move: Move | None  # None: the gradient of V is left behind, to be moved by later
    arithmetic: Arithmetic = EAGER
    uses: int = 0

    def make(self) -> Tensor:
        """As its codes make it, [rows, columns], without gradients."""
        return make_values(self.grid, self.learned, self.dtype, self.arithmetic)

    def pull(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of V and of factors from that of the weight, [rows, columns]. What is used once has V moved at
        once, and none of it left behind."""
        v = self.learned.v.detach()
        if self.move is not None and self.uses == 1:
            move = self.move
            return None, *self._pull(grad, lambda lines, by_v: move(v[lines], by_v))
        whole = torch.empty_like(v)
        return whole, *self._pull(grad, lambda lines, by_v: whole[lines].copy_(by_v))

    def _pull(self, grad: Tensor, give: Give) -> tuple[Tensor, ...]:
        return pull_values(self.grid, self.learned, grad, give, self.arithmetic)


class Made(Protocol):
    """What stands in for a parameter."""

    def values(self, dtype: torch.dtype) -> Tensor:
        """What gradients flow through."""


class Product(torch.autograd.Function):
    """A Linear layer's product with a learned weight. Products are those that torch makes itself, in forward and
    backward (`at::linear`, and the derivatives of `mm` and `addmm` of torch 2.13), so that numbers are, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Weight, *learned: Tensor) -> Tensor:
        """Outputs [..., rows] of inputs [..., columns]; `learned` are V and factors of the weight."""
        flat, made = x.reshape(-1, x.shape[-1]), weight.make()
        ctx.save_for_backward(*learned)
        ctx.weight, ctx.shape = weight, x.shape
        ctx.inputs, ctx.version = flat, flat._version  # not saved: so that the way back can let go of them
        out = flat.new_empty((*x.shape[:-1], len(made)))  # no view, which others could not change in place
        if bias is None:
            torch.mm(flat, made.t(), out=out.view(-1, len(made)))
        else:
            torch.addmm(bias, flat, made.t(), out=out.view(-1, len(made)))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Of inputs, of V and of factors."""
        assert ctx.saved_tensors  # raises where one of them has moved since
        weight: Weight = ctx.weight
        flat, ctx.inputs = ctx.inputs, None
        if flat._version != ctx.version:
            raise RuntimeError("inputs of a matrix were changed where they lie, before the way back came by")
        by_out = grads[0].reshape(-1, weight.grid.rows)
        by_x = by_out.mm(weight.make()).view(ctx.shape) if ctx.needs_input_grad[0] else None
        by_weight = by_out.t().mm(flat)
        del flat, by_out  # of a batch, while there are tiles
        return by_x, None, None, *weight.pull(by_weight)


class Whole(torch.autograd.Function):
    """A learned weight [rows, columns] for whatever is made with it."""

    @staticmethod
    def forward(ctx: Any, weight: Weight, *learned: Tensor) -> Tensor:
        """`learned` are V and factors of the weight."""
        ctx.save_for_backward(*learned)
        ctx.weight = weight
        return weight.make()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Of V and of factors."""
        assert ctx.saved_tensors  # raises where one of them has moved since
        weight: Weight = ctx.weight
        return None, *weight.pull(grads[0])


class Standing(TorchFunctionMode):
    """A context for one run of a block: operations get learned weights in place of the parameters that these stand in
    for. What a Linear layer asks for it gets for itself; other weights are there until the context ends, and as long as
    the way back needs them."""

    def __init__(self, block: nn.Module, made: Mapping[str, Made], weights: Mapping[str, Weight]) -> None:
        """By names of parameters; `weights` are those of Linear layers among `made`."""
        super().__init__()
        parameters = {name: block.get_parameter(name) for name in made}
        self._of = {id(p): name for name, p in parameters.items()}
        self._parameters, self._made, self._weights = parameters, made, weights
        self._there: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """What torch calls in place of any operation."""
        kwargs = kwargs or {}
        if not self._meets(args) and not self._meets(tuple(kwargs.values())):
            return func(*args, **kwargs)
        if getattr(getattr(func, "__self__", func), "__name__", "") in SAID:
            return func(*args, **kwargs)
        if func is linear and len(args) > 1 and (found := self._product(*args, **kwargs)) is not None:
            return found
        return func(*self._changed(args), **{k: self._changed(v) for k, v in kwargs.items()})

    def _product(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor | None:
        """None for what is no plain product with a weight that is used for nothing else."""
        own = self._weights.get(self._of.get(id(weight), ""))
        if own is None or x.dim() < 2 or not x.is_contiguous() or not torch.is_grad_enabled():
            return None
        if bias is not None and (x.dim() > MOST_AXES or bias.requires_grad or id(bias) in self._of):
            return None
        own.uses += 1
        made: Tensor = Product.apply(x, bias, own, *own.learned.all)  # type: ignore[no-untyped-call]
        return made

    def _meets(self, values: Sequence[Any]) -> bool:
        return any(id(v) in self._of or (isinstance(v, tuple | list) and self._meets(v)) for v in values)

    def _changed(self, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._changed(v) for v in value)
        name = self._of.get(id(value))
        if name is None:
            return value
        if name not in self._there:
            self._there[name] = self._made[name].values(self._parameters[name].dtype)
        return self._there[name]
