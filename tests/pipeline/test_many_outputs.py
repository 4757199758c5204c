"""Several outputs from one read: each has the bytes of a run of its own, and may be finished by one."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner
from stopped_runs import stop_after

import shardq
import shardq.run
import shardq.worker
from shardq import Limits, Progress
from shardq.cli.group import commands
from shardq.errors import BadOption, BudgetTooSmall, RecipeChanged
from shardq.executors.inline import InlineExecutor
from shardq.files import direct
from shardq.files.direct import DirectDisk
from shardq.needs import disk_bytes
from shardq.onepass import OnePass
from shardq.opening import make_orders
from shardq.recipe import make_recipe
from shardq.slabs import open_slab
from shardq.tasks import Workplace

Contents = Callable[[Path], dict[str, str]]
Alone = Callable[[str], dict[str, str]]
MIXES = {
    "integers": ("W4A16@gptq", "W4A16@auto_round", "W4A16@awq"),  # the first two share codes
    "kept by some": ("W4A16@mlx", "W4A16@gptq", "MXFP4"),  # mlx quantizes embedding and head
    "far reach": ("NVFP4A16", "FP8_TENSOR", "W8A8"),
    "research": ("NVFP4A16@fake", "NVFP4A16", "FP8_BLOCK@fp8", "W4A16@fake"),
}
OF_THE_SOURCE = {"README.md", "shardq.json", "shardq-ledger.json.zst"}  # they name it and its commit
PAIR = ("W4A16@mlx", "NVFP4A16")
ONE = Limits(parallel=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_moe: Callable[..., Path]) -> Path:
    """A Qwen3-MoE in two shards; read only."""
    return write_moe(tmp_path_factory.mktemp("many") / "model", lambda place, _: 1 + place % 2)


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory, contents: Contents) -> Alone:
    """alone(scheme): what a run for it alone makes."""
    made: dict[str, dict[str, str]] = {}

    def make(scheme: str) -> dict[str, str]:
        if scheme not in made:
            out = tmp_path_factory.mktemp("alone") / "out"
            shardq.quantize(folder, scheme, output_dir=out, limits=ONE)
            made[scheme] = contents(out)
        return made[scheme]

    return make


def names(schemes: Sequence[str]) -> list[str]:
    return [o.out.name for o in make_orders([make_recipe(s) for s in schemes], "x", "x")]


def check(out: Path, schemes: Sequence[str], contents: Contents, alone: Alone) -> None:
    for scheme, name in zip(schemes, names(schemes), strict=True):
        assert contents(out / name) == alone(scheme), scheme


@pytest.mark.parametrize("parallel", [1, 2])
@pytest.mark.parametrize("mix", MIXES)
def test_every_file_is_that_of_a_run_alone(
    folder: Path, tmp_path: Path, contents: Contents, alone: Alone, mix: str, parallel: int
) -> None:
    results = shardq.quantize_many(folder, MIXES[mix], output_dir=tmp_path, limits=Limits(parallel=parallel))
    assert [r.output.name for r in results] == names(MIXES[mix])
    check(tmp_path, MIXES[mix], contents, alone)
    recorded = [json.loads((r.output / "shardq.json").read_text())["errors"]["relative"] for r in results]
    assert [r.errors.relative for r in results if r.errors] == recorded


def test_small_slabs_and_tiles_change_no_weight(
    folder: Path, tmp_path: Path, contents: Contents, alone: Alone,
    monkeypatch: pytest.MonkeyPatch, short_spans: int,
) -> None:  # fmt: skip
    for name in ("shardq.tasks.TILE_BYTES", "shardq.worker.TILE_BYTES"):
        monkeypatch.setattr(name, 16 << 10)
    schemes = ("W4A16@mlx", "W4A16@gptq", "NVFP4A16", "FP8_BLOCK@fp8")
    shardq.quantize_many(folder, schemes, output_dir=tmp_path, limits=ONE)
    gate = "model.layers.0.mlp.gate_proj.weight"
    assert sum(t.tensor == gate for t in shardq.plan(folder).tasks) == 3
    check(tmp_path, schemes, contents, alone)


@pytest.mark.parametrize("is_fetched", [False, True])
def test_pieces_past_the_page_cache_change_no_weight(
    folder: Path, make_model: Callable[[Path], Any], tmp_path: Path, contents: Contents, alone: Alone, is_fetched: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also where one output copies tiles that others quantize, and what a download has brought is read that way."""
    plain, counts = DirectDisk._judge, Counter[str]()
    monkeypatch.setattr(direct, "LEAST_BYTES", direct.BLOCK_BYTES)
    monkeypatch.setattr(DirectDisk, "_judge", lambda disk, *moved: (counts.update(("calls",)), plain(disk, *moved))[1])
    if is_fetched:
        model = make_model(folder)
        monkeypatch.setattr("shardq.opening.open_source", lambda *_, **__: model.open())
    schemes = ("W4A16@mlx", "W4A16@gptq", "MXFP4", "FP8_BLOCK")
    shardq.quantize_many("org/model" if is_fetched else folder, schemes, output_dir=tmp_path, limits=ONE)
    for scheme, name in zip(schemes, names(schemes), strict=True):
        here, there = contents(tmp_path / name), alone(scheme)
        assert {n for n in there if here[n] != there[n]} <= (OF_THE_SOURCE if is_fetched else set()), scheme
    if counts["calls"] <= 2:
        pytest.skip("this file system has no O_DIRECT")
    assert counts["calls"] > 100


