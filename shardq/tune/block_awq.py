"""AWQ of a block: site by site the factors of columns under which the nearest codes change least of what the module
gives that has the matrices, and after that, if asked for, ranges of groups.

Source: as of awq.py. Inputs are those of the block as it was: scaling does not change what it computes, so that sites
know nothing of each other. A norm is rounded to what is stored before its columns are scaled.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from shardq.quantizers.decode import decode_rows
from shardq.tune.awq import (
    CLIP_STEPS,
    factors_of,
    in_groups,
    mean_weights,
    range_at,
    split_bias,
    split_norm,
)
from shardq.tune.awq_inputs import Seen, record_inputs
from shardq.tune.awq_sites import Site
from shardq.tune.inputs import importance_by
from shardq.tune.settings import AwqOptions
from shardq.tune.subjects import Subject
from shardq.tune.work import Changes, Ranges, Work, largest_of, quantize_alone

UNCLIPPED: Final = ("q_", "k_", "query", "key")  # in a module's name: scores of attention suffer (auto-round, AutoAWQ)


@torch.no_grad()
def scale_block(work: Work, sites: Sequence[Site], options: AwqOptions) -> tuple[Changes, Ranges]:
    """Scale matrices of a block and what comes before them, in place. Clipped weights are clamped in place, too, or
    with `awq_clip_as_init` only their ranges come back. `options` as `TuneOptions.scaling` has them: without a word for
    codes these are the nearest. Raises NonFiniteWeight."""
    seen = record_inputs(work, sites, options)
    changes = Changes()
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    for site, own in zip(sites, seen, strict=True):
        if (factors := search_factors(work, site, own, options)) is not None:
            apply_factors(work.block, site, factors, changes)
    for site, own in zip(sites, seen, strict=True):
        for s in site.behind if options.awq_apply_clip else ():
            if not any(part in s.module.rpartition(".")[2] for part in UNCLIPPED):
                ranges[s.tensor] = _clip(work, s, own, changes)
    if not options.awq_clip_as_init:
        for s in (s for s in work.subjects if s.tensor in ranges):
            _clamp(s.weight(work.block), s, *ranges[s.tensor])
        ranges = {}
    return changes, ranges


def apply_factors(block: nn.Module, site: Site, factors: Tensor, changes: Changes) -> None:
    """Multiply the columns of a site's matrices, divide what comes before, and take down both."""
    exact = factors
    if site.norm:
        norm = block.get_parameter(site.norm.parameter)
        made, exact = split_norm(norm, site.adds, factors, site.norm.stored)
        norm.copy_(made)
        changes.replaced[site.norm.tensor] = made
    if site.rows:
        _multiply(site.rows.weight(block), (1 / factors)[:, None])
        changes.rows[site.rows.tensor] = 1 / factors
    if site.bias:
        bias = block.get_parameter(site.bias.parameter)
        changes.replaced[site.bias.tensor] = split_bias(bias, factors, site.bias.stored)
        bias.copy_(changes.replaced[site.bias.tensor])
    for s in site.behind:
        _multiply(s.weight(block), exact)
        changes.columns[s.tensor] = exact


def search_factors(work: Work, site: Site, seen: Seen, options: AwqOptions) -> Tensor | None:
    """The best of all candidates, fp32 [columns]; None where none changes the output by a number."""
    if seen.magnitudes is None:
        return None
    inputs = (seen.magnitudes / seen.tokens).float()
    weights = torch.ones_like(inputs)  # which duo candidates look at alone
    if any(duo for _, duo in options.candidates):
        weights = mean_weights((_near(work, s), s.scheme.group_columns(s.shape[1])) for s in site.behind)
    wanted = [_output(site.module(work.block)(*args, **kwargs)) for args, kwargs in seen.calls]
    least, best = float("inf"), None
    for ratio, duo in options.candidates:
        factors = factors_of(inputs, weights, ratio, duo)
        loss = _loss(work, site, seen, wanted, factors, options)
        if loss < least:
            least, best = loss, factors
    return best


