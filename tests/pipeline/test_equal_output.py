"""The same bytes, whatever does the work and however it is cut."""

from collections.abc import Callable
from pathlib import Path

import pytest

import shardq
from shardq import Limits
from shardq.kernels import sets

Contents = Callable[[Path], dict[str, str]]


@pytest.fixture(scope="session")
def expected(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, contents: Contents) -> dict[str, str]:
    """What an undisturbed run in this process writes."""
    out = tmp_path_factory.mktemp("expected") / "out"
    shardq.quantize(checkpoint, output_dir=out, limits=Limits(parallel=1))
    return contents(out)


def test_undisturbed_run_makes_a_sound_folder(checkpoint: Path, tmp_path: Path, one: Limits) -> None:
    out = tmp_path / "out"
    result = shardq.quantize(checkpoint, output_dir=out, limits=one)
    assert (result.quantized, result.copied) == (21, 6)
    assert not result.already_done
    assert result.errors is not None
    assert 0.05 < result.errors.relative < 0.15
    found = shardq.verify(out, deep=True, source=checkpoint)
    assert found.problems == ()
    assert found.compared == 27


@pytest.mark.parametrize("parallel", [1, 2, 8])
def test_any_number_of_workers_writes_the_same(
    checkpoint: Path, tmp_path: Path, contents: Contents, expected: dict[str, str], parallel: int
) -> None:
    out = tmp_path / "elsewhere" / "out"
    shardq.quantize(checkpoint, output_dir=out, limits=Limits(parallel=parallel, max_ram_bytes=1 << 30))
    assert contents(out) == expected


@pytest.mark.parametrize("name", [s.name for s in sets() if s.usable])
def test_any_kernel_set_writes_the_same(
    checkpoint: Path, tmp_path: Path, contents: Contents, expected: dict[str, str], name: str,
    monkeypatch: pytest.MonkeyPatch, one: Limits,
) -> None:  # fmt: skip
    monkeypatch.setenv("SHARDQ_KERNELS", name)
    shardq.quantize(checkpoint, output_dir=tmp_path / "out", limits=one)
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("layout", ["auto_round", "gptq"])
def test_slabs_write_what_whole_tensors_write(
    checkpoint: Path, tmp_path: Path, contents: Contents, layout: str, monkeypatch: pytest.MonkeyPatch, one: Limits
) -> None:
    recipe = f"W4A16@{layout}"
    shardq.quantize(checkpoint, recipe, output_dir=tmp_path / "whole", limits=one)
    monkeypatch.setattr("shardq.cut.SLAB_BYTES", 16 << 10)
    monkeypatch.setattr("shardq.cut.ROWS", 32)
    plan = shardq.plan(checkpoint, recipe)
    assert len(plan.tasks) > 80
    assert max(t.source_bytes for t in plan.tasks) <= 48 << 10
    shardq.quantize(checkpoint, recipe, output_dir=tmp_path / "slabs", limits=one)
    assert contents(tmp_path / "slabs") == contents(tmp_path / "whole")


def test_small_tiles_write_what_large_ones_write(
    checkpoint: Path, tmp_path: Path, contents: Contents, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch,
    one: Limits,
) -> None:  # fmt: skip
    monkeypatch.setattr("shardq.tasks.TILE_BYTES", 1 << 10)
    monkeypatch.setattr("shardq.worker.TILE_BYTES", 1 << 10)
    shardq.quantize(checkpoint, output_dir=tmp_path / "out", limits=one)
    assert contents(tmp_path / "out") == expected
