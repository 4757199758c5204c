"""GGUF files of many source shards, from folders: shards are settled one by one, and may be gone when a run goes on."""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from stopped_runs import stop_after

import shardq
from shardq import Limits, Progress
from shardq.errors import CheckpointIncomplete, NotWritable, RecipeChanged
from shardq.journal import Journal
from shardq.settling import Settling
from shardq.worker import Worker

pytest.importorskip("gguf", reason="names of GGUF tensors come from the package gguf")
pytest.importorskip("tokenizers", reason="vocabularies are read with the package tokenizers")
import gguf_sources as made

PARTS = (None, 64 << 10)  # one file, and several
LIMIT_S = 60.0
KILLS = 3
ONE, EATING = Limits(parallel=1), Limits(parallel=1, delete_source=True)
Contents = Callable[[Path], dict[str, str]]
Begin = Callable[..., Any]  # of conftest.py
Lines = Callable[[Path, str], int]


def stop_when(condition: Callable[[Progress], bool]) -> Callable[[Progress], None]:
    def report(step: Progress) -> None:
        if condition(step):
            raise KeyboardInterrupt

    return report


def settled(out: Path) -> list[str]:
    """Shards that the journal of an unfinished run calls settled, in order."""
    return [e["shard"] for e in events(out) if e["event"] == "settled"]


def events(out: Path) -> list[dict[str, Any]]:
    journal, found = Journal.open(out / ".shardq" / "journal.jsonl")
    journal.close()
    return found


def alone(source: Path, recipe: shardq.Recipe, out: Path, contents: Contents) -> dict[str, str]:
    shardq.quantize(source, recipe, output_dir=out, limits=ONE)
    return contents(out)


# --- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("part_bytes", PARTS, ids=["one file", "parts"])
def test_kill_of_the_whole_group_at_random_moments(
    tmp_path: Path, begin: Begin, contents: Contents, journal_lines: Lines, part_bytes: int | None
) -> None:
    source = made.write("mxfp4", tmp_path)
    recipe = made.recipe("mxfp4", part_bytes)
    expected = alone(source, recipe, tmp_path / "alone", contents)
    words = ["--scheme", "gguf:q4_k_m", "--tokenizer-pre", recipe.gguf.tokenizer_pre]
    words += ["--split-max-size", f"{part_bytes}B"] if part_bytes else []
    chance, out = random.Random(part_bytes), tmp_path / "out"
    for kill in range(KILLS + 1):  # run, kill, run, kill, ... and one run that gets through
        process = begin(source, out, 0.02, *words)
        if kill < KILLS and process.wait_for(lambda wanted=kill * 12: journal_lines(out, "task") > wanted):
            try:
                process.wait(chance.uniform(0, 0.2))
            except subprocess.TimeoutExpired:
                process.kill_group()
                assert not list(out.glob("*.gguf"))
                continue
        assert process.wait(LIMIT_S) == 0, process.communicate()[1]
        break
    assert kill > 1
    assert contents(out) == expected


