"""Audits of real outputs: what was not touched passes, and any single flipped bit is found."""

import hashlib
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from weight_files import flip, tensors_of

import shardq
from shardq import Audit, Limits, make_recipe
from shardq.audit_plan import span
from shardq.audit_statement import make_statement
from shardq.errors import BadOption, VerifyFailed
from shardq.files.safetensors import TensorSpec, plan_file, read_header
from shardq.layouts import LAYOUTS

MakeCheckpoint = Callable[..., Path]
MIXED = {"re:.*down_proj": {"bits": 8}, "re:.*o_proj": {"group_size": 32}}
RECIPES: dict[str, dict[str, Any]] = {
    "W2A16": {},
    "W3A16": {},
    "W4A16": {},
    "W4A16 mixed": {"layer_config": MIXED, "quant_lm_head": True},
    "W8A16": {"group_size": -1},
    "W4A16 asym": {"symmetric": False, "group_size": 32},
    "W8A16 asym": {"symmetric": False},
    "FP8_BLOCK": {},
    "MXFP8": {},
    "MXFP4": {},
    "NVFP4A16": {},
    "FP8_TENSOR": {},
}
INTEGERS: Final = tuple(name for name in RECIPES if name.startswith("W"))
HELD: Final = {  # what each layout takes of these
    "auto_round": INTEGERS,
    "gptq": INTEGERS,
    "awq": ("W4A16", "W4A16 asym"),
    "compressed-tensors": (*INTEGERS, "NVFP4A16", "FP8_TENSOR"),
    "fp8": ("FP8_BLOCK", "MXFP8"),
    "mlx": ("W4A16", "MXFP4"),
    "fake": ("W4A16", "MXFP4"),
}
FAR: Final = ("NVFP4A16", "FP8_TENSOR")  # have a scale of more than a group
FLIPPED: Final = ("W4A16", "W4A16 asym", "W3A16", "FP8_BLOCK", "MXFP8", "MXFP4", *FAR)
PAIRS: Final = [(name, layout) for layout, names in HELD.items() for name in names]
each_pair = pytest.mark.parametrize(("name", "layout"), PAIRS)
each_layout = pytest.mark.parametrize(("name", "layout"), [(n, x) for n, x in PAIRS if n in ("W4A16", "MXFP8", *FAR)])


def quantize(source: Path | str, out: Path, name: str = "W4A16", layout: str = "auto_round") -> Path:
    recipe = make_recipe(name.partition(" ")[0], layout=layout, **RECIPES[name])
    shardq.quantize(source, recipe, output_dir=out, limits=Limits(parallel=1))
    return out


def audit_blocks(out: Path, source: Path, share: float, seed: int | None = None) -> Audit:
    """An audit of all tensors that may read no more than this share of what it would read without a limit."""
    traffic = shardq.audit(out, source=source, max_traffic_bytes=None, dry_run=True).traffic
    weights_bytes = int(share * (traffic.total_bytes - traffic.header_bytes))
    return shardq.audit(out, source=source, seed=seed, max_traffic_bytes=traffic.header_bytes + weights_bytes)


@pytest.fixture
def write_split() -> Callable[[Path], Path]:
    """write_split(folder): gate and up of one layer, in two shards."""

    def write(folder: Path) -> Path:
        folder.mkdir()
        rng, weight_map = np.random.default_rng(2), {}
        for number, part in enumerate(("gate_proj", "up_proj"), start=1):
            name, file = f"model.layers.0.mlp.{part}.weight", f"model-{number:05d}-of-00002.safetensors"
            planned = plan_file([TensorSpec(name, "F32", (384, 128))])
            weights = rng.standard_normal((384, 128), np.float32) * np.float32(number)
            (folder / file).write_bytes(planned.header + weights.tobytes())
            weight_map[name] = file
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
        return folder

    return write


def test_layouts_are_all_here() -> None:
    """Other packings of auto_round and gptq_v2 are what others write, under another name."""
    assert HELD.keys() == {x.name for x in LAYOUTS if ":" not in x.name} - {"gptq_v2"}


