"""Charts as inline SVG; colours are classes of style.css, which knows light and dark."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Final

from shardq.html_report.grid import Cell, Grid
from shardq.html_report.shades import STEPS, Shades

CELL: Final = 14  # pixels of a side
LABEL: Final = 250  # pixels beside the rows
HUES: Final = 8  # colours of schemes; what comes after shares the last
KEPT: Final = "kept"
BAR_PERCENT: Final = 40  # of the room for bars and what stands behind them: the longest
PLOT: Final = (640, 150)
EVERY: Final = 5  # layers with a number


def draw_errors(grid: Grid, shades: Shades) -> str:
    """A heat map of relative errors; modules that are kept everywhere have no row, and a grid of them is empty."""
    if not grid.measured:
        return ""
    grid = replace(grid, modules=grid.measured)

    def paint(cell: Cell) -> tuple[str, str]:
        error = cell.relative_error
        if error is None:
            return KEPT, KEPT
        worst, count = cell.worst, len(cell.rows)
        told = f"{error:.4f}" + (f" over {count}, at most {worst.relative_error or 0:.4f}" if count > 1 else "")
        return f"h{shades.step(error)}", told

    return _draw_grid(grid, paint, "relative error")


def draw_schemes(grid: Grid, hues: Mapping[str, int]) -> str:
    """Which scheme each module has."""

    def paint(cell: Cell) -> tuple[str, str]:
        if not cell.scheme:
            return KEPT, f"{KEPT}: {cell.rows[0].rule}"
        mixed = len({r.scheme for r in cell.rows}) > 1
        return f"s{hues[cell.scheme]}", cell.scheme + (" and others" if mixed else "")

    return _draw_grid(grid, paint, "schemes")


def draw_legend(entries: Sequence[tuple[str, str]]) -> str:
    """Classes, and what each stands for."""
    items = "".join(f'<span><i class="{kind}"></i>{escape(text)}</span>' for kind, text in entries)
    return f'<p class="legend">{items}</p>'


def error_legend(shades: Shades) -> str:
    """The ends of the scale."""
    scale = "".join(f'<i class="h{i}"></i>' for i in range(STEPS))
    ends = f"<span>{shades.least:.4f}</span>{scale}<span>{shades.most:.4f}</span>"
    return f'<p class="legend">{ends}<span><i class="{KEPT}"></i>{KEPT}</span></p>'


def draw_bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Labels, lengths, and what stands behind each bar."""
    most = max((value for _, value, _ in rows), default=0.0) or 1.0
    parts = [
        f'<span class="label">{escape(label)}</span><span><i style="width:{BAR_PERCENT * value / most:.1f}%"></i>'
        f"{escape(text)}</span>"
        for label, value, text in rows
    ]
    return f'<div class="bars">{"".join(parts)}</div>'


def draw_layers(series: Sequence[tuple[str, Mapping[int, float]]]) -> str:
    """Relative error by layer, a line for each series."""
    width, height = PLOT
    layers = sorted({layer for _, values in series for layer in values})
    most = max((v for _, values in series for v in values.values()), default=0.0) or 1.0
    span = max(1, len(layers) - 1)
    x = {layer: 46 + (width - 56) * i / span for i, layer in enumerate(layers)}
    parts = [
        f'<line x1="46" x2="{width - 10}" y1="{height - 24}" y2="{height - 24}" class="axis"/>',
        f'<text x="40" y="16" class="label">{most:.3f}</text><text x="40" y="{height - 20}" class="label">0</text>',
    ]
    step = max(1, len(layers) // 12)
    parts += [f'<text x="{x[n]:.1f}" y="{height - 6}" class="tick">{n}</text>' for n in layers[::step]]
    for number, (label, values) in enumerate(series):
        points = [(x[n], height - 24 - (height - 36) * values[n] / most, n) for n in layers if n in values]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in points)
        parts.append(f'<polyline points="{line}" class="line l{number}"/>')
        for px, py, n in points:
            title = f"<title>{escape(label)}, layer {n}: {values[n]:.4f}</title>"
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" class="l{number}">{title}</circle>')
    return _svg(width, height, "".join(parts), "relative error by layer")


def _draw_grid(grid: Grid, paint: Callable[[Cell], tuple[str, str]], title: str) -> str:
    parts = []
    for i, module in enumerate(grid.modules):
        y = i * CELL
        parts.append(f'<text x="{LABEL - 8}" y="{y + 11}" class="label">{escape(module)}</text>')
        for j, layer in enumerate(grid.layers):
            if (cell := grid.cells.get((layer, module))) is None:
                continue
            kind, text = paint(cell)
            where = f"{grid.stack}.{layer}.{module}" if grid.stack else f"{layer}.{module}"
            parts.append(
                f'<rect x="{LABEL + j * CELL}" y="{y}" class="c {kind}"><title>{escape(where)}: {escape(text)}</title>'
                "</rect>"
            )
    bottom = len(grid.modules) * CELL
    for j, layer in enumerate(grid.layers):
        if j % EVERY == 0:
            parts.append(f'<text x="{LABEL + j * CELL + CELL / 2}" y="{bottom + 14}" class="tick">{layer}</text>')
    return _svg(LABEL + len(grid.layers) * CELL + 20, bottom + 20, "".join(parts), f"{title} of {grid.stack}")


def _svg(width: float, height: float, content: str, title: str) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<div class="scroll"><svg {size} role="img" aria-label="{escape(title)}">{content}</svg></div>'