# --- one read -------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[tuple[str, int, int]] = Counter()

    def note(fd: int, begin: int, size_bytes: int, *rest: Any) -> Any:
        reads[os.path.basename(os.readlink(f"/proc/self/fd/{fd}")), begin, size_bytes] += 1
        return open_slab(fd, begin, size_bytes, *rest)

    monkeypatch.setattr("shardq.source_bytes.open_slab", note)
    schemes = MIXES["kept by some"]
    shardq.quantize_many(folder, schemes, output_dir=tmp_path, limits=ONE)
    tensors = shardq.plan(folder).checkpoint.tensors.values()
    assert reads == Counter({(t.shard, t.begin, t.size_bytes): 1 for t in tensors})


@pytest.mark.parametrize("stream", [False, True])
def test_a_repo_is_read_once(
    folder: Path, make_model: Callable[[Path], Any], tmp_path: Path, stream: bool, short_spans: int,
    monkeypatch: pytest.MonkeyPatch, contents: Contents, alone: Alone,
) -> None:  # fmt: skip
    model = make_model(folder)
    monkeypatch.setattr("shardq.opening.open_source", lambda *_, **__: model.open())
    schemes = ("W4A16@mlx", "W4A16@gptq", "FP8_BLOCK")
    shardq.quantize_many("org/model", schemes, output_dir=tmp_path, limits=Limits(parallel=1, stream=stream))
    sizes = {s: len(model.files[s]) for s in model.shards}
    asked = {shard: sorted((s.begin, s.begin + s.sent_bytes) for s in model.asked(shard)) for shard in model.shards}
    for shard, parts in asked.items():  # from the first byte to the last, without gap or overlap
        assert [begin for begin, _ in parts] == [0, *(end for _, end in parts[:-1])]
        assert parts[-1][1] == sizes[shard]
        assert len(parts) > 1 or not stream
    for scheme, name in zip(schemes, names(schemes), strict=True):
        here, there = contents(tmp_path / name), alone(scheme)
        assert {n for n in there if n.endswith(".safetensors") and here[n] == there[n]} == set(model.shards)