KINDS: Final = {
    "auto_round": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_scale",),
    "W4A16@compressed-tensors": ("weight_packed", "weight_shape"),
    "W3A16@compressed-tensors": ("weight_packed", "weight_shape"),
    "W4A16 asym@compressed-tensors": ("weight_packed", "weight_shape", "weight_zero_point"),
    "NVFP4A16@compressed-tensors": ("weight_packed", "weight_global_scale"),
    "fp8": ("weight_scale_inv",),
    "mlx": ("scales",),
    "W4A16@mlx": ("biases",),
    "fake": (),
}


@each_pair
def test_untouched_output_passes_whole_and_in_blocks(checkpoint: Path, tmp_path: Path, name: str, layout: str) -> None:
    out = quantize(checkpoint, tmp_path / "out", name, layout)
    audit = shardq.audit(out, source=checkpoint)
    assert audit.problems == ()
    assert len(audit.tensors) == audit.tensors_in_ledger == 27
    assert all(t.check.whole for t in audit.tensors)
    held_bytes = sum(t.end - t.begin for _, t in tensors_of(out))
    assert sum(t.bytes_compared for t in audit.tensors) == held_bytes
    for share in (0.8,) if name == "FP8_BLOCK" else (0.35, 0.5, 0.8):  # no block has less than 128 rows
        audit = audit_blocks(out, checkpoint, share)
        assert audit.problems == ()
        assert sum(not t.check.whole for t in audit.tensors) > 5
        assert all(t.bytes_compared > 0 for t in audit.tensors)


@pytest.mark.parametrize(("name", "layout"), [(n, x) for n, x in PAIRS if n in FLIPPED])
def test_one_flipped_bit_in_any_tensor_is_found(checkpoint: Path, tmp_path: Path, name: str, layout: str) -> None:
    out = quantize(checkpoint, tmp_path / "out", name, layout)
    rng = random.Random(f"{name} {layout}")
    seen: set[str] = set()
    for path, t in tensors_of(out):
        at, bit = rng.randrange(t.begin, t.end), rng.randrange(8)
        flip(path, at, bit)
        (problem,) = shardq.audit(out, source=checkpoint).problems
        assert problem.startswith(f"{t.name} in {path.name} differs at byte {at} of the file: expected 0x")
        flip(path, at, bit)
        seen.add(t.name.rpartition(".")[2])
    assert seen == {"weight", *KINDS[layout], *KINDS.get(f"{name}@{layout}", ())}
    assert shardq.audit(out, source=checkpoint).problems == ()


def test_one_flipped_bit_in_a_stack_is_found(tmp_path: Path) -> None:
    """Its slices are audited one by one."""
    shardq.quantize("demo", "W4A16@mlx", output_dir=tmp_path / "out", limits=Limits(parallel=1))
    rng = random.Random(5)
    names: set[str] = set()
    for path, t in tensors_of(tmp_path / "out"):
        if "layers.2.mlp.switch_mlp" not in t.name:
            continue
        at = rng.randrange(t.begin, t.end)
        flip(path, at, 3)
        audit = shardq.audit(tmp_path / "out", source="demo")
        flip(path, at, 3)
        (problem,) = audit.problems
        assert problem.startswith(f"{t.name} in {path.name} differs at byte {at} of the file: expected 0x")
        (found,) = (x.check.subject.name for x in audit.tensors if x.problem)
        assert f".experts.{(at - t.begin) * 4 // (t.end - t.begin)}." in found
        names.add(t.name.partition("switch_mlp.")[2])
    assert names == {f"{p}_proj.{leaf}" for p in ("gate", "up", "down") for leaf in ("weight", "scales", "biases")}
    assert shardq.audit(tmp_path / "out", source="demo").problems == ()


