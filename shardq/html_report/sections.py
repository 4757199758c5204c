"""The parts of a report, each a piece of HTML."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from shardq.collapse import collapse
from shardq.html_report.charts import (
    HUES,
    KEPT,
    draw_bars,
    draw_errors,
    draw_layers,
    draw_legend,
    draw_schemes,
    error_legend,
)
from shardq.html_report.facts import Facts
from shardq.html_report.grid import Grid
from shardq.html_report.rows import Row, relative_error, total_roles
from shardq.html_report.shades import find_shades

WORST: Final = 12
REASONS: Final = 60  # lines of what is kept
NOTHING: Final = '<p class="soft">Nothing here has an error: all was kept, or carried as it was.</p>'


@dataclass(frozen=True, slots=True)
class Shown:
    """A result, and its tensors as grids."""

    facts: Facts
    grids: list[Grid]


def show_head(f: Facts, tag: str = "h1") -> str:
    """What it is, what it was made of, and how."""
    at = f" at commit <code>{escape(f.commit)}</code>" if f.commit else ""
    lines = [f"<{tag}>{escape(f.label)}</{tag}>", f"<p>{escape(f.title)}, made of {escape(f.source)}{at}</p>"]
    return "".join([*lines, f"<pre>{escape(f.command)}</pre>" if f.command and tag == "h1" else ""])


def show_tiles(f: Facts, seconds: float | None) -> str:
    """Its figures."""
    o = f.outcomes
    zeroed = sum(r.zeroed_groups for r in f.rows)
    tiles = [
        (f"{_size(f.source_bytes)} → {_size(f.output_bytes)}", "weight files before and after"),
        (f"{f.output_bytes / f.source_bytes:.3f}" if f.source_bytes else "", "of the source's size"),
        (f"{f.bits_per_weight:.3f}", "bits per weight"),
        ("" if f.relative_error is None else f"{f.relative_error:.4f}", "relative error of what is quantized"),
        (str(len(f.rows)), f"tensors: {', '.join(f'{n} {outcome}' for outcome, n in o.items())}"),
        (str(zeroed), "groups left with nothing but zeros"),
        ("" if seconds is None else f"{seconds:.0f} s", "to make it"),
    ]
    items = "".join(
        f'<div class="tile"><b>{value}</b><span>{escape(text)}</span></div>' for value, text in tiles if value
    )
    return f'<div class="tiles">{items}</div>'


def show_roles(f: Facts) -> str:
    """Bars of bits per weight, by role and scheme."""
    totals = total_roles(f.rows)
    rows = [
        (
            f"{t.role}{f', {t.scheme}' if t.scheme else ''}",
            t.bits_per_weight,
            f"{t.bits_per_weight:.3f}: {_size(t.output_bytes)}, {t.tensors} tensors",
        )
        for t in totals
    ]
    return draw_bars(rows)


def show_layers(both: Sequence[Shown]) -> str:
    """Lines of relative error over layers."""
    parts = []
    for stack in dict.fromkeys(g.stack for s in both for g in s.grids):
        series = []
        for s in both:
            grid = next((g for g in s.grids if g.stack == stack), None)
            errors = {n: e for n in grid.layers if (e := relative_error(grid.of_layer(n))) is not None} if grid else {}
            if errors:
                series.append((s.facts.label, errors))
        if series:
            keys = [(f"l{i}key", label) for i, (label, _) in enumerate(series)] if len(both) > 1 else []
            parts += [f"<h3>{escape(stack)}</h3>", draw_legend(keys) if keys else "", draw_layers(series)]
    return "".join(parts) or NOTHING


def show_errors(both: Sequence[Shown]) -> str:
    """Heat maps under one scale."""
    shades = find_shades([g for s in both for g in s.grids])
    if shades is None:
        return NOTHING
    parts = [error_legend(shades)]
    for label, grid in _labelled(both):
        if drawn := draw_errors(grid, shades):
            parts += [f"<h3>{escape(label)}</h3>", drawn]
    return "".join(parts)


def show_schemes(both: Sequence[Shown]) -> str:
    """Which scheme each module has."""
    schemes = dict.fromkeys(c.scheme for s in both for g in s.grids for c in g.cells.values() if c.scheme)
    hues = {scheme: min(i, HUES - 1) for i, scheme in enumerate(schemes)}
    parts = [draw_legend([(f"s{hue}", scheme) for scheme, hue in hues.items()] + [(KEPT, KEPT)])]
    for label, grid in _labelled(both):
        parts += [f"<h3>{escape(label)}</h3>", draw_schemes(grid, hues)]
    return "".join(parts)


def _labelled(both: Sequence[Shown]) -> Iterator[tuple[str, Grid]]:
    for s in both:
        for grid in s.grids:
            yield (f"{s.facts.label}: {grid.stack}" if len(both) > 1 else grid.stack), grid


def show_worst(f: Facts) -> str:
    """The tensors with the largest relative errors."""
    rows = sorted((r for r in f.rows if r.relative_error), key=lambda r: -(r.relative_error or 0))[:WORST]
    if not rows:
        return NOTHING
    cells = [(r.name, r.scheme, f"{r.relative_error:.5f}", str(r.zeroed_groups)) for r in rows]
    return _plain_table(("tensor", "scheme", "relative error", "zeroed groups"), cells, numbers=(2, 3))


def show_kept(f: Facts) -> str:
    """All that is not quantized, with what decided that."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for r in f.rows:
        if r.outcome != "quantized":
            groups.setdefault((r.outcome, r.role, r.rule), []).append(r)
    cells = []
    for (outcome, role, rule), rows in groups.items():
        names = collapse(r.name for r in rows)
        size = _size(sum(r.output_bytes for r in rows))
        cells.append((", ".join(names), outcome, role, rule, str(len(rows)), size))
    cells.sort(key=lambda c: -int(c[4]))
    more = f'<p class="soft">and {len(cells) - REASONS} more kinds</p>' if len(cells) > REASONS else ""
    heads = ("tensors", "outcome", "role", "rule", "count", "bytes")
    return _plain_table(heads, cells[:REASONS], numbers=(4, 5)) + more


