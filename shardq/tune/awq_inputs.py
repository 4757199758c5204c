"""What comes into the sites of a block while it runs, as far as the search for scales needs it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shardq.tune.awq import GroupProducts, Products
from shardq.tune.awq_sites import Site
from shardq.tune.settings import AwqOptions
from shardq.tune.work import Work


@dataclass(slots=True)
class Seen:
    """What comes into the matrices of a site."""

    magnitudes: Tensor | None = None  # sums of |x| of each column, in double precision
    squares: Tensor | None = None  # and of x * x, where these are the loss, or codes are searched
    tokens: int = 0
    products: Products | None = None  # where the module is the only matrix
    calls: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = field(default_factory=list)  # of the module, where not
    groups: dict[int, GroupProducts] = field(default_factory=dict)  # by columns of a group, for clipping


def record_inputs(work: Work, sites: Sequence[Site], options: AwqOptions) -> list[Seen]:
    """What comes into each site while all samples, cut to `awq_seqlen` tokens, go through the block."""
    seen = [Seen() for _ in sites]
    with _hooked(work.block, sites, seen, options):
        for part in work.inputs.split(1):
            work.run(part.shortened(options.awq_seqlen) if options.awq_seqlen > 0 else part)
    return seen


@contextmanager
def _hooked(block: nn.Module, sites: Sequence[Site], seen: Sequence[Seen], options: AwqOptions) -> Iterator[None]:
    handles = []
    try:
        for site, own in zip(sites, seen, strict=True):
            first = site.behind[0].place.parameter.rpartition(".")[0]
            # before what takes an input to the device of its matrix: what is seen stays where the block's inputs are
            hook = _input_hook(site, own, options)
            handles.append(block.get_submodule(first).register_forward_pre_hook(hook, prepend=True))
            if len(site.behind) > 1 and options.awq_loss == "output":
                module = site.module(block)
                handles.append(module.register_forward_pre_hook(_call_hook(own), prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(site: Site, seen: Seen, options: AwqOptions) -> Callable[..., None]:
    groups = {s.scheme.group_columns(s.shape[1]) for s in site.behind} if options.awq_apply_clip else ()
    seen.groups = {group: GroupProducts(group) for group in groups}
    by_output = options.awq_loss == "output"
    seen.products = Products() if by_output and len(site.behind) == 1 else None

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        sums = x.abs().sum(0, dtype=torch.float64)
        seen.magnitudes = sums if seen.magnitudes is None else seen.magnitudes + sums
        seen.tokens += len(x)
        if not by_output or options.awq_codes == "searched":
            squares = (x * x).sum(0, dtype=torch.float64)
            seen.squares = squares if seen.squares is None else seen.squares + squares
        if seen.products:
            seen.products.add(x)
        for own in seen.groups.values():
            own.add(x)

    return hook


def _call_hook(seen: Seen) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.calls.append((args, dict(kwargs)))

    return hook