@pytest.mark.parametrize("name", made.TINY)
@pytest.mark.parametrize("part_bytes", PARTS, ids=["one file", "parts"])
def test_eaten_source_goes_shard_by_shard_and_the_run_goes_on_without_it(
    tmp_path: Path, contents: Contents, short_spans: int, name: str, part_bytes: int | None
) -> None:
    """Stopped again and again, each time after some tasks more."""
    source, out = made.write(name, tmp_path), tmp_path / "out"
    recipe = made.recipe(name, part_bytes)
    expected = alone(source, recipe, tmp_path / "alone", contents)
    before = {p.name for p in source.glob(made.SHARDS)}
    left = [before]

    def note(step: Progress) -> None:
        left.append({p.name for p in source.glob(made.SHARDS)})

    runs, tasks = 0, len(shardq.plan(source, recipe).tasks)
    while True:
        stop = stop_after((1 + runs) * (2 + tasks // 4))

        def report(step: Progress, stop: Callable[[Progress], None] = stop) -> None:
            note(step)
            stop(step)

        try:
            shardq.quantize(source, recipe, output_dir=out, limits=EATING, report=report)
        except KeyboardInterrupt:
            runs += 1
            assert not list(out.glob("*.gguf"))
            continue
        break
    assert runs > 1
    assert contents(out) == expected
    assert all(later <= earlier for earlier, later in pairwise(left))
    assert any(0 < len(shards) < len(before) for shards in left)  # long before the end
    assert not list(source.glob(made.SHARDS))
    assert shardq.quantize(source, recipe, output_dir=out, limits=EATING).already_done


@pytest.mark.parametrize("part_bytes", PARTS, ids=["one file", "parts"])
def test_workers_make_the_same_bytes_and_settle_all_but_what_is_sealed(
    tmp_path: Path, contents: Contents, part_bytes: int | None
) -> None:
    source, recipe = made.write("fp8", tmp_path), made.recipe("fp8", part_bytes)
    expected = alone(source, recipe, tmp_path / "alone", contents)
    shardq.quantize(source, recipe, output_dir=tmp_path / "out", limits=Limits(parallel=3, delete_source=True))
    assert contents(tmp_path / "out") == expected
    assert not list(source.glob(made.SHARDS))


# --- what is settled, and what no longer is --------------------------------------------------------------------------


def test_settled_shards_are_not_looked_at_again(
    tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, recipe, out = made.write("rotary", tmp_path), made.recipe("rotary"), tmp_path / "out"
    expected = alone(source, recipe, tmp_path / "alone", contents)
    with pytest.raises(KeyboardInterrupt):
        shardq.quantize(source, recipe, output_dir=out, limits=ONE, report=stop_when(lambda _: len(settled(out)) == 2))
    ids = {t.id for t in shardq.plan(source, recipe).tasks if t.shard not in settled(out)}
    seen: list[int] = []
    run = Worker.run

    def note(worker: Worker, work: Any) -> Any:
        seen.extend([work.id] if hasattr(work, "members") else [])
        return run(worker, work)

    monkeypatch.setattr(Worker, "run", note)
    shardq.quantize(source, recipe, output_dir=out, limits=ONE)
    assert set(seen) == ids
    assert contents(out) == expected


@pytest.mark.parametrize("part_bytes", PARTS, ids=["one file", "parts"])
def test_settled_shards_whose_file_is_lost_are_made_again_for_good(
    tmp_path: Path, contents: Contents, part_bytes: int | None
) -> None:
    """Also when the run that begins the file anew is stopped: the journal then holds that they were settled once."""
    source, recipe, out = made.write("experts", tmp_path), made.recipe("experts", part_bytes), tmp_path / "out"
    expected = alone(source, recipe, tmp_path / "alone", contents)
    with pytest.raises(KeyboardInterrupt):
        shardq.quantize(source, recipe, output_dir=out, limits=ONE, report=stop_when(lambda _: len(settled(out)) == 2))
    for part in (out / ".shardq" / "part").iterdir():
        part.unlink()
    with pytest.raises(KeyboardInterrupt):
        shardq.quantize(source, recipe, output_dir=out, limits=ONE, report=stop_after(1))
    assert [e["shards"] for e in events(out) if e["event"] == "unsettled"] == [sorted(settled(out)[:2])]
    shardq.quantize(source, recipe, output_dir=out, limits=ONE)
    assert contents(out) == expected


def test_settled_shard_that_changes_is_made_again(tmp_path: Path, contents: Contents) -> None:
    source, recipe, out = made.write("experts", tmp_path), made.recipe("experts"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        shardq.quantize(source, recipe, output_dir=out, limits=ONE, report=stop_when(lambda _: bool(settled(out))))
    path = source / settled(out)[0]
    data = bytearray(path.read_bytes())
    data[-2000:] = bytes(2000)  # other weights under the same header
    path.write_bytes(data)
    shardq.quantize(source, recipe, output_dir=out, limits=ONE)
    assert contents(out) == alone(source, recipe, tmp_path / "alone", contents)
    after = max(p.stat().st_mtime for p in out.iterdir()) + 10
    os.utime(path, (after, after))
    with pytest.raises(RecipeChanged, match=f"{path.name} was written after it: use --restart"):
        shardq.quantize(source, recipe, output_dir=out, limits=ONE)
    assert not shardq.quantize(source, recipe, output_dir=out, limits=ONE, restart=True).already_done


@pytest.mark.parametrize("call", ["_settle", "_seal"])
def test_disk_that_refuses_to_keep_a_part_costs_what_is_not_settled(
    tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """What was settled before, and whose source is gone, stays. What was not is done again though it can be read."""
    source, recipe, out = made.write("rotary", tmp_path), made.recipe("rotary"), tmp_path / "out"
    expected = alone(source, recipe, tmp_path / "alone", contents)
    work, fsync, failed = getattr(Worker, call), os.fsync, 0

    def refuse(fd: int) -> None:
        nonlocal failed
        name = os.readlink(f"/proc/self/fd/{fd}")
        if name.endswith(".gguf") and (call == "_seal" or len(settled(out)) == 2):
            failed += 1
            raise OSError(5, "Input/output error")
        fsync(fd)

    def fail(worker: Worker, task: Any) -> Any:
        with monkeypatch.context() as inner:
            inner.setattr(os, "fsync", refuse)
            return work(worker, task)

    monkeypatch.setattr(Worker, call, fail)
    with pytest.raises(NotWritable, match="hardware error"):
        shardq.quantize(source, recipe, output_dir=out, limits=EATING)
    monkeypatch.undo()
    assert failed == 1
    there = {p.name for p in source.glob(made.SHARDS)}
    assert len(there) == 4 - len(settled(out)) < 4
    assert events(out)[-1]["event"] == "distrust"
    steps: list[Progress] = []
    shardq.quantize(source, recipe, output_dir=out, limits=EATING, report=steps.append)
    assert contents(out) == expected
    assert steps[-1].resumed_bytes == steps[0].resumed_bytes  # nothing was believed because it could be read


def test_files_are_not_sealed_while_they_are_settled_nor_the_reverse(tmp_path: Path) -> None:
    source, recipe = made.write("smallest", tmp_path), made.recipe("smallest", 22_000)
    plan = shardq.plan(source, recipe)
    first, second = (s.name for s in plan.checkpoint.shards)
    head, attention, rest = (f.name for f in plan.files)
    settling = Settling(plan, ())
    assert settling.files(first) == {head, attention, rest}
    assert settling.files(second) == {head, rest}
    settling.begin(first, settling.files(first) - {attention})
    assert [settling.is_busy(f) for f in (head, attention, rest)] == [True, False, True]
    assert settling.needs(first, {attention})
    settling.end(first)
    assert not any(settling.is_busy(f) for f in (head, attention, rest))
    assert (settling.needs(first, set()), settling.needs(second, set())) == (False, True)
    assert settling.doubtful(head) == {second}
    assert settling.held({head}) == {attention, rest}
    assert not settling.needs(second, {head, rest})


# --- other runs ------------------------------------------------------------------------------------------------------


def test_restart_of_a_half_eaten_source_is_refused_and_keeps_what_is_done(tmp_path: Path, contents: Contents) -> None:
    source, recipe, out = made.write("stacks", tmp_path), made.recipe("stacks"), tmp_path / "out"
    expected = alone(source, recipe, tmp_path / "alone", contents)
    with pytest.raises(KeyboardInterrupt):
        shardq.quantize(source, recipe, output_dir=out, limits=EATING, report=stop_when(lambda _: bool(settled(out))))
    with pytest.raises(CheckpointIncomplete):
        shardq.quantize(source, recipe, output_dir=out, limits=EATING, restart=True)
    shardq.quantize(source, recipe, output_dir=out, limits=EATING)
    assert contents(out) == expected


@pytest.mark.parametrize("scheme", ["gguf", "W4A16"])
def test_shards_of_another_model_do_not_finish_a_half_eaten_one(
    tmp_path: Path, contents: Contents, scheme: str
) -> None:
    """Under its name, or in a folder of another name. None of them is deleted."""
    source, out = made.write("experts", tmp_path), tmp_path / "out"
    recipe = made.recipe("experts") if scheme == "gguf" else shardq.make_recipe(scheme, group_size=32)
    expected = alone(source, recipe, tmp_path / "alone", contents)
    gone = stop_when(lambda _: len(list(source.glob(made.SHARDS))) < 3)
    with pytest.raises(KeyboardInterrupt):
        shardq.quantize(source, recipe, output_dir=out, limits=EATING, report=gone)
    other = made.write("stacks", tmp_path / "other")
    left = min(source.glob(made.SHARDS))
    kept = left.rename(tmp_path / left.name)
    shutil.copy(other / left.name, left)
    before = contents(tmp_path)
    with pytest.raises(RecipeChanged, match=r"source\.shards"):
        shardq.quantize(source, recipe, output_dir=out, limits=EATING)
    named = other.rename(tmp_path / "Other")
    with pytest.raises(RecipeChanged, match=r"source\.label"):
        shardq.quantize(named, recipe, output_dir=out, limits=EATING)
    named.rename(other)
    assert {n: h for n, h in contents(tmp_path).items() if "/.shardq/" not in n} == {
        n: h for n, h in before.items() if "/.shardq/" not in n
    }
    kept.replace(left)
    shardq.quantize(source, recipe, output_dir=out, limits=EATING)
    assert contents(out) == expected


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_other_recipe_is_refused_and_restart_discards(tmp_path: Path, contents: Contents, finished: bool) -> None:
    source, out = made.write("experts", tmp_path), tmp_path / "out"
    report = None if finished else stop_after(8)
    try:
        shardq.quantize(source, made.recipe("experts", 64 << 10), output_dir=out, limits=ONE, report=report)
    except KeyboardInterrupt:
        assert not finished
    before = contents(out)
    other = made.recipe("experts", file_type="q8_0")
    with pytest.raises(RecipeChanged, match=r"recipe\.gguf.*--restart"):
        shardq.quantize(source, other, output_dir=out, limits=ONE)
    with pytest.raises(RecipeChanged, match=r"recipe\.gguf"):
        shardq.quantize(source, shardq.make_recipe("W4A16", group_size=32), output_dir=out, limits=ONE)
    assert contents(out) == before
    seen: list[set[str]] = []
    shardq.quantize(
        source, other, output_dir=out, limits=ONE, restart=True, report=lambda _: seen.append(set(os.listdir(out)))
    )
    assert all(names == {".shardq"} for names in seen)
    assert contents(out) == alone(source, other, tmp_path / "alone", contents)
    assert shardq.quantize(source, other, output_dir=out, limits=ONE).already_done


@pytest.mark.parametrize("number", [1, 2])
def test_lost_part_of_a_finished_output_is_made_again(tmp_path: Path, contents: Contents, number: int) -> None:
    source, recipe, out = made.write("experts", tmp_path), made.recipe("experts", 64 << 10), tmp_path / "out"
    expected = alone(source, recipe, out, contents)
    next(out.glob(f"*-0000{number}-of-*.gguf")).unlink()
    assert not shardq.quantize(source, recipe, output_dir=out, limits=ONE).already_done
    assert contents(out) == expected


def test_dry_run_writes_nothing(tmp_path: Path, contents: Contents) -> None:
    from click.testing import CliRunner

    from shardq.cli.group import commands

    source = made.write("rotary", tmp_path)
    before = contents(tmp_path)
    words = ["quantize", str(source), "--scheme", "gguf:q4_k_m", "--split-max-size", "64K", "-o", str(tmp_path / "out")]
    words += ["--tokenizer-pre", "llama-bpe", "--dry-run", "--json"]
    done = CliRunner().invoke(commands, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()
    shutil.rmtree(source)