def show_engines(f: Facts) -> str:
    """What engines do with it."""
    if not f.serving:
        return '<p class="soft">No verdict: GGUF files are read by llama.cpp and what is built on it.</p>'
    cells = []
    for s in f.serving:
        reasons = "; ".join(str(r["text"]) for r in s["reasons"]) or ""
        tp = ", ".join(f"{n}: {v['answer']}" for n, v in s["tensor_parallel"].items())
        cells.append((f"{s['engine']} {s['version']}", str(s["answer"]), reasons, tp))
    return _plain_table(("engine", "loads it", "why", "on several devices"), cells)


def show_provenance(f: Facts) -> str:
    """Records and hashes."""
    pairs = {"fingerprint": f.fingerprint, "shardq": f.version, "scales": f.scales}
    lines = [(k, v) for k, v in pairs.items() if v]
    shards = [(name, str(record["size"]), str(record["sha256"])) for name, record in f.files.items()]
    return _plain_table(("record", "value"), lines) + _plain_table(("file", "bytes", "sha256"), shards, numbers=(1,))


def show_table(data: str) -> str:
    """Room for the rows of `encode_rows`, which the script fills."""
    return (
        '<p><input id="find" type="search" placeholder="words of a name, role, scheme" aria-label="find tensors"></p>'
        '<p class="soft" id="told">The table needs scripts.</p><div class="scroll"><table id="table"><thead><tr></tr>'
        '</thead><tbody></tbody></table></div><button class="more" id="more" type="button" hidden>show more</button>'
        f'<script type="application/json" id="rows">{data}</script>'
    )


def _plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        made = (
            f'<{tag} class="n">{escape(c)}</{tag}>' if i in numbers else f"<{tag}>{escape(c)}</{tag}>"
            for i, c in enumerate(cells)
        )
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table><thead>{line(heads, "th")}</thead><tbody>{body}</tbody></table></div>'


def _size(size_bytes: float) -> str:
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.2f} {unit}"
    return f"{size_bytes:.0f} B"
