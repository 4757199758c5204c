"""The page: its sections, with its style and its script in it."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from shardq.html_report.facts import Facts
from shardq.html_report.grid import find_grids
from shardq.html_report.rows import total_roles
from shardq.html_report.sections import (
    Shown,
    show_engines,
    show_errors,
    show_head,
    show_kept,
    show_layers,
    show_provenance,
    show_roles,
    show_schemes,
    show_table,
    show_tiles,
    show_worst,
)
from shardq.html_report.table import encode_rows


def draw_report(facts: Facts, seconds: float | None = None) -> str:
    """One result on a page that needs nothing else. `seconds`: what making it took, which no record says, because
    records do not depend on the machine."""
    shown = Shown(facts, find_grids(facts.rows))
    sections = [
        show_head(facts), show_tiles(facts, seconds),
        "<h2>Bits per weight</h2>", show_roles(facts),
        "<h2>Error by layer</h2>", show_layers([shown]),
        "<h2>Error by module</h2>", show_errors([shown]),
        "<h2>Schemes</h2>", show_schemes([shown]),
        "<h2>Largest errors</h2>", show_worst(facts),
        "<h2>What is kept, and why</h2>", show_kept(facts),
        "<h2>Engines</h2>", show_engines(facts),
        "<h2>All tensors</h2>", show_table(encode_rows(facts.rows)),
        "<h2>Provenance</h2>", show_provenance(facts),
    ]  # fmt: skip
    return _page(f"{facts.label}: {facts.title}", sections)


def draw_comparison(first: Facts, second: Facts) -> str:
    """Two results side by side; tensors are matched by the names that they have in their sources."""
    both = [Shown(f, find_grids(f.rows)) for f in (first, second)]
    found = {r.name: r.relative_error for r in second.rows}
    others = [found.get(r.name) for r in first.rows]
    lone = len(found.keys() ^ {r.name for r in first.rows})
    sections = [
        f"<h1>{escape(first.label)} and {escape(second.label)}</h1>",
        f'<p class="soft">{lone} tensors are in one of them alone.</p>' if lone else "",
        _pair(f"{show_head(f, 'h3')}{show_tiles(f, None)}" for f in (first, second)),
        "<h2>Bits per weight</h2>", _pair(show_roles(f) for f in (first, second)),
        "<h2>Error by layer</h2>", show_layers(both),
        "<h2>Error by module</h2>", show_errors(both),
        "<h2>Schemes</h2>", show_schemes(both),
        "<h2>All tensors</h2>",
        f'<p class="soft">Of {escape(first.label)}; errors there are those of {escape(second.label)}.</p>',
        show_table(encode_rows(first.rows, others)),
    ]  # fmt: skip
    return _page(f"{first.label} and {second.label}", sections)


def _pair(parts: Iterable[str]) -> str:
    return f'<div class="pair">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def _page(title: str, sections: Sequence[str]) -> str:
    here = Path(__file__).parent
    style, script = (here.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(s for s in sections if s)
        + f"\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def describe_facts(f: Facts) -> Mapping[str, Any]:
    """The figures of the head, for --json."""
    return {
        "result": f.label,
        "source": f.source,
        "commit": f.commit,
        "bytes": {"source": f.source_bytes, "output": f.output_bytes},
        "bits_per_weight": f.bits_per_weight,
        "relative_error": f.relative_error,
        "outcomes": dict(f.outcomes),
        "roles": [
            {"role": t.role, "scheme": t.scheme, "tensors": t.tensors, "bits_per_weight": t.bits_per_weight}
            for t in total_roles(f.rows)
        ],
    }
