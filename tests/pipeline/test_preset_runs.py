"""Whole runs of every preset in every layout that holds it: each output agrees with its records, with its source, with
what an audit derives, and with what `inspect` sees in it."""

import json
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest
from click.testing import CliRunner

import shardq
from shardq import Limits, Result, make_recipe
from shardq.cli.group import commands
from shardq.errors import LayoutRefuses
from shardq.files.safetensors import read_header
from shardq.layouts import LAYOUTS
from shardq.layouts.base import Layout
from shardq.layouts.input_scales import wants_input_scale
from shardq.ledger import LEDGER, decode_ledger
from shardq.outputs import target_of
from shardq.run import Order, quantize_all
from shardq.schemes import PRESETS, Preset
from shardq.sources import open_source
from shardq.sources.demo import open_demo

ONE: Final = Limits(parallel=1)
LINEARS: Final = 45  # matrices of the demo that are quantized by default
SOME: Final = {  # presets whose commands are run again as their cards have them: one for each way to write a recipe
    "W4A16", "W3A16", "W4A16_MIXED", "W8A8", "FP8_BLOCK", "MXFP4", "NVFP4A16",
}  # fmt: skip


def is_held(preset: Preset, layout: Layout) -> bool:
    """True if all of a preset's schemes fit beside each other, and none needs data (tests/tune has those)."""
    default = layout.settle(preset.scheme)
    mixed = [layout.settle(make_recipe(f"W{bits}A16").scheme) for _, bits in preset.bits_of]
    held = all(layout.refuse(s, default, 256, 256) is None for s in (default, *mixed))
    return held and not wants_input_scale(layout, default)


HELD: Final = [(x.name, p.name) for x in LAYOUTS for p in PRESETS.values() if is_held(p, x)]


def test_every_preset_and_every_layout_is_here() -> None:
    assert {layout for layout, _ in HELD} == {x.name for x in LAYOUTS}
    assert {name for _, name in HELD} == set(PRESETS)
    assert len(HELD) > 150


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in a folder."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    folder.mkdir()
    for name, data in open_demo().contents.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def parameters(demo: Path) -> int:
    """Weights of the demo."""
    return shardq.inspect(demo).parameters


@pytest.fixture(scope="module")
def make(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Mapping[str, Result]]]:
    """make(layout): what it holds, by preset, from one read of the demo; that of the layout before is deleted."""
    folder = tmp_path_factory.mktemp("made") / "out"
    made: dict[str, Mapping[str, Result]] = {}

    def make(layout: str) -> Mapping[str, Result]:
        if layout not in made:
            shutil.rmtree(folder, ignore_errors=True)
            made.clear()
            names = [name for x, name in HELD if x == layout]
            orders = [Order(make_recipe(name, layout=layout), folder / name) for name in names]
            results = quantize_all(open_source(str(demo)), orders, ONE, False, lambda _: None, lambda _: None)
            made[layout] = dict(zip(names, results, strict=True))
        return made[layout]

    yield make
    shutil.rmtree(folder)


@pytest.mark.parametrize(("layout", "name"), HELD, ids=[f"{n}@{x}" for x, n in HELD])
def test_every_preset_in_every_layout(
    make: Callable[[str], Mapping[str, Result]], layout: str, name: str, demo: Path, parameters: int
) -> None:
    result = make(layout)[name]
    assert result.quantized == LINEARS + (2 if layout == "mlx" else 0)  # embedding and head too
    assert result.errors is not None
    assert 0 < result.errors.relative < 0.7
    assert shardq.verify(result.output, deep=True, source=demo).problems == ()
    audit = shardq.audit(result.output, source=demo)
    assert audit.problems == ()
    assert all(t.check.whole and t.check.scale != "taken" for t in audit.tensors)
    check_inspection(result.output, layout, parameters)
    if name in SOME:
        words = shlex.split(json.loads((result.output / "shardq.json").read_text())["command"])
        assert words[:2] == ["shardq", "quantize"]
        again = CliRunner().invoke(commands, ["quantize", str(demo), *words[3:], "-o", str(result.output), "--json"])
        assert json.loads(again.stdout)["already_done"]  # the card's command means this output


def check_inspection(out: Path, layout: str, parameters: int) -> None:
    found = shardq.inspect(out)
    assert found.layout == {"gptq_v2": "gptq"}.get(layout, layout.partition(":")[0])  # readers know the family
    assert found.parameters == parameters
    held_bytes = sum(t.end - t.begin for path in out.glob("*.safetensors") for t in read_header(path).tensors)
    assert found.bits_per_weight == 8 * held_bytes / parameters
    ledger = decode_ledger((out / LEDGER).read_bytes())["tensors"]
    modules = {(target_of(n, e).module, e["scheme"]) for n, e in ledger.items() if e["outcome"] == "quantized"}
    assert found.schemes == Counter(scheme for _, scheme in modules)
    assert found.source_kinds == {}


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "W8A8", "FP8_BLOCK", "FP8_TENSOR", "MXFP6A16", "NVFP4A16"])
def test_weights_of_every_type_in_compressed_tensors(checkpoint: Path, tmp_path: Path, name: str) -> None:
    """The demo has BF16 alone; here layers are BF16, FP16 and FP32."""
    out = tmp_path / "out"
    assert shardq.quantize(checkpoint, f"{name}@compressed-tensors", output_dir=out, limits=ONE).quantized == 3 * 7
    assert shardq.verify(out, deep=True, source=checkpoint).problems == ()
    assert shardq.audit(out, source=checkpoint).problems == ()


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "MXFP4"])
def test_scheme_that_names_no_layout_gets_one_that_holds_it(
    make_checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    source = make_checkpoint(layers=3)
    shardq.quantize(source, name, output_dir=tmp_path / "out", limits=ONE)
    assert shardq.verify(tmp_path / "out").problems == ()
    with pytest.raises(LayoutRefuses, match="integer weights"):
        shardq.plan(source, f"{name}@gptq")
