"""Four workers of one job, eight of them killed: the output is that of one machine, and each file appears once."""

import random
from collections.abc import Callable
from pathlib import Path

import job_workers as processes
import pytest

import shardq
from shardq import Limits

KILLS = 8
PART_BYTES = 24 << 10
ONE = Limits(parallel=1)
Contents = Callable[[Path], dict[str, str]]


def check_killed(
    source: Path, words: list[str], expected: dict[str, str], tmp_path: Path, contents: Contents, slow_s: float
) -> None:
    job = tmp_path / "job"
    watch = processes.Watch(job)
    watch.start()
    with processes.Workers(job, [str(source), *words], slow_s) as workers:
        for number in range(4):
            workers.start("--worker", f"{number}/4")
        killed = workers.kill_some(KILLS, random.Random(5), job / "complete.json", (0.4, 0.7))
        workers.finish()
    watch.end()
    assert killed == KILLS, "the job was complete before all kills: make it slower"
    assert contents(job / "output") == expected
    published = {name: len(inodes) for name, inodes in watch.seen.items()}
    assert published == dict.fromkeys((n for n in expected if n.endswith((".safetensors", ".gguf"))), 1)
    assert not (job / "work").exists()


def test_integers(make_checkpoint: Callable[..., Path], tmp_path: Path, contents: Contents) -> None:
    source = make_checkpoint(layers=12)
    shardq.quantize(source, output_dir=tmp_path / "alone", limits=ONE)
    check_killed(source, ["--scheme", "W4A16"], contents(tmp_path / "alone"), tmp_path, contents, 0.15)


def test_scales_that_files_share(write_moe: Callable[..., Path], tmp_path: Path, contents: Contents) -> None:
    """Every file needs magnitudes of several shards."""
    source = write_moe(tmp_path / "source" / "model", lambda place, _: 1 + place % 6)
    shardq.quantize(source, "NVFP4A16", output_dir=tmp_path / "alone", limits=ONE)
    assert max(len(f.shards) for f in shardq.plan(source, "NVFP4A16").files) > 1
    check_killed(source, ["--scheme", "NVFP4A16"], contents(tmp_path / "alone"), tmp_path, contents, 0.25)


def test_parts_of_gguf(tmp_path: Path, contents: Contents) -> None:
    """Every part needs several shards, and some tensors go into two parts."""
    pytest.importorskip("gguf", reason="names of GGUF tensors come from the package gguf")
    pytest.importorskip("tokenizers", reason="vocabularies are read with the package tokenizers")
    import gguf_sources as made

    source, recipe = made.write("latent", tmp_path), made.recipe("latent", PART_BYTES)
    shardq.quantize(source, recipe, output_dir=tmp_path / "alone", limits=ONE)
    plan = shardq.plan(source, recipe)
    assert len(plan.files) > 4
    assert max(len(t.files) for t in plan.tasks) > 1
    words = ["--scheme", "gguf:q4_k_m", "--split-max-size", f"{PART_BYTES}B"]
    words += ["--tokenizer-pre", recipe.gguf.tokenizer_pre]
    check_killed(source, words, contents(tmp_path / "alone"), tmp_path, contents, 0.18)