def _loss(work: Work, site: Site, seen: Seen, wanted: Sequence[Tensor], factors: Tensor, options: AwqOptions) -> float:
    """Sum of squares of what codes of scaled matrices change of the module's output, or as if each column changed it
    alone."""
    made = _coded(work, site, factors, seen.squares if options.awq_codes == "searched" else None)
    if options.awq_loss == "inputs":
        squares = seen.squares
        assert squares is not None
        return sum(float((_change(work, s, values).square_().sum(0) * squares).sum()) for s, values in made)
    if seen.products:
        ((s, values),) = made
        return seen.products.squares(_change(work, s, values))
    prefix = f"{site.parent}." if site.parent else ""
    weights = {s.place.parameter.removeprefix(prefix): values.to(s.weight(work.block).device) for s, values in made}
    module = site.module(work.block)
    total = 0.0
    for (args, kwargs), right in zip(seen.calls, wanted, strict=True):
        found = _output(functional_call(module, weights, args, dict(kwargs)))
        total += float((found.float() - right.float()).square().sum(dtype=torch.float64))
    return total


def _coded(work: Work, site: Site, factors: Tensor, squares: Tensor | None) -> Iterator[tuple[Subject, Tensor]]:
    """What matrices are when their codes are scaled back, in the type that is computed with: the nearest codes, or with
    sums of squares of what comes in [columns] those of searched scales. One after the other, for who needs no two."""
    exact = factors
    if site.norm:
        norm = work.block.get_parameter(site.norm.parameter)
        exact = split_norm(norm, site.adds, factors, site.norm.stored)[1]
    importance = None if squares is None else importance_by((squares / exact.double().square()).cpu().numpy())
    reaching = [s for s in site.behind if s.reach]
    amax = largest_of(work, {s.tensor: _near(work, s).float() * exact for s in reaching}) if reaching else {}
    for s in site.behind:
        weight = _near(work, s)
        scaled = (weight.float() * exact).to(weight.dtype).float()
        values = _decoded(work, s, scaled, amax.get(s.tensor), importance)
        del scaled
        yield s, values.div_(exact).to(weight.dtype)


def _change(work: Work, s: Subject, values: Tensor) -> Tensor:
    """How far a matrix is from other values, fp32, in place of these where they are fp32, too."""
    return values.float().sub_(_near(work, s).float())


def _decoded(
    work: Work, s: Subject, weight: Tensor, amax: float | None, importance: NDArray[np.float32] | None = None
) -> Tensor:
    q = quantize_alone(weight.contiguous().cpu().numpy(), s, work.kernels, amax, importance)
    return torch.from_numpy(decode_rows(q, s.scheme, work.kernels)).to(weight.device)


def _clip(work: Work, s: Subject, seen: Seen, changes: Changes) -> tuple[Tensor, Tensor]:
    """The range of each group that changes least of its part of the output, [rows, groups] each end."""
    weight = _near(work, s).float()
    group = s.scheme.group_columns(s.shape[1])
    grouped, amax = in_groups(weight, group), largest_of(work).get(s.tensor)
    factors = changes.columns.get(s.tensor, torch.ones_like(weight[0]))
    least = torch.full(grouped.shape[:2], float("inf"), device=weight.device)
    best = [end[..., 0].clone() for end in range_at(grouped, s.scheme.symmetric, 0)]
    for step in range(CLIP_STEPS):
        ends = range_at(grouped, s.scheme.symmetric, step)
        narrow = grouped.clamp(*ends).reshape(len(weight), -1)[:, : s.shape[1]]
        values = _decoded(work, s, narrow, amax)
        errors = seen.groups[group].squares(in_groups(values - weight, group), factors)
        better = errors < least
        least = torch.where(better, errors, least)
        best = [torch.where(better, end[..., 0], old) for end, old in zip(ends, best, strict=True)]
    device = s.weight(work.block).device
    return best[0].to(device), best[1].to(device)


def _clamp(weight: Tensor, s: Subject, low: Tensor, high: Tensor) -> None:
    """Into the range of each group."""
    narrow = in_groups(weight.float(), s.scheme.group_columns(s.shape[1])).clamp(low[..., None], high[..., None])
    weight.copy_(narrow.reshape(len(weight), -1)[:, : s.shape[1]])


def _output(found: Any) -> Tensor:
    made: Tensor = found[0] if isinstance(found, tuple | list) else found
    return made


def _multiply(weight: Tensor, factors: Tensor) -> None:
    """In fp32, rounded once to the weight's type."""
    weight.copy_(weight.float() * factors.to(weight.device))


def _near(work: Work, s: Subject) -> Tensor:
    """A matrix where the block's inputs are; not a view where it lies elsewhere."""
    return s.weight(work.block).to(work.inputs.device)
