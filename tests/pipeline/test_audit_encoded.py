"""Audits of outputs whose source has its weights encoded, or in stacks: they are decoded again."""

import json
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import encoded_sources as sources
import pytest
from weight_files import flip, tensors_of

import shardq
from shardq import Audit, Limits, make_recipe
from shardq.audit_plan import span
from shardq.audit_statement import make_statement
from shardq.errors import BadOption, VerifyFailed
from shardq.ledger import LEDGER, decode_ledger, encode_ledger

CASES: Mapping[str, Any] = sources.CASES
KEPT = r"re:.*layers\.1\.mlp.*"
RUNS: dict[str, tuple[str, list[str]]] = {  # scheme, and what is kept
    "fp8_block": ("W4A16G32@gptq", [KEPT]),
    "fp8_block_ct": ("W8A16@compressed-tensors", [KEPT]),
    "gptq_v2": ("W8A16G64@compressed-tensors", [KEPT]),
    "gptq_act_order": ("W4A16G64@gptq", [KEPT]),
    "awq": ("W8A16G32", [KEPT]),
    "bnb4_nested": ("W4A16G64@gptq", [KEPT]),
    "gpt_oss": ("W4A16G32", [KEPT]),
    "gpt_oss_bf16": ("W4A16G32@compressed-tensors", [KEPT, r"re:.*layers\.0\.mlp\.experts\.1\..*"]),
    "qwen3_vl_moe": ("W4A16G32@gptq", []),
    "mlx_switch": ("W4A16@mlx", [KEPT]),
}
FAR = ("NVFP4A16@compressed-tensors", "FP8_TENSOR@compressed-tensors")  # a scale of more than a group
each_case = pytest.mark.parametrize("case", CASES)
each_run = pytest.mark.parametrize("case", RUNS)
each_mode = pytest.mark.parametrize("decode", ["exact", "rounded"])
far = pytest.mark.parametrize("scheme", FAR)


def quantize(case: str, source: Path, out: Path, decode: str = "exact", scheme: str = "") -> Path:
    own, ignore = RUNS.get(case, ("W4A16G32@gptq", []))
    recipe = make_recipe(scheme or own, decode=decode, ragged="keep", ignore=ignore)
    shardq.quantize(source, recipe, output_dir=out, limits=Limits(parallel=1))
    return out


def audit_blocks(out: Path, source: Path, share: float, seed: int | None = None) -> Audit:
    """An audit of all tensors that may read no more than this share of what it would read without a limit."""
    traffic = shardq.audit(out, source=source, max_traffic_bytes=None, dry_run=True).traffic
    limit_bytes = traffic.header_bytes + int(share * (traffic.total_bytes - traffic.header_bytes))
    audit = shardq.audit(out, source=source, seed=seed, max_traffic_bytes=limit_bytes)
    assert audit.traffic.total_bytes < limit_bytes
    return audit


@each_case
@each_mode
def test_output_of_each_kind_is_derived_again(
    case: str, decode: str, written: Callable[[str], Path], tmp_path: Path
) -> None:
    source = written(case)
    out = quantize(case, source, tmp_path / "out", decode)
    audit = shardq.audit(out, source=source)
    assert audit.problems == ()
    assert all(t.check.whole for t in audit.tensors)
    held_bytes = sum(t.end - t.begin for _, t in tensors_of(out))
    assert sum(t.bytes_compared for t in audit.tensors) == held_bytes
    assert audit.traffic == shardq.audit(out, source=source, dry_run=True).traffic


@each_run
@each_mode
def test_blocks_are_derived_again_within_the_limit(
    case: str, decode: str, written: Callable[[str], Path], tmp_path: Path
) -> None:
    source = written(case)
    out = quantize(case, source, tmp_path / "out", decode)
    made = 0
    for share in (0.3, 0.5, 0.7, 0.9):
        for seed in (1, 2):
            try:
                audit = audit_blocks(out, source, share, seed)
            except BadOption:  # columns that share a scale are a large part of such small matrices
                continue
            assert audit.problems == ()
            assert all(t.bytes_compared > 0 for t in audit.tensors)
            made += sum(not t.check.whole for t in audit.tensors) > 5
    assert made >= 4


