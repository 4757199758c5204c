"""--max-disk, measured: what the output folder takes on the disk at any moment, at the least cap that is accepted."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fake_hub_write import WritableHub

import shardq
from shardq import Limits, make_recipe
from shardq.checkpoint import Shard
from shardq.destinations.hub import HubDestination
from shardq.errors import BudgetTooSmall
from shardq.fetcher import Fetcher
from shardq.needs import disk_bytes
from shardq.onepass import OnePass
from shardq.progress import Progress, Report
from shardq.run import quantize_to_folder
from shardq.sources.base import Source
from shardq.supply import Supply

LAYERS = 5
TARGET = "me/quantized"
LIMIT_S = 30.0  # for anything that takes milliseconds on an idle machine
MB = 1_000_000
MODES = [(False, False), (True, False), (False, True), (True, True)]  # stream, push


@pytest.fixture
def hub(hub: Any) -> Iterator[Any]:
    """Instead of the one that can only be read."""
    writable = WritableHub()
    yield writable
    writable.close()


@pytest.fixture
def folder(make_checkpoint: Callable[..., Path]) -> Path:
    """Shards of 7 MB, so that blocks and records are small against them."""
    return make_checkpoint(hidden=512, layers=LAYERS)


@pytest.fixture
def model(make_model: Callable[[Path], Any], folder: Path) -> Any:
    return make_model(folder)


@pytest.fixture
def source(model: Any) -> Source:
    found: Source = model.open()
    return found


def run(
    source: Source, out: Path, model: Any, stream: bool, push: bool, cap: int | None, report: Report = lambda _: None
) -> None:
    limits = Limits(parallel=1, stream=stream, max_disk_bytes=cap)
    destination = HubDestination(TARGET, endpoint=model.hub.url) if push else None
    quantize_to_folder(source, make_recipe("W4A16"), out, limits, False, report, destination)


def least(folder: Path, stream: bool, push: bool) -> int:
    return disk_bytes(OnePass((shardq.plan(folder),)), staged=not stream, uploads=push)


def made(out: Path, model: Any, push: bool) -> dict[str, bytes]:
    """The output's weights."""
    files = model.hub.files(TARGET) if push else {p.name: p.read_bytes() for p in out.iterdir()}
    assert "config.json" in files
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize(("stream", "push"), MODES)
def test_the_least_cap_that_is_accepted_is_kept(
    model: Any, source: Source, folder: Path, tmp_path: Path, stream: bool, push: bool, measures: ModuleType
) -> None:
    out, cap = tmp_path / "out", least(folder, stream, push)
    with measures.Meter(out) as meter:
        run(source, out, model, stream, push, cap, meter.look)
    assert meter.samples > 20
    assert meter.peak_bytes <= cap
    assert meter.peak_bytes > cap * 0.8  # the cap is no larger than it has to be
    shardq.quantize(folder, output_dir=tmp_path / "local", limits=Limits(parallel=1))
    assert made(out, model, push) == made(tmp_path / "local", model, False)
    assert out.exists() != push


@pytest.mark.parametrize(("stream", "push"), MODES)
def test_a_smaller_cap_is_refused_and_the_message_says_what_would_do(
    model: Any, source: Source, folder: Path, tmp_path: Path, stream: bool, push: bool
) -> None:
    out, cap = tmp_path / "out", least(folder, stream, push)
    with pytest.raises(BudgetTooSmall, match="--max-disk") as refused:
        run(source, out, model, stream, push, cap - 1)
    assert [model.asked(shard) for shard in model.shards] == [[]] * LAYERS  # before any weight
    assert not list(out.rglob("*.safetensors"))
    named = re.findall(r"([\d.]+) MB(?: with (--stream|--push-to|both))?", str(refused.value).partition("at least")[2])
    assert named[0][1] == ""
    assert (named[-1][1] == "") == (stream and push)  # nothing else would help
    size, way = named[-1]
    both = way == "both"
    run(
        source, tmp_path / "other", model, stream or both or way == "--stream", push or both or way == "--push-to",
        round(float(size) * MB),
    )  # fmt: skip


@pytest.mark.parametrize("push", [False, True])
def test_shards_that_a_run_with_a_larger_cap_staged_are_trimmed(
    model: Any, source: Source, folder: Path, tmp_path: Path, push: bool, measures: ModuleType
) -> None:
    out, cap = tmp_path / "out", least(folder, False, push)

    def stop(step: Progress) -> None:
        if step.stage == "work":
            wait_for(lambda: len(list((out / ".shardq" / "src").glob("*.safetensors"))) == 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, out, model, False, push, None, stop)
    assert measures.used_bytes(out) > 3 * 7 * MB
    meter = measures.Meter(out)
    run(source, out, model, False, push, cap, lambda step: meter.look(step) if step.stage != "start" else None)
    assert meter.samples > LAYERS
    assert meter.peak_bytes <= cap
    assert len(made(out, model, push)) == LAYERS


def test_trimming_is_over_before_anything_new_comes(
    model: Any, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download may use names that look like old ones."""
    events: list[str] = []
    trim, start = Supply.trim, Fetcher.start

    def noted_trim(supply: Supply, staged: Sequence[str]) -> None:
        trim(supply, staged)
        events.append("trimmed")

    def noted_start(fetcher: Fetcher, shard: Shard) -> None:
        events.append(shard.name)
        start(fetcher, shard)

    monkeypatch.setattr(Supply, "trim", noted_trim)
    monkeypatch.setattr(Fetcher, "start", noted_start)
    run(source, tmp_path / "out", model, False, False, None)
    assert events == ["trimmed", *model.shards]


def test_outputs_that_a_run_with_a_larger_cap_began_are_trimmed(
    model: Any, source: Source, folder: Path, tmp_path: Path, measures: ModuleType
) -> None:
    out, cap = tmp_path / "out", least(folder, False, push=True)

    def stop(_: Progress) -> None:
        if len(list((out / ".shardq" / "part").iterdir())) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, out, model, True, True, None, stop)
    assert measures.used_bytes(out) < cap
    with measures.Meter(out) as meter:
        run(source, out, model, False, True, cap, meter.look)
    assert meter.peak_bytes <= cap
    assert len(made(out, model, True)) == LAYERS


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "nothing happens"
        time.sleep(0.002)
