"""Weights of norms and biases of matrices, learned beside rounding: as numbers within their own range, that no codes
stand for.

Source: auto-round 0.16.1, `enable_norm_bias_tuning` (`wrapper.py`: WrapperLlamaNorm, WrapperLayerNorm, bias_v, with
`data_type/int.py`: quant_tensor_asym_wo_round): w becomes clamp(w / s + v + z, 0, 15) - z in units of a 15th of the
range, 0 included, as fp16; what moves is v, at the rate of rounding. Where auto-round writes a forward of its own for
norms, here the model's is run with other weights, so that norms which add 1 to theirs are right, too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from shardq.plans import Plan
from shardq.tune.awq_sites import Plain, plain_tensor
from shardq.tune.blocks import BlockModel
from shardq.tune.rounding import Learned
from shardq.tune.steps import Moved
from shardq.tune.subjects import Subject, find_parameters

LEVELS: Final = 15
LEAST: Final = 1e-5  # of a unit


@dataclass(frozen=True, slots=True)
class FreeUnit:
    """A parameter of a block that is learned without codes."""

    plain: Plain
    weight: Tensor  # [width], fp32
    learned: Learned  # without factors
    rate: float

    @property
    def parameter(self) -> str:
        """Its name in the block."""
        return self.plain.parameter

    def stored(self, v: Tensor) -> Tensor:
        """What is written for v [width], which gradients flow through; NaN stays."""
        low, high = self.weight.amin().clamp(max=0), self.weight.amax().clamp(min=0)
        step = ((high - low) / LEVELS).half().clamp(min=LEAST).float()
        zero = -low / step
        made = step * ((self.weight / step + v + zero).clamp(0, LEVELS) - zero)
        return made.to(self.plain.stored)

    def values(self, dtype: torch.dtype) -> Tensor:
        """In the type that is computed with."""
        return self.stored(self.learned.v).to(dtype)

    def moved(self, factors: bool) -> Iterator[Moved]:
        """What is to move."""
        del factors
        yield Moved((self.learned.v,), self.rate, bounded=False)


def find_plain(model: BlockModel, plan: Plan) -> tuple[Mapping[str, Plain], ...]:
    """Of each block the parameters that a checkpoint has as they are, and that the output copies, by their names."""
    decisions = {d.tensor.name: d for d in plan.decisions}
    found = []
    for parameters in find_parameters(model):
        plains = (plain_tensor(tensor, parameters, decisions) for tensor in parameters)
        found.append({p.parameter: p for p in plains if p})
    return tuple(found)


def make_free_units(
    block: nn.Module, plain: Mapping[str, Plain], subjects: Sequence[Subject], rates: Mapping[str, float], rate: float
) -> Iterator[FreeUnit]:
    """Weights of norms, at `rate`, and biases of matrices that get codes, at the rate of these."""
    for name, module in block.named_modules():
        if "norm" in type(module).__name__.lower() and (p := plain.get(f"{name}.weight")):
            yield _make_unit(block, p, rate)
    for s in subjects:
        bias = f"{s.place.parameter.removesuffix('weight')}bias"
        if s.place.parameter.endswith(".weight") and (p := plain.get(bias)):
            yield _make_unit(block, p, rates[s.place.parameter])


@torch.no_grad()
def put_learned(block: nn.Module, plain: Mapping[str, Plain], learned: Mapping[str, Tensor]) -> None:
    """Give parameters of a block what was learned of them, by tensor."""
    for name, p in plain.items():
        if p.tensor in learned:
            block.get_parameter(name).copy_(learned[p.tensor])


def _make_unit(block: nn.Module, plain: Plain, rate: float) -> FreeUnit:
    weight = block.get_parameter(plain.parameter).detach().float()
    return FreeUnit(plain, weight, Learned(torch.zeros_like(weight, requires_grad=True), ()), rate)
