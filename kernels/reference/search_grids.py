"""The search of auto-round 0.16.1 for scales of symmetric integers, in the arithmetic of torch, as formulas."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from shardq.kernels.reference.searches import Groups

Round = Callable[[torch.Tensor], torch.Tensor]
IN_TYPE: Final[dict[str, Round]] = {
    "BF16": lambda x: x.bfloat16().float(),
    "F16": lambda x: x.half().float(),
    "F32": lambda x: x,
}
WIDE, SIDE_BY_SIDE, LEVELS, LEAST_POWER = 8, 4, 4, 4  # of ATen's SumKernel, compiled for AVX2


@dataclass(frozen=True, slots=True)
class Found:
    """Scales, bad groups and both errors [rows, G], codes [rows, G, width]."""

    scales: torch.Tensor
    codes: torch.Tensor
    bad: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor


def sums_of_torch(x: torch.Tensor) -> torch.Tensor:
    """fp32 [rows, G] of [rows, G, width], added in the order of torch.sum where it has AVX2."""
    width = x.shape[2]
    wide = WIDE if width >= WIDE else 1
    vectors = width // wide
    steps = vectors // SIDE_BY_SIDE
    whole = x[..., : vectors * wide].reshape(*x.shape[:2], vectors, wide)
    four = _levels(whole[:, :, : steps * SIDE_BY_SIDE].reshape(*x.shape[:2], steps, SIDE_BY_SIDE, wide))
    total = four[..., 0, :]
    for vector in whole[:, :, steps * SIDE_BY_SIDE :].unbind(2):
        total = total + vector
    for k in range(1, SIDE_BY_SIDE):
        total = total + four[..., k, :]
    if wide == 1:
        return total[..., 0]
    found = torch.zeros(x.shape[:2])
    for number in (*x[..., vectors * wide :].unbind(2), *total.unbind(2)):
        found = found + number
    return found


def _levels(x: torch.Tensor) -> torch.Tensor:
    """[..., 4, wide] of [..., steps, 4, wide]."""
    steps = x.shape[2]
    power = max(LEAST_POWER, math.ceil(math.log2(steps)) // LEVELS if steps > 1 else 0)
    mask = (1 << power) - 1
    levels: list[torch.Tensor] = [torch.zeros_like(x[:, :, :1]).sum(2) for _ in range(LEVELS)] if steps else []
    if not steps:
        return torch.zeros(*x.shape[:2], *x.shape[3:])
    for step, each in enumerate(x.unbind(2), start=1):
        levels[0] = levels[0] + each
        if step & mask:
            continue
        for i in range(1, LEVELS):
            levels[i] = levels[i] + levels[i - 1]
            levels[i - 1] = torch.zeros_like(levels[0])
            if step & mask << i * power:
                break
    total = levels[0]
    for more in levels[1:]:
        total = total + more
    return total


def reciprocal(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """1 / x; 0 for what auto-round takes for 0."""
    return torch.where(x.abs() >= (1e-5 if dtype == "F16" else 1e-30), IN_TYPE[dtype](1.0 / x), 0.0)


def search(g: Groups, dtype: str, bits: int, factors: Sequence[torch.Tensor]) -> Found:
    """See KernelSet.search_grid."""
    in_type, half = IN_TYPE[dtype], 1 << bits - 1
    bad = ~g.w.isfinite().all(2)
    w = torch.where(bad[..., None], 0.0, g.w)
    leader = w.gather(2, w.abs().argmax(2, keepdim=True))
    inverse = reciprocal(leader, dtype)
    best = least = before = torch.zeros(())
    for i, factor in enumerate(factors):
        tried = in_type(inverse * -factor)
        scale = reciprocal(tried, dtype)
        levels = in_type(tried * w).round().clamp(-half, half - 1)
        difference = in_type(in_type(scale * levels) - w)
        loss = sums_of_torch(difference * difference * g.e)
        better = loss < least if i else torch.ones_like(loss, dtype=torch.bool)
        best = torch.where(better[..., None], scale, best)
        least = torch.where(better, loss, least)
        before = before if i else loss
    floor = in_type(torch.tensor(1e-5))
    best = torch.where(best < 0, best.minimum(-floor), best.maximum(floor))
    codes = in_type(w / best).round().clamp(-half, half - 1) + half
    nan = torch.where(bad, torch.nan, 0.0)
    return Found(best[..., 0], codes, bad, before + nan, least + nan)
