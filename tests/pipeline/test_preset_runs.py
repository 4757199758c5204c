"""Whole runs of every preset: the output agrees with its records, with its source, and with what an audit derives."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import shardq
from shardq import Limits
from shardq.cli.group import commands
from shardq.errors import LayoutRefuses
from shardq.layouts import find_layout
from shardq.schemes import PRESETS

ONE = Limits(parallel=1)
CT = find_layout("compressed-tensors")
HELD = [p.name for p in PRESETS.values() if CT.refuse(s := CT.settle(p.scheme), s, 256, 256) is None]


@pytest.mark.parametrize("name", HELD)
def test_every_preset_in_compressed_tensors(checkpoint: Path, tmp_path: Path, name: str) -> None:
    source, out = checkpoint, tmp_path / "out"
    result = shardq.quantize(source, f"{name}@compressed-tensors", output_dir=out, limits=ONE)
    assert result.quantized == 3 * 7
    assert result.errors is not None
    assert 0 < result.errors.relative < 0.7
    assert shardq.verify(out, deep=True, source=source).problems == ()
    assert shardq.audit(out, source=source).problems == ()
    words = shlex.split(json.loads((out / "shardq.json").read_text())["command"])
    assert words[:2] == ["shardq", "quantize"]
    again = CliRunner().invoke(commands, ["quantize", str(source), *words[3:], "-o", str(out), "--json"])
    assert json.loads(again.stdout)["already_done"]  # the card's command means this output


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "MXFP4"])
def test_scheme_that_names_no_layout_gets_one_that_holds_it(
    make_checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    source = make_checkpoint(layers=3)
    shardq.quantize(source, name, output_dir=tmp_path / "out", limits=ONE)
    assert shardq.verify(tmp_path / "out").problems == ()
    with pytest.raises(LayoutRefuses, match="integer weights"):
        shardq.plan(source, f"{name}@gptq")