@pytest.mark.parametrize("name", FAR)
def test_scales_are_derived_from_all_that_they_reach_and_taken_where_that_is_too_much(
    tmp_path: Path, name: str, write_split: Callable[[Path], Path]
) -> None:
    """Where a group lies in two shards, the header of the second is read for it, and no tensor of it is compared."""
    source, out = write_split(tmp_path / "source"), tmp_path / "out"
    shardq.quantize(source, f"{name}@compressed-tensors", output_dir=out, limits=Limits(parallel=1))
    everything = shardq.audit(out, source=source, max_traffic_bytes=None)
    assert everything.problems == ()
    assert everything.traffic == shardq.audit(out, source=source, max_traffic_bytes=None, dry_run=True).traffic
    sizes = [t.end - t.begin for p in source.glob("*.safetensors") for t in read_header(p).tensors]
    assert everything.traffic.source_bytes == 2 * sum(sizes)  # once for magnitudes, once to derive
    assert {t["scale"] for t in make_statement(everything)["tensors"]} == {"derived"}
    one = shardq.audit(out, source=source, sample=1, seed=0)
    (found,) = one.tensors
    assert one.problems == ()
    shards = {t.shard for t in found.check.measured}
    assert len(shards) == (2 if name == "NVFP4A16" else 1)
    assert one.traffic.source_bytes == (1 + len(shards)) * sizes[0]
    records = ("shardq.json", "shardq-ledger.json.zst", "config.json")
    headers_bytes = sum(min(1 << 18, (source / n).stat().st_size) for n in shards)
    headers_bytes += min(1 << 18, (out / found.check.subject.file).stat().st_size)
    assert one.traffic.header_bytes == headers_bytes + sum((out / n).stat().st_size for n in records)
    taken = audit_blocks(out, source, 0.3)
    assert taken.problems == ()
    assert {t["scale"] for t in make_statement(taken)["tensors"]} == {"taken"}
    assert taken.traffic.total_bytes < everything.traffic.total_bytes


