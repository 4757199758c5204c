"""What learning needs of a grid, some rows at a time: so that of what rounding makes on its way nothing is there for a
whole weight but what is asked for. Numbers are those of the grid's methods for all rows at once, bit for bit."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from shardq.tune.arithmetic import EAGER, Arithmetic
from shardq.tune.rounding import Grid, Learned
from shardq.tune.rounding_parts import Kept, in_groups, row_tiles

Give = Callable[[slice, Tensor], object]  # takes the gradient of some lines of V, of other ones at the same time
Made = TypeVar("Made")


def make_values(grid: Grid, learned: Learned, dtype: torch.dtype, arithmetic: Arithmetic = EAGER) -> Tensor:
    """The weight [rows, columns] as its codes make it, rounded to `dtype` from fp32."""
    made = torch.empty((grid.rows, grid.columns), dtype=dtype, device=grid.source.device)

    def fill(rows: slice, part: Grid, v: Tensor, factors: Sequence[Tensor]) -> None:
        made[rows] = arithmetic.values(part, v, factors).reshape(part.rows, -1)[:, : grid.columns]

    _each(grid, learned, fill)
    return made


def pull_values(
    grid: Grid, learned: Learned, grad: Tensor, give: Give, arithmetic: Arithmetic = EAGER
) -> tuple[Tensor, ...]:
    """Gradients of factors from that of `make_values`, [rows, columns]; the one of V is given away, lines by lines,
    which may have V moved: no line is looked at twice."""

    def pull(rows: slice, part: Grid, v: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        pulled = in_groups(grad[rows].float(), v.shape[-1]).reshape(v.shape)
        by_v, *sums = arithmetic.pull(part, pulled, v, factors)
        give(grid.lines(rows), by_v)
        return tuple(sums)

    found = _each(grid, learned, pull)
    with torch.no_grad():
        return grid.gather([torch.cat(of) for of in zip(*found, strict=True)], learned.factors)


def keep_codes(grid: Grid, learned: Learned) -> Kept:
    """The codes of now, which stay when V moves."""
    levels = grid.room_for_codes()

    def keep(rows: slice, part: Grid, v: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        r = part.round(v, *factors)
        levels[rows] = part.keep(v, r)
        return r.scales if r.kept is None else r.kept, r.shift

    small = _each(grid, learned, keep)
    shifts = [shift for _, shift in small if shift is not None]
    return Kept(levels, torch.cat([scales for scales, _ in small]), torch.cat(shifts) if shifts else None)


@torch.no_grad()
def _each(grid: Grid, learned: Learned, use: Callable[[slice, Grid, Tensor, Sequence[Tensor]], Made]) -> list[Made]:
    """What is made of each tile, its V and its factors, without gradients. As many threads as torch has on a CPU, since
    it has one for a tile; which does what changes nothing."""
    each, factors = grid.by_rows([f.detach() for f in learned.factors])
    v = learned.v.detach()  # parts of V itself would know that others have moved since, which torch's compiler minds

    @torch.no_grad()
    def on(rows: slice) -> Made:
        lines = grid.lines(rows)
        return use(rows, each.part(rows), v[lines], [f[lines] for f in factors])

    tiles = list(row_tiles(grid.source))
    threads = min(torch.get_num_threads(), len(tiles)) if grid.source.device.type == "cpu" else 1
    if threads == 1:
        return [on(rows) for rows in tiles]
    with ThreadPoolExecutor(threads, "shardq-tiles") as pool:
        return list(pool.map(on, tiles))