@each_run
@each_mode
def test_one_flipped_bit_in_any_tensor_is_found(
    case: str, decode: str, written: Callable[[str], Path], tmp_path: Path
) -> None:
    source = written(case)
    out = quantize(case, source, tmp_path / "out", decode)
    rng = random.Random(case + decode)
    for path, t in tensors_of(out):
        at, bit = rng.randrange(t.begin, t.end), rng.randrange(8)
        flip(path, at, bit)
        (problem,) = shardq.audit(out, source=source).problems
        assert problem.startswith(f"{t.name} in {path.name} differs at byte {at} of the file: expected 0x")
        flip(path, at, bit)
    assert shardq.audit(out, source=source).problems == ()


@each_run
def test_block_finds_what_its_statement_says_that_it_compared(
    case: str, written: Callable[[str], Path], tmp_path: Path
) -> None:
    """Rows and columns of the block alone: whatever of a matrix was read to decode them."""
    source = written(case)
    out = quantize(case, source, tmp_path / "out")
    rng = random.Random(case)
    inside = outside = 0
    for seed in range(24):
        audit = audit_blocks(out, source, 0.85 if case in ("qwen3_vl_moe", "gpt_oss_bf16") else 0.65, seed)
        s, cut = rng.choice([(t.check.subject, t.check.cut) for t in audit.tensors if not t.check.whole])
        d = rng.choice([d for d in s.outputs if d.spec.slab_axis is not None])
        begin, end = (i - d.begin for i in span(d, s, cut))
        left, right = 0, d.line_bytes
        item_bytes = d.line_bytes // (d.spec.shape[1] if len(d.spec.shape) > 1 else 1)
        if d.spec.slab_axis == 1:  # of the lines that were read, what the rows became
            left, right = (i * item_bytes for i in d.spec.slab_range(cut.row, cut.end_row))
        elif s.is_strided:  # of the rows that were read, what the columns became
            left, right = (i * d.spec.shape[1] // s.columns * item_bytes for i in (cut.column, cut.end_column))
        at = d.begin + rng.randrange(d.size_bytes)
        if seed % 2:
            at = d.begin + rng.randrange(begin, end) // d.line_bytes * d.line_bytes + rng.randrange(left, right)
        within = begin <= at - d.begin < end and left <= (at - d.begin) % d.line_bytes < right
        flip(out / s.file, at, 0)
        problems = shardq.audit(out, source=source, seed=seed, max_traffic_bytes=audit.max_traffic_bytes).problems
        flip(out / s.file, at, 0)
        assert bool(problems) == within
        assert not within or f"at byte {at} of the file" in problems[0]
        inside, outside = inside + within, outside + (not within)
    assert inside >= 12
    assert outside


@far
@pytest.mark.parametrize("case", ["fp8_block", "gptq_act_order", "qwen3_vl_moe", "gpt_oss"])
@each_mode
def test_scales_beyond_groups_are_derived_and_taken(
    case: str, scheme: str, decode: str, written: Callable[[str], Path], tmp_path: Path
) -> None:
    source = written(case)
    out = quantize(case, source, tmp_path / "out", decode, scheme)
    everything = shardq.audit(out, source=source, max_traffic_bytes=None)
    assert everything.problems == ()
    assert everything.traffic == shardq.audit(out, source=source, max_traffic_bytes=None, dry_run=True).traffic
    assert shardq.verify(out, deep=True, source=source).problems == ()
    scales = [t.get("scale") for t in make_statement(everything)["tensors"] if "scheme" in t]
    assert set(scales) == {"derived"}
    for path, t in tensors_of(out):
        if t.name.endswith(("weight_global_scale", "_proj.weight_scale")):
            flip(path, t.begin + 1, 0)
            (problem,) = shardq.audit(out, source=source).problems
            assert problem.startswith(f"{t.name} in {path.name} differs")
            flip(path, t.begin + 1, 0)
    seen = set()
    for share in (0.35, 0.5, 0.6):
        audit = audit_blocks(out, source, share)
        assert audit.problems == ()
        seen |= {t.get("scale") for t in make_statement(audit)["tensors"]}
    assert "taken" in seen


def test_statement_tells_what_was_decoded(written: Callable[[str], Path], tmp_path: Path) -> None:
    source = written("gpt_oss")
    out = quantize("gpt_oss", source, tmp_path / "out")
    one, two = (make_statement(shardq.audit(out, source=source, sample=30, seed=4)) for _ in range(2))
    assert one == two
    assert one["verdict"] == "equal"
    found = {t["name"]: t for t in make_statement(shardq.audit(out, source=source))["tensors"]}
    stack = found["model.layers.1.mlp.experts.gate_up_proj"]
    assert (stack["outcome"], stack["slices"], stack["rows"], stack["columns"]) == ("decoded", 3, [0, 512], [0, 128])
    assert {t["outcome"] for t in found.values()} == {"decoded", "copied", "quantized"}


@each_run
def test_matrix_that_is_read_in_many_windows_passes(
    case: str, written: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardq.cut.SLAB_BYTES", 16 << 10)
    monkeypatch.setattr("shardq.cut.ROWS", 64)
    for module in ("audit_plan", "source_rows", "against_source"):
        monkeypatch.setattr(f"shardq.{module}.WINDOW_BYTES", 9 << 10)
    source = written(case)
    out = quantize(case, source, tmp_path / "out")
    audit = shardq.audit(out, source=source)
    assert audit.problems == ()
    assert audit.traffic == shardq.audit(out, source=source, dry_run=True).traffic
    assert max(len(t.check.windows) for t in audit.tensors) > 5
    assert shardq.verify(out, deep=True, source=source).problems == ()


# --- over the network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["bnb4_nested", "gpt_oss", "gptq_v2"])
def test_both_sides_are_read_from_the_hub_and_no_more_than_planned(
    case: str, hub: Any, fake_hub_module: Any, tmp_path: Path, written: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also what the content of small tensors says of shapes."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    hub.repos["org/model"] = fake_hub_module.Repo()
    hub.repos["org/model"].commit({p.name: p.read_bytes() for p in written(case).iterdir()})
    scheme, ignore = RUNS[case]
    out = tmp_path / "out"
    shardq.quantize("org/model", make_recipe(scheme, ignore=ignore), output_dir=out, limits=Limits(parallel=1))
    hub.repos["org/result"] = fake_hub_module.Repo()
    hub.repos["org/result"].commit({p.name: p.read_bytes() for p in out.iterdir()})
    planned = shardq.audit("org/result", dry_run=True).traffic
    audit = shardq.audit("org/result")
    assert audit.problems == ()
    assert audit.traffic == planned
    limit_bytes = planned.header_bytes + planned.source_bytes
    assert shardq.audit("org/result", max_traffic_bytes=limit_bytes).problems == ()
    assert shardq.verify("org/result", source="org/model").problems == ()


# --- sources and ledgers that are not what they were -----------------------------------------------------------------


@pytest.mark.parametrize("case", ["fp8_block", "gptq_act_order", "bnb4_nested", "gpt_oss", "gpt_oss_bf16"])
def test_other_codes_and_scales_are_found(case: str, tmp_path: Path) -> None:
    source = sources.write_source(CASES[case], tmp_path / "source")
    out = quantize(case, source, tmp_path / "out")
    for path, t in tensors_of(source):
        if "bitsandbytes" in t.name or t.name.endswith("quant_map"):
            continue  # what the headers had to go with, and a table that has more than is used
        before, data = path.read_bytes(), bytearray(path.read_bytes())
        size = {"F32": 4, "BF16": 2, "F16": 2}.get(t.dtype, 1)
        for at in range(t.begin, t.end, max(1, (t.end - t.begin) // size // 64) * size):
            data[at + size - 1] ^= 64  # of floats the highest byte: 16 bits keep it
        path.write_bytes(data)
        assert shardq.audit(out, source=source).problems, t.name
        path.write_bytes(before)
    assert shardq.audit(out, source=source).problems == ()


def test_source_that_decodes_to_no_numbers_is_found(tmp_path: Path) -> None:
    source = sources.write_source(CASES["fp8_block"], tmp_path / "source")
    for scheme in ("", FAR[0]):
        out = quantize("fp8_block", source, tmp_path / f"out{scheme}", scheme=scheme)
        for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"):
            path, t = next((p, t) for p, t in tensors_of(source) if t.name == name)
            before = path.read_bytes()
            path.write_bytes(before[: t.begin] + b"\x7f" + before[t.begin + 1 :])
            problems = shardq.audit(out, source=source).problems
            assert any(p.startswith(f"{name} ") and re.search("cannot be (derived|quantized)", p) for p in problems)
            assert any("cannot be derived" in p for p in shardq.verify(out, source=source).problems)
            path.write_bytes(before)


def test_configuration_that_reads_codes_otherwise_is_refused(tmp_path: Path) -> None:
    source = sources.write_source(CASES["gptq_v2"], tmp_path / "source")
    out = quantize("gptq_v2", source, tmp_path / "out")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rope_theta": 7}))
    with pytest.raises(BadOption, match=r"its config\.json has sha256"):
        shardq.audit(out, source=source)


def test_header_of_any_shard_that_is_another_is_refused(tmp_path: Path) -> None:
    source = sources.write_source(CASES["fp8_block"], tmp_path / "source")
    out = quantize("fp8_block", source, tmp_path / "out")
    path = max(source.glob("*.safetensors"))
    path.write_bytes(path.read_bytes().replace(b"model.norm.weight", b"model.Norm.weight"))
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model.norm.weight", "model.Norm.weight"))
    with pytest.raises(BadOption, match="the header of shard"):
        shardq.audit(out, source=source, sample=1)


def change_ledger(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    ledger = decode_ledger((out / LEDGER).read_bytes())
    change(ledger)
    (out / LEDGER).write_bytes(encode_ledger(ledger))


def test_ledger_that_does_not_account_for_its_source_is_found(written: Callable[[str], Path], tmp_path: Path) -> None:
    source = written("fp8_block")
    out = quantize("fp8_block", source, tmp_path / "out")
    change_ledger(out, lambda x: x["source"].pop("model.layers.0.self_attn.q_proj.weight_scale_inv"))
    change_ledger(out, lambda x: x["tensors"].pop("model.layers.1.self_attn.q_proj.weight"))
    assert shardq.audit(out, source=source).problems == (
        "model.layers.1.self_attn.q_proj.weight is in the source and not in the ledger",
        "model.layers.0.self_attn.q_proj.weight_scale_inv is in the source and not in the ledger",
    )


@pytest.mark.parametrize(
    ("name", "outcome"), [("model.layers.1.mlp.up_proj.weight", "copied"), ("model.norm.weight", "decoded")]
)
def test_outcome_that_the_source_contradicts_is_found(
    name: str, outcome: str, written: Callable[[str], Path], tmp_path: Path
) -> None:
    source = written("fp8_block")
    out = quantize("fp8_block", source, tmp_path / "out")
    change_ledger(out, lambda x: x["tensors"][name].update(outcome=outcome))
    (problem,) = shardq.audit(out, source=source).problems
    assert problem.startswith(f"{name} is BF16")
    assert problem.endswith(f"], {outcome}")


def test_ledger_that_hides_its_source_section_is_found(written: Callable[[str], Path], tmp_path: Path) -> None:
    """Without it the source counts as plain, and its codes are no weights."""
    source = written("gpt_oss")
    out = quantize("gpt_oss", source, tmp_path / "out")
    change_ledger(out, lambda x: x.pop("source"))
    problems = shardq.audit(out, source=source, sample=20, seed=1).problems
    assert problems
    assert all("where the ledger has it" in p for p in problems)
    assert any("in the source and not in the ledger" in p for p in shardq.verify(out, source=source).problems)


def test_ledger_that_keeps_a_part_of_a_group_is_refused(written: Callable[[str], Path], tmp_path: Path) -> None:
    """No group of stacks is known that has a down projection alone."""
    source = written("gpt_oss_bf16")
    out = quantize("gpt_oss_bf16", source, tmp_path / "out")
    change_ledger(out, lambda x: x["tensors"].pop("model.layers.1.mlp.experts.gate_up_proj"))
    with pytest.raises(VerifyFailed, match="does not go with its source: expert stack"):
        shardq.audit(out, source=source)
