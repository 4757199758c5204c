"""A second run: it goes on where the first one stopped, redoes only what is damaged, refuses what has changed."""

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import shardq
from shardq import Limits, Progress
from shardq.errors import OutputLocked, RecipeChanged, ShardqError
from shardq.lock import FolderLock
from shardq.tasks import QuantizeTask

Contents = Callable[[Path], dict[str, str]]
Stop = Callable[[Path, Path, int], None]


class EnoughError(ShardqError):
    """Ends a run from its own report."""


@pytest.fixture
def stop_after(one: Limits) -> Stop:
    """stop_after(source, out, tasks): a run that ends after that many tasks."""

    def run(source: Path, out: Path, tasks: int) -> None:
        left = tasks

        def report(step: Progress) -> None:
            nonlocal left
            left -= step.stage == "work"
            if left == 0:
                raise EnoughError

        with pytest.raises(EnoughError):
            shardq.quantize(source, output_dir=out, limits=one, report=report)

    return run


@pytest.fixture(scope="session")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, contents: Contents) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    shardq.quantize(checkpoint, output_dir=out, limits=Limits(parallel=1))
    return contents(out)


@pytest.fixture
def sealed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished files do not wait for others."""
    monkeypatch.setattr("shardq.seals.TOGETHER", 1)


def task_events(out: Path) -> list[int]:
    lines = (out / ".shardq" / "journal.jsonl").read_text().splitlines()
    return [e["id"] for e in (json.loads(line[9:]) for line in lines) if e["event"] == "task"]


@pytest.mark.usefixtures("sealed_alone")
def test_resume_reuses_tasks_and_sealed_files(
    checkpoint: Path, tmp_path: Path, stop_after: Stop, undisturbed: dict[str, str], contents: Contents, one: Limits
) -> None:
    out = tmp_path / "out"
    stop_after(checkpoint, out, 12)
    sealed = out / ".shardq" / "ready" / "model-00001-of-00003.safetensors"
    before = sealed.stat()
    assert not (out / "config.json").exists()
    steps: list[Progress] = []
    shardq.quantize(checkpoint, output_dir=out, limits=one, report=steps.append)
    tasks = shardq.plan(checkpoint).tasks
    assert steps[-1].resumed_bytes == sum(t.source_bytes for t in tasks[:12])
    assert steps[0].done_files == 1
    assert [s.item for s in steps if s.stage == "file"] == [f"model-0000{n}-of-00003.safetensors" for n in (2, 3)]
    after = (out / sealed.name).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert contents(out) == undisturbed


def test_only_the_damaged_task_is_done_again(
    checkpoint: Path, tmp_path: Path, stop_after: Stop, undisturbed: dict[str, str], contents: Contents, one: Limits
) -> None:
    out = tmp_path / "out"
    stop_after(checkpoint, out, 6)
    tasks = shardq.plan(checkpoint).tasks
    task = tasks[4]
    assert isinstance(task, QuantizeTask)
    with (out / ".shardq" / "part" / task.file).open("r+b") as f:
        f.seek(task.targets[0].begin + 100)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))
    seen: list[list[int]] = []
    shardq.quantize(checkpoint, output_dir=out, limits=one, report=lambda _: seen.append(task_events(out)))
    done = seen[-1]
    assert done[:6] == [0, 1, 2, 3, 4, 5]
    assert sorted(done) == sorted([*range(len(tasks)), 4])
    assert contents(out) == undisturbed


def test_damaged_header_of_a_part_is_written_again(
    checkpoint: Path, tmp_path: Path, stop_after: Stop, undisturbed: dict[str, str], contents: Contents, one: Limits
) -> None:
    out = tmp_path / "out"
    stop_after(checkpoint, out, 3)
    with (out / ".shardq" / "part" / "model-00001-of-00003.safetensors").open("r+b") as f:
        f.write(b"\xff" * 64)
    shardq.quantize(checkpoint, output_dir=out, limits=one)
    assert contents(out) == undisturbed


@pytest.mark.parametrize("seed", range(12))
def test_journal_cut_anywhere(
    checkpoint: Path, tmp_path: Path, stop_after: Stop, undisturbed: dict[str, str], contents: Contents, one: Limits,
    seed: int,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    stop_after(checkpoint, out, 14)
    journal = out / ".shardq" / "journal.jsonl"
    os.truncate(journal, random.Random(seed).randrange(journal.stat().st_size))
    shardq.quantize(checkpoint, output_dir=out, limits=one)
    assert contents(out) == undisturbed


def test_finished_folder_is_done_without_reading_a_weight(
    make_checkpoint: Callable[..., Path], tmp_path: Path, contents: Contents, one: Limits
) -> None:
    source, out = make_checkpoint(), tmp_path / "out"
    first = shardq.quantize(source, output_dir=out, limits=one)
    before = contents(out)
    for path in source.glob("*.safetensors"):
        begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        size = path.stat().st_size
        os.truncate(path, begin)
        with path.open("ab") as f:
            f.write(b"\xff" * (size - begin))  # NaN in every type
        os.utime(path, (1, 1))  # a later change of the file itself is refused, see below
    again = shardq.quantize(source, output_dir=out, limits=one)
    assert again.already_done
    assert again.errors is None
    assert replace(again, already_done=False, errors=first.errors, seconds=first.seconds) == first
    assert contents(out) == before


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_other_recipe_is_refused_and_restart_discards(
    checkpoint: Path, tmp_path: Path, stop_after: Stop, contents: Contents, one: Limits, finished: bool
) -> None:
    out = tmp_path / "out"
    if finished:
        shardq.quantize(checkpoint, output_dir=out, limits=one)
    else:
        stop_after(checkpoint, out, 5)
    other = shardq.make_recipe("W4A16@gptq", group_size=64)
    with pytest.raises(RecipeChanged) as refusal:
        shardq.quantize(checkpoint, other, output_dir=out, limits=one)
    assert "recipe.layout (was 'auto_round', now 'gptq')" in str(refusal.value)
    assert "recipe.scheme" in str(refusal.value)
    assert "recipe.ignore" not in str(refusal.value)
    assert "--restart" in str(refusal.value)
    shardq.quantize(checkpoint, other, output_dir=out, limits=one, restart=True)
    shardq.quantize(checkpoint, other, output_dir=tmp_path / "new", limits=one)
    assert contents(out) == contents(tmp_path / "new")


def test_other_source_is_refused(
    checkpoint: Path, make_checkpoint: Callable[..., Path], tmp_path: Path, one: Limits
) -> None:
    shardq.quantize(checkpoint, output_dir=tmp_path / "out", limits=one)
    with pytest.raises(RecipeChanged, match=r"source\.shards"):
        shardq.quantize(make_checkpoint(layers=2), output_dir=tmp_path / "out", limits=one)


def test_restart_on_a_finished_folder_first_makes_it_unloadable(
    checkpoint: Path, tmp_path: Path, contents: Contents, undisturbed: dict[str, str], one: Limits
) -> None:
    out = tmp_path / "out"
    shardq.quantize(checkpoint, "W4A16@gptq", output_dir=out, limits=one)
    (out / "notes.txt").write_text("not ours")
    seen: list[set[str]] = []

    def report(_: Progress) -> None:
        seen.append({p.name for p in out.iterdir()})

    shardq.quantize(checkpoint, output_dir=out, limits=one, restart=True, report=report)
    assert all(names == {".shardq", "notes.txt"} for names in seen)
    assert contents(out).keys() - undisturbed.keys() == {"notes.txt"}


def test_restart_removes_nothing_outside_the_folder(checkpoint: Path, tmp_path: Path, one: Limits) -> None:
    out, precious = tmp_path / "out", tmp_path / "precious"
    precious.write_text("keep me")
    shardq.quantize(checkpoint, output_dir=out, limits=one)
    record = json.loads((out / "shardq.json").read_text())
    record["others"] += ["../precious", str(precious)]
    (out / "shardq.json").write_text(json.dumps(record))
    shardq.quantize(checkpoint, output_dir=out, limits=one, restart=True)
    assert precious.read_text() == "keep me"


def test_damaged_finished_folder_is_made_again(
    checkpoint: Path, tmp_path: Path, contents: Contents, undisturbed: dict[str, str], one: Limits
) -> None:
    out = tmp_path / "out"
    shardq.quantize(checkpoint, output_dir=out, limits=one)
    os.truncate(out / "model-00002-of-00003.safetensors", 1000)
    assert not shardq.quantize(checkpoint, output_dir=out, limits=one).already_done
    assert contents(out) == undisturbed


def test_folder_of_a_live_run_is_locked(checkpoint: Path, tmp_path: Path, one: Limits) -> None:
    out = tmp_path / "out"
    (out / ".shardq").mkdir(parents=True)
    with FolderLock(out / ".shardq" / "lock"), pytest.raises(OutputLocked, match=f"pid {os.getpid()}"):
        shardq.quantize(checkpoint, output_dir=out, limits=one)
    shardq.quantize(checkpoint, output_dir=out, limits=one)


def test_weights_written_after_the_output_are_not_answered_for(
    make_checkpoint: Callable[..., Path], tmp_path: Path, one: Limits
) -> None:
    source, out = make_checkpoint(layers=1), tmp_path / "out"
    shardq.quantize(source, output_dir=out, limits=one)
    shard = next(source.glob("*.safetensors"))
    after = (out / "shardq.json").stat().st_mtime + 10
    os.utime(shard, (after, after))
    with pytest.raises(RecipeChanged, match=f"{shard.name} was written after it: use --restart"):
        shardq.quantize(source, output_dir=out, limits=one)
    assert not shardq.quantize(source, output_dir=out, limits=one, restart=True).already_done


@pytest.mark.usefixtures("sealed_alone")
def test_shard_changed_in_the_middle_of_a_run_is_done_again(
    make_checkpoint: Callable[..., Path], tmp_path: Path, contents: Contents, one: Limits, stop_after: Stop
) -> None:
    source, out = make_checkpoint(layers=3), tmp_path / "out"
    stop_after(source, out, len(task_shards(source)["model-00001-of-00003.safetensors"]) + 2)
    assert (out / ".shardq" / "ready" / "model-00001-of-00003.safetensors").exists()
    first = source / "model-00001-of-00003.safetensors"
    data = bytearray(first.read_bytes())
    data[-3000:] = bytes(3000)  # other weights under the same header
    first.write_bytes(data)
    shardq.quantize(source, output_dir=out, limits=one)
    shardq.quantize(source, output_dir=tmp_path / "fresh", limits=one)
    assert contents(out) == contents(tmp_path / "fresh")


def task_shards(source: Path) -> dict[str, list[int]]:
    """Task ids of each shard."""
    shards: dict[str, list[int]] = {}
    for task in shardq.plan(source).tasks:
        shards.setdefault(task.shard, []).append(task.id)
    return shards


def test_damaged_folder_of_another_recipe_is_not_made_over(checkpoint: Path, tmp_path: Path, one: Limits) -> None:
    out = tmp_path / "out"
    shardq.quantize(checkpoint, output_dir=out, limits=one)
    next(out.glob("*.safetensors")).unlink()
    with pytest.raises(RecipeChanged, match=r"recipe\.scheme"):
        shardq.quantize(checkpoint, "W8A16", output_dir=out, limits=one)