@each_layout
def test_block_finds_what_its_statement_says_that_it_compared(
    checkpoint: Path, tmp_path: Path, name: str, layout: str
) -> None:
    """Flips anywhere in a tensor are found exactly where the block has them."""
    out = quantize(checkpoint, tmp_path / "out", name, layout)
    rng = random.Random(f"{name} {layout}")
    found = missed = 0
    for seed in range(8):
        audit = audit_blocks(out, checkpoint, 0.3, seed)
        s, cut = rng.choice([(t.check.subject, t.check.cut) for t in audit.tensors if not t.check.whole])
        d = rng.choice([d for d in s.outputs if d.spec.slab_axis is not None])
        begin, end = (i - d.begin for i in span(d, s, cut))
        left, right = 0, d.line_bytes
        if d.spec.slab_axis == 1:  # of the lines that were read, what the rows became
            left, right = (i * d.line_bytes // d.spec.shape[1] for i in d.spec.slab_range(cut.row, cut.end_row))
        at = d.begin + rng.randrange(d.size_bytes)
        if seed % 2:
            at = d.begin + rng.randrange(begin, end) // d.line_bytes * d.line_bytes + rng.randrange(left, right)
        inside = begin <= at - d.begin < end and left <= (at - d.begin) % d.line_bytes < right
        flip(out / s.file, at, 0)
        problems = audit_blocks(out, checkpoint, 0.3, seed).problems
        assert bool(problems) == inside
        assert not inside or f"at byte {at} of the file" in problems[0]
        flip(out / s.file, at, 0)
        found, missed = found + inside, missed + (not inside)
    assert found >= 4
    assert missed


@each_layout
def test_tensor_that_was_quantized_in_slabs_passes(
    checkpoint: Path, tmp_path: Path, name: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardq.cut.SLAB_BYTES", 16 << 10)
    monkeypatch.setattr("shardq.cut.ROWS", 32)
    monkeypatch.setattr("shardq.audit_plan.WINDOW_BYTES", 24 << 10)
    out = quantize(checkpoint, tmp_path / "out", name, layout)
    audit = shardq.audit(out, source=checkpoint)
    assert audit.problems == ()
    assert max(len(t.check.windows) for t in audit.tensors) > 5
    assert shardq.verify(out, deep=True, source=checkpoint).problems == ()
    path, last = list(tensors_of(out))[-1]
    flip(path, last.end - 1, 7)
    assert len(shardq.audit(out, source=checkpoint).problems) == 1


def test_other_weights_and_other_figures_are_found(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    out = quantize(source, tmp_path / "out")
    shard = source / "model-00002-of-00003.safetensors"
    tensor = next(t for t in read_header(shard).tensors if t.name.endswith("up_proj.weight"))
    flip(shard, tensor.begin + 1, 6)  # a larger exponent; the header stays as it was
    (problem,) = shardq.audit(out, source=source).problems
    assert problem.startswith("model.layers.1.mlp.up_proj.")
    flip(shard, tensor.begin + 1, 6)
    shard.write_bytes(shard.read_bytes()[: tensor.begin] + b"\xff" * 2 + shard.read_bytes()[tensor.begin + 2 :])
    (problem,) = shardq.audit(out, source=source).problems
    assert "cannot be quantized" in problem


def test_ledger_with_better_figures_is_found(checkpoint: Path, tmp_path: Path) -> None:
    from shardq.ledger import LEDGER, decode_ledger, encode_ledger

    out = quantize(checkpoint, tmp_path / "out")
    ledger = decode_ledger((out / LEDGER).read_bytes())
    entry = ledger["tensors"]["model.layers.1.self_attn.k_proj.weight"]
    entry["squared_error"] *= 0.999
    (out / LEDGER).write_bytes(encode_ledger(ledger))
    (problem,) = shardq.audit(out, source=checkpoint).problems
    assert problem.startswith("model.layers.1.self_attn.k_proj.weight: squared_error is")


def test_same_seed_makes_the_same_statement(checkpoint: Path, tmp_path: Path) -> None:
    out = quantize(checkpoint, tmp_path / "out")
    one, two, other = (make_statement(shardq.audit(out, source=checkpoint, sample=9, seed=s)) for s in (1, 1, 2))
    assert one == two
    assert [t["name"] for t in one["tensors"]] != [t["name"] for t in other["tensors"]]
    assert one["verdict"] == "equal"
    assert one["fingerprint"] == json.loads((out / "shardq.json").read_text())["fingerprint"]
    assert one["recipe"]["layout"] == "auto_round"
    assert str(tmp_path) not in json.dumps(one)


def test_audit_that_cannot_be_made_is_refused(
    checkpoint: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    out = quantize(checkpoint, tmp_path / "out")
    with pytest.raises(BadOption, match="is not what"):
        shardq.audit(out, source=make_checkpoint(hidden=64))
    with pytest.raises(BadOption, match="which is no repo"):
        shardq.audit(out)
    with pytest.raises(BadOption, match="--sample 0"):
        shardq.audit(out, source=checkpoint, sample=0)
    records = out / "shardq.json"
    text = records.read_text()
    records.write_text(re.sub(r'"numerics": \d+', '"numerics": 0', text))
    with pytest.raises(VerifyFailed, match="made with numerics 0"):
        shardq.audit(out, source=checkpoint)
    records.write_text(text)
    (out / ".shardq").mkdir()
    with pytest.raises(VerifyFailed, match="unfinished"):
        shardq.audit(out, source=checkpoint)


# --- over the network ------------------------------------------------------------------------------------------------


@pytest.fixture
def repos(
    hub: Any, make_checkpoint: MakeCheckpoint, tmp_path: Path, fake_hub_module: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, str]:
    """org/model, whose main branch has moved on, and org/model-W4A16, which was made of it. Their commits."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    hub.repos["org/model"] = source = fake_hub_module.Repo()
    commit = source.commit({p.name: p.read_bytes() for p in make_checkpoint().iterdir()})
    out = quantize("org/model", tmp_path / "out")
    source.commit({"config.json": b"{}", "other.safetensors": b"x"})
    hub.repos["org/model-W4A16"] = result = fake_hub_module.Repo()
    return commit, result.commit({p.name: p.read_bytes() for p in out.iterdir()})


def wire_bytes(hub: Any) -> int:
    """Bytes of the answers that came from storage."""
    files = (data for repo in hub.repos.values() for tree in repo.commits.values() for data in tree.values())
    sizes = {hashlib.sha256(data).hexdigest(): len(data) for data in files}
    total = 0
    for seen in hub.seen("/store/"):
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", seen.range or "")
        whole_bytes = sizes[seen.path.removeprefix("/store/").partition("?")[0]]
        total += int(found[2]) + 1 - int(found[1]) if found else whole_bytes
    return total


def test_both_sides_are_read_from_the_hub_and_no_more_than_planned(hub: Any, repos: tuple[str, str]) -> None:
    planned = shardq.audit("org/model-W4A16", sample=9, dry_run=True).traffic
    hub.log.clear()
    audit = shardq.audit("org/model-W4A16", sample=9)
    assert audit.problems == ()
    assert (audit.source, audit.source_commit) == ("org/model", repos[0])
    assert (audit.result_label, audit.result_commit) == ("org/model-W4A16", repos[1])
    assert audit.traffic == planned
    files = hub.repos["org/model-W4A16"].commits[repos[1]]
    records_bytes = sum(len(files[n]) for n in ("shardq.json", "shardq-ledger.json.zst", "config.json"))
    assert wire_bytes(hub) == planned.total_bytes - records_bytes
    limit_bytes = planned.header_bytes + 200_000
    hub.log.clear()
    assert shardq.audit("org/model-W4A16", sample=9, max_traffic_bytes=limit_bytes).problems == ()
    assert wire_bytes(hub) < limit_bytes - records_bytes


def test_flipped_bit_on_the_hub_is_found(hub: Any, repos: tuple[str, str]) -> None:
    repo = hub.repos["org/model-W4A16"]
    files = dict(repo.commits[repos[1]])
    name = "model-00001-of-00003.safetensors"
    data = bytearray(files[name])
    data[-1000] ^= 4
    files[name] = bytes(data)
    repo.commit(files)
    (problem,) = shardq.audit("org/model-W4A16").problems
    assert f"in {name} differs at byte {len(data) - 1000} of the file" in problem
    assert shardq.audit(f"org/model-W4A16@{repos[1]}").problems == ()


def test_source_at_another_commit_is_refused(hub: Any, repos: tuple[str, str]) -> None:
    with pytest.raises(BadOption, match=f"give --source org/model@{repos[0]}"):
        shardq.audit("org/model-W4A16", source="org/model@main")
    assert shardq.audit("org/model-W4A16", source="hf://org/model").source_commit == repos[0]


# --- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys, shardq
from shardq.kernels import load
load()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
limit = None if sys.argv[3] == "none" else int(sys.argv[3])
audit = shardq.audit(sys.argv[1], source=sys.argv[2], max_traffic_bytes=limit)
assert audit.problems == (), audit.problems
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10, sum(t.bytes_compared for t in audit.tensors))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit")
def test_tensor_of_1_gb_costs_a_fraction_of_it_in_memory(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    planned = plan_file([TensorSpec("model.layers.0.mlp.up_proj.weight", "BF16", (65536, 8192))])
    with (source / "model.safetensors").open("wb") as f:
        f.write(planned.header)
        f.truncate(planned.size_bytes)  # zeros that take no disk
    (source / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    out = quantize(source, tmp_path / "out")
    packed_bytes = (out / "model.safetensors").stat().st_size
    for limit, most_bytes in (("40000000", 120_000_000), ("none", packed_bytes + 100_000_000)):
        command = [sys.executable, "-P", "-c", PEAK, str(out), str(source), limit]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        grown_bytes, compared_bytes = map(int, done.stdout.split())
        assert grown_bytes < most_bytes
        assert compared_bytes > (300_000 if limit != "none" else packed_bytes * 0.99)
