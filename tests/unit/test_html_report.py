"""The page about a result: figures of the ledger, nothing from elsewhere, and small for a large model."""

import json
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hollow_outputs import write_hollow

import shardq
from shardq.errors import VerifyFailed
from shardq.html_report.facts import Facts, read_facts
from shardq.html_report.grid import find_grids
from shardq.html_report.names import Place, place_of
from shardq.html_report.page import draw_report
from shardq.html_report.picture import PICTURE, SIDE, main_grid
from shardq.html_report.rows import relative_error, total_roles
from shardq.html_report.shades import STEPS, Shades
from shardq.html_report.table import ERROR_UNIT, encode_rows
from shardq.ledger import merge

DUMPS = Path(__file__).parents[1] / "data" / "hub_index"
ONE = shardq.Limits(parallel=1)
VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """Checks that every element is closed where it should be, and gathers texts and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def rows_in(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="rows">(.*?)</script>', page, re.DOTALL)
    assert found
    rows: dict[str, Any] = json.loads(found[1])
    return rows


def names_in(rows: dict[str, Any]) -> Iterator[str]:
    """As script.js makes them."""
    numbers = iter(rows["numbers"])
    for at in rows["name"]["at"]:
        yield re.sub(r"\{\}", lambda _: str(next(numbers)), rows["name"]["words"][at])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("results")
    schemes = {"W4A16": "auto_round", "NVFP4A16": "compressed-tensors"}
    for scheme, layout in schemes.items():
        recipe = shardq.make_recipe(scheme, layout=layout)
        shardq.quantize("demo", recipe, output_dir=base / scheme, limits=ONE)
    return {scheme: base / scheme for scheme in schemes}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Facts, float]:
    """Of a model with experts, and the relative error over all that is quantized."""
    plan = shardq.plan_headers(DUMPS / "deepseek-v4-flash", shardq.make_recipe("W4A16", group_size=32))
    folder = tmp_path_factory.mktemp("large") / "out"
    errors = write_hollow(plan, folder)
    return read_facts(str(folder)), merge(errors.values()).relative


def test_every_tensor_is_there_with_its_figures(results: dict[str, Path]) -> None:
    facts = read_facts(str(results["W4A16"]))
    page = shardq.report(results["W4A16"])
    rows = rows_in(page)
    assert list(names_in(rows)) == [r.name for r in facts.rows]
    errors = [None if r.relative_error is None else round(r.relative_error / ERROR_UNIT) for r in facts.rows]
    assert rows["error"] == errors
    assert sum(e is not None for e in errors) == 45
    written = sum(int(rows["bytes"]["words"][at]) for at in rows["bytes"]["at"])
    sizes = [p.stat().st_size for p in results["W4A16"].glob("*.safetensors")]
    assert facts.output_bytes == sum(sizes)
    assert 0 < sum(sizes) - written < 40_000  # headers


def test_sums_agree_with_the_records(results: dict[str, Path]) -> None:
    for path in results.values():
        facts = read_facts(str(path))
        assert facts.relative_error is not None
        assert relative_error(facts.rows) == pytest.approx(facts.relative_error, rel=1e-12)
        totals = total_roles(facts.rows)
        assert sum(t.tensors for t in totals) == len(facts.rows) == 67
        assert sum(t.output_bytes for t in totals) * 8 / facts.weights == pytest.approx(facts.bits_per_weight)
        by_role = {t.role: t for t in totals}
        assert by_role["embedding"].bits_per_weight == 16
        assert by_role["linear"].bits_per_weight == pytest.approx(4.156 if "W4A16" in str(path) else 4.501, abs=0.001)


def test_the_page_is_sound_and_needs_nothing(results: dict[str, Path]) -> None:
    for text in (shardq.report(results["W4A16"], seconds=3.2), shardq.report(*results.values())):
        page = Page(text)
        assert not [(k, v) for k, v in page.attributes if k in {"src", "href", "action"} or "://" in (v or "")]
        assert "url(" not in text
        assert "@import" not in text
    assert "3 s" in Page(shardq.report(results["W4A16"], seconds=3.2)).texts


def test_both_results_stand_side_by_side(results: dict[str, Path]) -> None:
    first, second = (read_facts(str(p)) for p in results.values())
    rows = rows_in(shardq.report(*results.values()))
    theirs = {r.name: r.relative_error for r in second.rows}
    expected = [theirs[r.name] for r in first.rows]
    assert rows["other"] == [None if e is None else round(e / ERROR_UNIT) for e in expected]
    page = Page(shardq.report(*results.values()))
    assert {"W4A16", "NVFP4A16"} <= set(page.texts)


def test_what_others_wrote_is_no_markup(results: dict[str, Path]) -> None:
    """Names of tensors, of sources and of schemes come from files."""
    evil = "</script><script>alert(1)</script><b x='\">"
    facts = read_facts(str(results["W4A16"]))
    rows = tuple(replace(r, name=f"{evil}.{i}.{evil}", rule=evil, place=place_of(f"{evil}.{i}.{evil}"))
                 for i, r in enumerate(facts.rows))  # fmt: skip
    page = Page(draw_report(replace(facts, label=evil, source=evil, command=evil, rows=rows)))
    assert page.texts.count("alert(1)") == 0
    assert evil in page.texts


def test_a_large_model_fits_into_5_megabytes(large: tuple[Facts, float]) -> None:
    facts, relative = large
    more = tuple(replace(r, name=f"more.{r.name}") for r in facts.rows)
    rows = (facts.rows + more)[:60_000]
    assert len({r.name for r in rows}) == 60_000
    page = draw_report(replace(facts, rows=tuple(replace(r, place=place_of(r.name)) for r in rows)))
    assert len(page.encode()) < 5_000_000
    assert len(list(names_in(rows_in(page)))) == 60_000
    assert facts.relative_error == pytest.approx(relative, rel=1e-12)


def test_experts_share_a_cell(large: tuple[Facts, float]) -> None:
    facts, _ = large
    grid = next(g for g in find_grids(facts.rows) if g.stack == "layers")
    assert grid.layers == tuple(range(43))
    cell = grid.cells[3, "ffn.experts.*.w1"]
    assert len(cell.rows) == 256
    assert cell.relative_error == pytest.approx(relative_error(cell.rows))
    assert cell.worst.relative_error == max(r.relative_error or 0 for r in cell.rows)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.experts.7.up_proj.weight", Place("model.layers", 3, "mlp.experts.*.up_proj")),
        ("lm_head.weight", Place("", None, "lm_head")),
        ("0.weight", Place("", 0, "")),
        ("model.layers.12.self_attn.q_proj.bias", Place("model.layers", 12, "self_attn.q_proj.bias")),
        ("conv1d.weight", Place("", None, "conv1d")),
    ],
)
def test_places(name: str, place: Place) -> None:
    assert place_of(name) == place


def test_shades_go_from_the_least_to_the_most() -> None:
    shades = Shades(0.01, 0.1)
    assert [shades.step(e) for e in (0.0, 0.01, 0.0316, 0.1)] == [0, 0, STEPS // 2, STEPS - 1]
    assert Shades(0.05, 0.05).step(0.05) == 0


def test_rows_without_figures() -> None:
    assert json.loads(encode_rows(()))["error"] == []


def test_an_unfinished_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".shardq").mkdir()
    with pytest.raises(VerifyFailed, match="unfinished"):
        shardq.report(tmp_path)


def test_the_picture_is_a_png_of_the_heat_map(results: dict[str, Path]) -> None:
    """Read back by the specification: every cell has the shade of its error."""
    data = (results["W4A16"] / PICTURE).read_bytes()
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        chunks[kind] = body = data[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", data, at + 8 + size)[0] == zlib.crc32(kind + body)
        at += 12 + size
    width, height, depth, colour, *_ = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (data[:8], depth, colour) == (b"\x89PNG\r\n\x1a\n", 4, 3)
    pixels = zlib.decompress(chunks[b"IDAT"])
    line = 1 + -(-width // 2)
    assert len(pixels) == line * height
    found = main_grid(find_grids(read_facts(str(results["W4A16"])).rows))
    assert found
    grid, shades = found
    for row, module in enumerate(grid.measured):
        for column, layer in enumerate(grid.layers):
            x, y = column * SIDE + 4, row * SIDE + 4
            pair = pixels[y * line + 1 + x // 2]
            shown = pair & 15 if x % 2 else pair >> 4
            cell = grid.cells.get((layer, module))
            error = cell.relative_error if cell else None
            assert shown == (0 if cell is None else 1 if error is None else 2 + shades.step(error))


def test_the_card_has_the_same_figures(results: dict[str, Path]) -> None:
    for path in results.values():
        facts, card = read_facts(str(path)), (path / "README.md").read_text(encoding="utf-8")
        assert f"]({PICTURE})" in card
        for t in total_roles(facts.rows):
            assert f"| {t.role} | {t.scheme or 'kept'} | {t.tensors} |" in card
            assert f"| {t.bits_per_weight:.2f} |" in card
