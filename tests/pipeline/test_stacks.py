"""Stacks: experts that lie in several source shards and go into one tensor of one output file."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stopped_runs import stop_after

import shardq
from shardq import Limits, Progress
from shardq.errors import BudgetTooSmall, LayoutRefuses
from shardq.ledger import LEDGER, decode_ledger
from shardq.needs import disk_bytes, shard_costs
from shardq.onepass import OnePass

Contents = Callable[[Path], dict[str, str]]
EXPERTS, EXPERT = 4, re.compile(r"layers\.1\.mlp\.experts\.(\d)\.(\w+)_proj\.weight$")
STACK = "model.layers.1.mlp.switch_mlp"
REPO = "me/stacked"
ONE = Limits(parallel=1)


def by_projection(place: int, name: str) -> int:
    """Every stack is spread over three shards; the last expert comes first."""
    found = EXPERT.search(name)
    return 1 + (EXPERTS - 1 - int(found[1])) % 3 if found else 1 + place % 3


def by_expert(_: int, name: str) -> int:
    """A shard for each expert, which holds nothing else but for the first."""
    found = EXPERT.search(name)
    return 1 + int(found[1]) if found else 1


@pytest.fixture(params=[by_projection, by_expert])
def folder(request: pytest.FixtureRequest, tmp_path: Path, write_moe: Callable[..., Path]) -> Path:
    return write_moe(tmp_path / "source" / "model", request.param)


def test_experts_lie_in_the_order_of_their_numbers(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shardq.quantize(folder, "W4A16@mlx", output_dir=out, limits=ONE)
    assert shardq.verify(out, deep=True, source=folder).problems == ()
    tensors = {k: v for path in out.glob("*.safetensors") for k, v in load_file(path).items()}
    entries = decode_ledger((out / LEDGER).read_bytes())["tensors"]
    first = {p.name for p in out.glob("*00001*.safetensors")}
    for projection in ("gate", "up", "down"):
        stack = tensors[f"{STACK}.{projection}_proj.weight"]
        assert stack.shape[0] == EXPERTS
        for number in range(EXPERTS):
            module = f"model.layers.1.mlp.experts.{number}.{projection}_proj"
            single = tmp_path / f"{number}{projection}"
            alone = only(folder, tmp_path / f"source{number}{projection}", module)
            shardq.quantize(alone, "W4A16@mlx", output_dir=single, limits=ONE)
            own = load_file(single / "model.safetensors")
            assert torch.equal(stack[number], own["model.layers.0.mlp.up_proj.weight"])
            assert {entries[f"{module}.weight"]["file"]} == first
    shards = {p.name for p in folder.glob("*.safetensors")}
    assert {p.name for p in out.glob("*.safetensors")} == (shards if "00003" in max(shards)[:12] else first)


def only(folder: Path, alone: Path, module: str) -> Path:
    """A checkpoint with one matrix of another."""
    from safetensors.torch import save_file

    alone.mkdir()
    weight = next(t[name] for path in folder.glob("*.safetensors") for t in [load_file(path)] for name in t
                  if name == f"{module}.weight")  # fmt: skip
    save_file({"model.layers.0.mlp.up_proj.weight": weight}, alone / "model.safetensors")
    (alone / "config.json").write_bytes((folder / "config.json").read_bytes())
    return alone


@pytest.mark.parametrize(
    ("folder", "scheme"), [(by_projection, "W4A16@mlx"), (by_expert, "NVFP4A16@mlx")], indirect=["folder"]
)
def test_same_bytes_in_every_mode_and_after_every_stop(
    folder: Path, make_model: Callable[[Path], Any], tmp_path: Path, contents: Contents, scheme: str, short_spans: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shardq.quantize(folder, scheme, output_dir=tmp_path / "one", limits=ONE)
    expected = contents(tmp_path / "one")
    weights = {n: h for n, h in expected.items() if n.endswith(".safetensors")}
    shardq.quantize(folder, scheme, output_dir=tmp_path / "two", limits=Limits(parallel=2))
    assert contents(tmp_path / "two") == expected
    tasks = len(shardq.plan(folder, scheme).tasks)
    for number in (3, tasks - 1):
        out = tmp_path / f"out{number}"
        with pytest.raises(KeyboardInterrupt):
            shardq.quantize(folder, scheme, output_dir=out, limits=ONE, report=stop_after(number))
        shardq.quantize(folder, scheme, output_dir=out, limits=ONE)
        assert contents(out) == expected
    model = make_model(folder)
    monkeypatch.setattr("shardq.opening.open_source", lambda *_, **__: model.open())
    for stream in (False, True):
        for number in (tasks // 2, tasks - 1):
            out, limits = tmp_path / f"hub{stream}{number}", Limits(parallel=1, stream=stream)
            with pytest.raises(KeyboardInterrupt):
                shardq.quantize("org/model", scheme, output_dir=out, limits=limits, report=stop_after(number))
            shardq.quantize("org/model", scheme, output_dir=out, limits=limits)
            assert {n: h for n, h in contents(out).items() if n in weights} == weights, (stream, number)


@pytest.mark.parametrize("folder", [by_projection], indirect=True)
def test_killed_run_goes_on(
    folder: Path, tmp_path: Path, contents: Contents, begin: Callable[..., Any],
    journal_lines: Callable[[Path, str], int],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    shardq.quantize(folder, "W4A16@mlx", output_dir=tmp_path / "whole", limits=ONE)
    for tasks in (4, 16):
        run = begin(folder, out, 0.03, "--scheme", "W4A16@mlx")
        assert run.wait_for(lambda tasks=tasks: journal_lines(out, "task") > tasks)
        run.kill_group()
        assert not (out / "config.json").exists()
    shardq.quantize(folder, "W4A16@mlx", output_dir=out, limits=Limits(parallel=2))
    assert contents(out) == contents(tmp_path / "whole")


def test_an_expert_left_out_is_refused(folder: Path, tmp_path: Path) -> None:
    ignored = r"re:.*layers\.1\.mlp\.experts\.2\..*"
    with pytest.raises(LayoutRefuses, match=rf"{STACK}\.\w+_proj needs all 4 experts, 3 are to be quantized"):
        shardq.quantize(folder, shardq.make_recipe("W4A16@mlx", ignore=[ignored]), output_dir=tmp_path / "out")
    rule = {r"re:.*layers\.1\.mlp\.experts\.2\..*": {"bits": 8}}
    with pytest.raises(LayoutRefuses, match=rf"{STACK}\.\w+_proj is a stack of 4 matrices .* 2 kinds"):
        shardq.quantize(folder, shardq.make_recipe("W4A16@mlx", layer_config=rule), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("spread", [by_projection, by_expert])
def test_disk_stays_below_the_least_cap(
    push_hub: Any, host_model: Callable[[Path], str], write_moe: Callable[..., Path], tmp_path: Path,
    spread: Callable[[int, str], int], stream: bool, measures: Any
) -> None:  # fmt: skip
    """A shard waits for the others of its stacks."""
    folder = write_moe(tmp_path / "wide" / "model", spread, hidden=512)
    source, out, peak = host_model(folder), tmp_path / "out", 0
    work = OnePass((shardq.plan(source, "W8A16@mlx"),))
    assert max(c.hold for c in shard_costs(work, staged=True)) >= 2
    cap = disk_bytes(work, staged=not stream, uploads=True)

    def look(_: Progress) -> None:
        nonlocal peak
        peak = max(peak, measures.used_bytes(out))

    def run(cap: int) -> None:
        limits = Limits(parallel=1, max_disk_bytes=cap, stream=stream)
        shardq.quantize(source, "W8A16@mlx", output_dir=out, limits=limits, push_to=REPO, report=look)

    with pytest.raises(BudgetTooSmall, match="--max-disk"):
        run(cap - 1)
    run(cap)
    assert cap * 0.6 < peak <= cap
    shardq.quantize(source, "W8A16@mlx", output_dir=tmp_path / "local", limits=ONE)
    there = {n: d for n, d in push_hub.files(REPO).items() if n != ".gitattributes"}
    assert there == {p.name: p.read_bytes() for p in (tmp_path / "local").iterdir()}