# --- again and again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_run_goes_on(
    folder: Path, tmp_path: Path, contents: Contents, alone: Alone, begin: Callable[..., Any],
    journal_lines: Callable[[Path, str], int], sent: signal.Signals,
) -> None:  # fmt: skip
    words = [w for s in PAIR for w in ("--scheme", s)]
    first = tmp_path / names(PAIR)[0]
    run = begin(folder, tmp_path, 0.03, *words)
    assert run.wait_for(lambda: journal_lines(first, "task") > 8)
    if sent == signal.SIGKILL:
        run.kill_group()
    else:
        run.send_signal(sent)
        assert run.wait(60) == 143
    assert not list(tmp_path.glob("*/config.json"))
    assert all(journal_lines(tmp_path / n, "task") > 0 for n in names(PAIR))
    steps: list[Progress] = []
    shardq.quantize_many(folder, PAIR, output_dir=tmp_path, limits=ONE, report=steps.append)
    assert steps[-1].resumed_bytes > 0
    check(tmp_path, PAIR, contents, alone)


def test_one_alone_goes_on_with_what_many_began_and_the_reverse(
    folder: Path, tmp_path: Path, contents: Contents, alone: Alone
) -> None:
    outs = [tmp_path / n for n in names(PAIR)]
    with pytest.raises(KeyboardInterrupt):
        shardq.quantize_many(folder, PAIR, output_dir=tmp_path, limits=ONE, report=stop_after(12))
    steps: list[Progress] = []
    with pytest.raises(KeyboardInterrupt):
        shardq.quantize(folder, PAIR[1], output_dir=outs[1], limits=ONE, report=stop_after(20))
    shardq.quantize(folder, PAIR[0], output_dir=outs[0], limits=ONE, report=steps.append)
    assert steps[-1].resumed_bytes > 0
    assert contents(outs[0]) == alone(PAIR[0])
    three = (*PAIR, "MXFP4")
    results = shardq.quantize_many(folder, three, output_dir=tmp_path, limits=ONE)
    assert [r.already_done for r in results] == [True, False, False]
    check(tmp_path, three, contents, alone)
    assert all(r.already_done for r in shardq.quantize_many(folder, three, output_dir=tmp_path, limits=ONE))


def test_finished_one_answers_without_reading_anything(folder: Path, tmp_path: Path) -> None:
    shardq.quantize_many(folder, PAIR, output_dir=tmp_path, limits=ONE)
    seen: list[Progress] = []
    results = shardq.quantize_many(folder, PAIR[::-1], output_dir=tmp_path, limits=ONE, report=seen.append)
    assert [(r.output.name, r.already_done, r.errors) for r in results] == [(n, True, None) for n in names(PAIR)[::-1]]
    assert seen == []


@pytest.mark.parametrize("finished", [True, False])
def test_other_recipe_on_one_folder_is_refused_before_anything(
    folder: Path, tmp_path: Path, contents: Contents, finished: bool
) -> None:
    recipes = [make_recipe("MXFP4"), make_recipe(PAIR[1])]
    other = make_recipe(PAIR[1], ignore=["re:.*o_proj"])
    out = tmp_path / names(PAIR)[1]
    try:
        shardq.quantize(folder, other, output_dir=out, limits=ONE, report=None if finished else stop_after(3))
    except KeyboardInterrupt:
        assert not finished
    before = contents(tmp_path)
    with pytest.raises(RecipeChanged, match=r"recipe\.ignore"):
        shardq.quantize_many(folder, recipes, output_dir=tmp_path, limits=ONE)
    assert contents(tmp_path) == before
    assert {p.name for p in tmp_path.iterdir()} == {out.name}
    shardq.quantize_many(folder, recipes, output_dir=tmp_path, limits=ONE, restart=True)
    assert all((tmp_path / n / "config.json").exists() for n in names(["MXFP4", PAIR[1]]))


