"""Tensors as a grid: layers from left to right, what is in each from top to bottom, all experts of one in a cell."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from shardq.html_report.rows import Row, relative_error

MATRIX: Final = 2  # dimensions of what has a cell, at the least


@dataclass(frozen=True, slots=True)
class Cell:
    """A module of a layer, or all experts' of one name."""

    rows: tuple[Row, ...]

    @property
    def scheme(self) -> str:
        """The commonest of what is quantized; empty for what is kept."""
        counts = Counter(r.scheme for r in self.rows)
        return max(counts, key=lambda s: (counts[s], s))

    @property
    def relative_error(self) -> float | None:
        """Over all of it; None for what is kept."""
        return relative_error(self.rows)

    @property
    def worst(self) -> Row:
        """The tensor with the largest relative error, or the first."""
        return max(self.rows, key=lambda r: r.relative_error or 0.0)


@dataclass(frozen=True, slots=True)
class Grid:
    """The matrices of one stack of layers, as `model.layers`."""

    stack: str
    layers: tuple[int, ...]
    modules: tuple[str, ...]
    cells: Mapping[tuple[int, str], Cell]

    @property
    def measured(self) -> tuple[str, ...]:
        """Modules with an error in any layer; those that are kept everywhere have none."""
        found = {m for (_, m), cell in self.cells.items() if cell.relative_error is not None}
        return tuple(m for m in self.modules if m in found)

    def of_layer(self, layer: int) -> tuple[Row, ...]:
        """All matrices of a layer."""
        return tuple(r for m in self.modules if (cell := self.cells.get((layer, m))) for r in cell.rows)


def find_grids(rows: Sequence[Row]) -> list[Grid]:
    """Stacks in the order of the ledger; vectors and what lies outside of layers have no cell."""
    found: dict[str, dict[tuple[int, str], list[Row]]] = {}
    for row in rows:
        if row.place.layer is not None and len(row.shape) >= MATRIX:
            key = (row.place.layer, row.place.module)
            found.setdefault(row.place.stack, {}).setdefault(key, []).append(row)
    return [_grid(stack, cells) for stack, cells in found.items()]


def _grid(stack: str, cells: Mapping[tuple[int, str], list[Row]]) -> Grid:
    layers = tuple(sorted({layer for layer, _ in cells}))
    modules = tuple(dict.fromkeys(module for _, module in cells))
    return Grid(stack, layers, modules, {key: Cell(tuple(of)) for key, of in cells.items()})


def errors_of(grids: Sequence[Grid]) -> Iterator[float]:
    """Of all cells that have one."""
    for grid in grids:
        for cell in grid.cells.values():
            if (error := cell.relative_error) is not None:
                yield error