def test_the_same_output_twice_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="W4A16-gptq would be made twice"):
        shardq.quantize_many(folder, ["W4A16@gptq", "MXFP4", "W4A16@gptq"], output_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_source_shards_that_another_order_staged_are_not_left(
    folder: Path, make_model: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetched shards lie in the folder of the first output; in the next run that may be another."""
    model = make_model(folder)
    monkeypatch.setattr("shardq.opening.open_source", lambda *_, **__: model.open())
    with pytest.raises(KeyboardInterrupt):
        shardq.quantize_many("org/model", PAIR, output_dir=tmp_path, limits=ONE, report=stop_after(3))
    staged = tmp_path / names(PAIR)[0] / ".shardq" / "src"
    assert list(staged.iterdir())
    seen: list[list[Path]] = []

    def look(step: Progress) -> None:
        seen.append(list(staged.iterdir()) if step.stage == "work" else [])

    shardq.quantize_many("org/model", PAIR[::-1], output_dir=tmp_path, limits=ONE, report=look)
    assert len(seen) > 10
    assert not any(seen)


# --- caps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("push", [False, True])
def test_disk_stays_below_the_least_cap(
    push_hub: Any,
    host_model: Callable[[Path], str],
    tmp_path: Path,
    write_moe: Callable[..., Path],
    push: bool,
    measures: ModuleType,
) -> None:
    """Of shards that are large against blocks and records."""
    folder = write_moe(tmp_path / "wide" / "model", lambda place, _: 1 + place % 4, hidden=512)
    schemes = ("W8A16", "W8A8")
    source, outs = host_model(folder), tmp_path / "outs"
    outs.mkdir()
    work = OnePass(tuple(shardq.plan(source, s) for s in schemes))
    cap = disk_bytes(work, staged=True, uploads=push)
    peak, polls, over = 0, 0, threading.Event()

    def watch() -> None:
        nonlocal peak, polls
        while not over.wait(0.001):
            peak, polls = max(peak, measures.used_bytes(outs)), polls + 1

    def run(cap: int) -> None:
        shardq.quantize_many(
            source, schemes, output_dir=outs, limits=Limits(parallel=1, max_disk_bytes=cap),
            push_to="me/m-{scheme}-{layout}" if push else None,
        )  # fmt: skip

    with pytest.raises(BudgetTooSmall, match="--max-disk"):
        run(cap - 1)
    thread = threading.Thread(target=watch)
    thread.start()
    run(cap)
    over.set()
    thread.join()
    assert polls > 20
    assert cap * 0.7 < peak <= cap


def test_memory_stays_below_the_least_cap(
    tmp_path: Path, make_checkpoint: Callable[..., Path], measures: ModuleType
) -> None:
    folder = make_checkpoint(hidden=1024, layers=2)
    schemes = ("W4A16@gptq", "W8A8", "NVFP4A16", "W4A16@fake")
    work = OnePass(tuple(shardq.plan(folder, s) for s in schemes))
    with pytest.raises(BudgetTooSmall) as refused:
        Limits(parallel=4, max_ram_bytes=1).share_memory(work, remote=False, network=False)
    least = int(str(refused.value).partition("expected at least ")[2].split(" ", 1)[0])
    words = [w for s in schemes for w in ("--scheme", s)]
    command = [sys.executable, "-P", "-m", "shardq.cli", "quantize", str(folder), "-q", "--parallel", "4", *words]
    small = subprocess.run(
        [*command, "-o", str(tmp_path / "no"), "--max-ram", f"{least - 1}M"], check=False, capture_output=True
    )
    assert small.returncode == BudgetTooSmall.exit_code
    peak, process = 0, subprocess.Popen([*command, "-o", str(tmp_path / "out"), "--max-ram", f"{least + 1}M"])
    while process.poll() is None:
        peak = max(peak, measures.anonymous_bytes(process.pid))
        threading.Event().wait(0.01)
    assert process.returncode == 0
    assert work.largest_task_bytes > 30_000_000
    assert work.largest_task_bytes < peak < (least + 1) * 1_000_000


@pytest.mark.parametrize("tight", [True, False])
def test_workers_keep_memory_only_where_all_may(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tight: bool
) -> None:
    """Else idle ones would hold what the budget gives to others."""
    kept: list[int] = []

    class Noted(shardq.worker.Worker):
        def run(self, work: object) -> shardq.worker.Report:
            report = super().run(work)
            kept.append(self._arena._block.size)
            return report

    def inline(_parallel: int, workplace: Workplace, _task_bytes: int | None) -> InlineExecutor:
        return InlineExecutor("shardq.worker:start", workplace)

    monkeypatch.setattr(shardq.worker, "Worker", Noted)
    monkeypatch.setattr(shardq.run, "make_executor", inline)
    with pytest.raises(BudgetTooSmall) as refused:
        Limits(parallel=2, max_ram_bytes=1).share_memory(OnePass((shardq.plan(folder),)), remote=False, network=False)
    least = int(str(refused.value).partition("expected at least ")[2].split(" ", 1)[0])
    cap = (least + (1 if tight else 10)) * 1_000_000
    shardq.quantize(folder, output_dir=tmp_path / "out", limits=Limits(parallel=2, max_ram_bytes=cap))
    assert len(kept) > 20
    assert not any(kept) if tight else all(kept)


# --- the Hub, and words -----------------------------------------------------------------------------------------------


def test_each_output_goes_to_a_repo_with_one_commit(
    push_hub: Any, folder: Path, tmp_path: Path, writable_hub_module: ModuleType
) -> None:
    push_to, outs = "me/m-{scheme}-{layout}", tmp_path / "outs"
    repos = ["me/m-W4A16-ASYM-mlx", "me/m-NVFP4A16-compressed-tensors"]
    with pytest.raises(BadOption, match=r"names one repo for 2 outputs: put \{scheme\} and \{layout\}"):
        shardq.quantize_many(folder, PAIR, output_dir=outs, limits=ONE, push_to="me/m")
    with pytest.raises(KeyboardInterrupt):
        shardq.quantize_many(folder, PAIR, output_dir=outs, limits=ONE, push_to=push_to, report=stop_after(20))
    assert push_hub.commits == []
    results = shardq.quantize_many(folder, PAIR, output_dir=outs, limits=ONE, push_to=push_to)
    assert [r.pushed_to for r in results] == [f"{r}@main" if "@" in str(results[0].pushed_to) else r for r in repos]
    assert sorted(c.oid for c in push_hub.commits) == sorted(str(r.pushed_commit) for r in results)
    local = tmp_path / "local"
    shardq.quantize_many(folder, PAIR, output_dir=local, limits=ONE)
    for repo, name in zip(repos, names(PAIR), strict=True):
        there = {n: d for n, d in push_hub.files(repo).items() if n != ".gitattributes"}
        assert there == {p.name: p.read_bytes() for p in (local / name).iterdir()}
    assert not outs.exists() or list(outs.iterdir()) == []
    again = shardq.quantize_many(folder, PAIR, output_dir=outs, limits=ONE, push_to=push_to)
    assert [(r.already_done, r.pushed_commit) for r in again] == [(True, r.pushed_commit) for r in results]
    assert len(push_hub.commits) == 2


def test_json_has_a_document_for_each_output(folder: Path, tmp_path: Path) -> None:
    words = ["quantize", str(folder), "-o", str(tmp_path), "--json", "--parallel", "1"]
    done = CliRunner().invoke(commands, [*words, "--scheme", PAIR[0], "--scheme", PAIR[1]])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert list(found) == ["outputs"]
    assert [Path(o["output"]).name for o in found["outputs"]] == names(PAIR)
    assert [o["counts"]["quantized"] for o in found["outputs"]] == [25, 23]
    single = CliRunner().invoke(commands, [*words[:3], str(tmp_path / names(PAIR)[0]), *words[4:], "--scheme", PAIR[0]])
    assert json.loads(single.stdout).keys() == found["outputs"][0].keys()
    assert json.loads(single.stdout)["already_done"]
