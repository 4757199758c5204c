"""Which tensors an audit takes, which part of each, and what that costs."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.audit_meter import Meter
from shardq.audit_plan import Check, plan_checks, span, whole
from shardq.audit_statement import Audit, digest, make_statement
from shardq.audit_subjects import Derived, Subject, choose_names
from shardq.auditing import Question, audit_output
from shardq.checkpoint import TensorRef
from shardq.errors import BadOption, CheckpointIncomplete
from shardq.files.safetensors import FilePlan, TensorSpec, plan_file
from shardq.layouts import LAYOUTS, find_layout
from shardq.layouts.base import Layout, ModuleChoice, OutSpec, unit_rows
from shardq.outputs import Output, identity_sha256
from shardq.schemes import PRESETS, WHOLE_ROW, WIDTHS, Scheme
from shardq.sources.base import SourceFile
from shardq.version import NUMERICS, VERSION

GB = 10**9


# --- which tensors ---------------------------------------------------------------------------------------------------


def ledger_of(counts: Mapping[tuple[str, str], int]) -> dict[str, dict[str, Any]]:
    return {
        f"{role}.{i}": {"outcome": outcome, "role": role} for (outcome, role), n in counts.items() for i in range(n)
    }


def test_every_outcome_and_role_is_there_and_the_rest_is_spread() -> None:
    ledger = ledger_of({("quantized", "linear"): 5000, ("copied", "norm"): 500, ("copied", "head"): 1})
    chosen = choose_names(ledger, 200, seed=7)
    assert len(chosen) == len(set(chosen)) == 200
    roles = Counter(ledger[n]["role"] for n in chosen)
    assert roles["head"] == 1
    assert 160 <= roles["linear"] <= 198
    assert list(chosen) == [n for n in ledger if n in set(chosen)]


def test_choice_is_that_of_the_seed_and_of_nothing_else() -> None:
    ledger = ledger_of({("quantized", "linear"): 300, ("copied", "norm"): 30})
    turned = dict(reversed(ledger.items()))
    assert set(choose_names(ledger, 20, 1)) == set(choose_names(turned, 20, 1))
    assert choose_names(ledger, 20, 1) != choose_names(ledger, 20, 2)
    assert set(choose_names(ledger, 999, 1)) == set(ledger)
    assert len(choose_names(ledger, 1, 1)) == 1


# --- which part ------------------------------------------------------------------------------------------------------


def subject(layout: Layout, scheme: Scheme, rows: int, columns: int, name: str = "a.weight") -> Subject:
    """A weight whose packed tensors lie in a file one behind the other, with gaps. A fused one has a partner of its
    shape."""
    outputs: list[Derived] = []
    begin = 1000
    for spec in layout.outputs(scheme, "BF16", rows, columns):
        outputs.append(Derived(f"a.{spec.suffix}", spec, begin))
        begin += outputs[-1].size_bytes + 5000
    members = {"group": [], "tensor": [name], "fused": [name, f"partner of {name}"]}[scheme.reach]
    reach = tuple(TensorRef(n, "s", "BF16", (rows, columns), 64, 64 + 2 * rows * columns) for n in members)
    return Subject(
        name, "quantized", "linear", "s", "f", "BF16", 64, rows, columns, 2 * columns, unit_rows(layout, scheme),
        scheme, tuple(outputs), reach,
    )  # fmt: skip


def held_schemes(layout: Layout) -> list[Scheme]:
    """What a layout takes of the presets, and of integers with other widths and groups."""
    integers = [Scheme(f"int{b}", g, s) for b in WIDTHS for g in (WHOLE_ROW, 32, 64, 128) for s in (True, False)]
    settled = [layout.settle(s) for s in [*(p.scheme for p in PRESETS.values()), *integers]]
    return [s for s in dict.fromkeys(settled) if layout.refuse(s, s, 4096, 4096) is None]


def copy(size_bytes: int, name: str = "b.weight") -> Subject:
    derived = Derived(name, OutSpec("", "U8", (size_bytes,), slab_axis=0), 1000)
    return Subject(name, "copied", "norm", "s", "f", "BF16", 64, size_bytes, 1, 1, 1, None, (derived,))


def cost_bytes(check: Check) -> int:
    return check.source_bytes + check.result_bytes


def least_bytes(s: Subject) -> int:
    """What has to be enough for a tensor: the rows that belong together, of what keeps columns together two lines more
    than a group of columns can need, and where no scale is stored all that it depends on."""
    assert s.scheme is not None
    rows, step = min(s.rows, s.unit_rows), math.lcm(32, s.scheme.group_columns(s.columns))
    least = rows * s.row_bytes
    for d in s.outputs:
        if d.spec.slab_axis is None:
            least += d.size_bytes
        elif d.spec.slab_axis == 0:
            least += (d.spec.slab_range(0, rows)[1]) * d.line_bytes
        else:
            least += min(d.size_bytes, (-(-step * d.spec.shape[0] // s.columns) + 2) * d.line_bytes)
    return least + sum(t.size_bytes for t in s.reach if layout_keeps_no_scale(s))


def layout_keeps_no_scale(s: Subject) -> bool:
    return [d.spec.suffix for d in s.outputs] == ["weight"]


def check_budget(subjects: list[Subject], share: float, seed: int) -> None:
    full_bytes = sum(cost_bytes(c) for c in plan_checks(subjects, 1 << 60, seed))
    budget_bytes = int(full_bytes * share)
    try:
        checks = plan_checks(subjects, budget_bytes, seed)
    except BadOption:
        assert budget_bytes < least_bytes(subjects[0]) + 2
        return
    assert [c.subject for c in checks] == subjects
    assert sum(map(cost_bytes, checks)) <= budget_bytes
    measured: set[str] = set()
    for check in checks:
        s, cut = check.subject, check.cut
        assert 0 <= cut.row <= cut.end_row <= s.rows
        assert 0 <= cut.column < cut.end_column <= s.columns
        assert cut.row % s.unit_rows == 0
        assert cut.end_row > cut.row or s.rows == 0
        for d in s.outputs:  # every byte that is compared is read
            begin, end = span(d, s, cut)
            assert begin == end or s.scheme is None or any(b <= begin and end <= e for b, e in check.reads)
        measured.update(t.name for t in check.measured)
        assert (check.scale == "derived") == (bool(s.reach) and measured >= {t.name for t in s.reach})
        assert (check.scale == "") == (not s.reach)
        assert not (check.scale == "taken" and layout_keeps_no_scale(s))
    if share >= 1:
        assert all(c.whole and c.scale != "taken" for c in checks)


@pytest.mark.parametrize("layout", LAYOUTS, ids=[x.name for x in LAYOUTS])
@given(
    which=st.integers(0, 99), rows=st.integers(1, 300), columns=st.integers(1, 40),
    copied_bytes=st.integers(0, 1 << 22), share=st.floats(0, 1.2), seed=st.integers(0, 99),
)  # fmt: skip
def test_budget_is_kept_and_used(
    layout: Layout, which: int, rows: int, columns: int, copied_bytes: int, share: float, seed: int
) -> None:
    held = held_schemes(layout)
    check_budget([subject(layout, held[which % len(held)], 32 * rows, 128 * columns), copy(copied_bytes)], share, seed)


def test_budget_is_kept_where_a_line_holds_more_columns_than_the_block() -> None:
    """Zero points and scales of whole rows are one line, which a block of few columns needs all of."""
    scheme = Scheme("int2", WHOLE_ROW, symmetric=True)
    check_budget([subject(find_layout("gptq"), scheme, 32, 640), copy(19694)], 0.5, 0)


def test_scales_are_derived_as_far_as_the_budget_goes() -> None:
    layout = find_layout("compressed-tensors")
    scheme = layout.settle(PRESETS["NVFP4A16"].scheme)
    one = subject(layout, scheme, 1024, 1024)
    partner = replace(one, name=f"partner of {one.name}", reach=tuple(reversed(one.reach)))
    source_bytes, result_bytes = one.rows * one.row_bytes, sum(d.size_bytes for d in one.outputs)
    for budget_bytes, runs in ((None, 1), (2 * (2 * source_bytes + result_bytes), 3)):  # gaps cost something too
        checks = plan_checks([one, partner], budget_bytes, seed=1)
        assert [(c.scale, c.whole, len(c.measured)) for c in checks] == [("derived", True, 2), ("derived", True, 0)]
        assert checks[0].requests == 2 + 1 + runs  # both are measured, and one is derived
    checks = plan_checks([one, partner], 3 * source_bytes, seed=1)  # as a block, with scales of all
    assert [(c.scale, c.whole, len(c.measured)) for c in checks] == [("taken", True, 0), ("taken", True, 0)]
    checks = plan_checks([one], 3 * source_bytes, seed=1)
    assert [(c.scale, c.whole, len(c.measured)) for c in checks] == [("derived", False, 2)]


def test_small_tensors_leave_their_share_to_large_ones() -> None:
    scheme = Scheme("int4", 128, symmetric=True)
    large = subject(LAYOUTS[0], scheme, 8192, 8192, "large.weight")
    checks = plan_checks([copy(100, f"{i}.weight") for i in range(99)] + [large], 100_000_000, seed=1)
    assert all(c.whole for c in checks[:-1])
    assert 90_000_000 < cost_bytes(checks[-1]) < 100_000_000


def test_blocks_lie_anywhere_and_compare_as_much_as_they_can() -> None:
    scheme = Scheme("int4", 128, symmetric=True)
    one = subject(LAYOUTS[0], scheme, 8192, 8192)
    cuts = [plan_checks([one], 20_000_000, seed)[0].cut for seed in range(200)]
    assert len({c.row for c in cuts}) > 50
    assert len({c.column for c in cuts}) > 10
    assert {c.row for c in cuts} & {0}
    assert max(c.end_row for c in cuts) == 8192
    assert max(c.end_column for c in cuts) == 8192
    assert {c.end_row - c.row for c in cuts} == {608}  # about half of the bytes: 10 of 134 MB
    assert {c.end_column - c.column for c in cuts} == {2304}  # and 10 of 36 MB


def test_rows_that_stay_together_are_read_as_one_run() -> None:
    spec = OutSpec("packed", "I32", (8192, 1024), slab_axis=0)
    one = subject(LAYOUTS[0], Scheme("int4", 128, symmetric=True), 8192, 8192)
    (check,) = plan_checks([replace(one, outputs=(Derived("a.packed", spec, 0),))], 20_000_000, seed=1)
    assert (check.cut.column, check.cut.end_column) == (0, 8192)
    assert check.reads == ((check.cut.row * 4096, check.cut.end_row * 4096),)
    assert 19_000_000 < cost_bytes(check) <= 20_000_000


def test_no_limit_takes_all_and_too_small_a_limit_is_refused() -> None:
    one = subject(LAYOUTS[1], Scheme("int4", 128, symmetric=True), 8192, 8192)
    (check,) = plan_checks([one], None, seed=1)
    assert check.cut == whole(one)
    assert len(check.windows) == 16
    with pytest.raises(BadOption, match="--max-traffic leaves 600000 bytes for 1 tensors, which need at least"):
        plan_checks([one], 600_000, seed=1)


# --- a repo of 2 TB --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """A source of headers: nothing else can be read of it."""

    label: str
    listing: tuple[SourceFile, ...]
    commit: str | None
    plans: Mapping[str, FilePlan]
    remote: bool = True

    def files(self) -> tuple[SourceFile, ...]:
        return self.listing

    def read(self, name: str, begin: int, end: int) -> bytes:
        header = self.plans[name].header
        assert end <= max(len(header), 1 << 18), "no weight is read"
        return header.ljust(end, b"\0")[begin:end]

    def local_path(self, name: str) -> Path | None:
        raise AssertionError(name)

    def fetch(self, name: str, target: Path, on_bytes: Callable[[int], None]) -> str | None:
        raise AssertionError(name)


ROLES = {"embed_tokens": "embedding", "lm_head": "head", "mlp.gate.": "router", "norm": "norm"}


def shard_specs(layers: int, experts: int) -> list[list[TensorSpec]]:
    """The shapes of a mixture of experts, a shard for each layer; 60 layers of 96 are a trillion weights, 2 TB."""

    def linear(name: str, rows: int, columns: int) -> TensorSpec:
        return TensorSpec(f"{name}.weight", "BF16", (rows, columns))

    shards = []
    for layer in range(layers):
        p = f"model.layers.{layer}"
        specs = [linear(f"{p}.self_attn.q_a_proj", 1536, 7168), linear(f"{p}.self_attn.q_b_proj", 12288, 1536)]
        specs += [linear(f"{p}.self_attn.o_proj", 7168, 8192), linear(f"{p}.mlp.gate", 384, 7168)]
        specs += [TensorSpec(f"{p}.input_layernorm.weight", "BF16", (7168,))]
        for e in range(experts):
            q = f"{p}.mlp.experts.{e}"
            specs += [linear(f"{q}.{n}_proj", 8192, 7168) for n in ("gate", "up")]
            specs += [linear(f"{q}.down_proj", 7168, 8192)]
        shards.append(specs)
    shards[0].append(linear("model.embed_tokens", 163840, 7168))
    shards[-1].append(linear("lm_head", 163840, 7168))
    return shards


def repos(layers: int, experts: int, recipe: str = "W4A16@auto_round") -> tuple[Output, Heads]:
    """Headers and records of such a model, quantized, and headers of its source."""
    name, _, layout_name = recipe.partition("@")
    layout = find_layout(layout_name)
    scheme = layout.settle(PRESETS[name].scheme)
    ledger: dict[str, dict[str, Any]] = {}
    heads: tuple[dict[str, FilePlan], dict[str, FilePlan]] = {}, {}
    for number, specs in enumerate(shard_specs(layers, experts), start=1):
        file = f"model-{number:05d}-of-{layers:05d}.safetensors"
        made: list[TensorSpec] = []
        for s in specs:
            role = next((role for part, role in ROLES.items() if part in s.name), "linear")
            entry = {"role": role, "shard": file, "dtype": s.dtype, "shape": list(s.shape), "file": file}
            if role == "linear":
                outputs = layout.outputs(scheme, "BF16", s.shape[0], s.shape[1])
                made += [TensorSpec(f"{s.name.removesuffix('.weight')}.{o.suffix}", o.dtype, o.shape) for o in outputs]
                ledger[s.name] = {**entry, "outcome": "quantized", "scheme": scheme.name}
            else:
                made.append(s)
                ledger[s.name] = {**entry, "outcome": "copied"}
        for side, tensors in zip(heads, (specs, made), strict=True):
            side[file] = plan_file(tensors)
    source, result = (
        Heads(label, tuple(SourceFile(n, p.size_bytes, None) for n, p in side.items()), commit, side)
        for label, commit, side in (("org/model", "c" * 40, heads[0]), ("org/model-W4A16", "d" * 40, heads[1]))
    )
    shards = [[n, p.size_bytes, None, hashlib.sha256(p.header[8:]).hexdigest()] for n, p in heads[0].items()]
    identity = {
        "source.label": "org/model", "source.commit": "c" * 40, "source.shards": shards, "recipe.layout": layout.name,
        "numerics": NUMERICS,
    }  # fmt: skip
    fingerprint = identity_sha256(identity)
    provenance = {"fingerprint": fingerprint, "identity": identity, "files": {}}
    kept = [ModuleChoice(n.removesuffix(".weight"), e["role"], None) for n, e in ledger.items() if "scheme" not in e]
    config = {"quantization_config": layout.config_block(scheme, kept, VERSION)}
    records = {"fingerprint": fingerprint, "tensors": ledger}
    return Output(result, result.label, {f.name: f for f in result.files()}, provenance, records, config), source


def dry_run(repo: tuple[Output, Heads], limit_bytes: int | None, seed: int | None = None) -> Audit:
    output, source = repo
    return audit_output(output, Meter(output.source), Meter(source), Question(200, seed, limit_bytes, True))


@pytest.fixture(scope="module")
def small() -> tuple[Output, Heads]:
    return repos(2, 10)


@pytest.mark.parametrize("recipe", ["W4A16@auto_round", "NVFP4A16@compressed-tensors"])
def test_200_tensors_of_a_repo_of_2_tb_cost_less_than_1_gb(recipe: str) -> None:
    trillion = repos(60, 96, recipe)
    assert sum(f.size_bytes for f in trillion[1].files()) > 2_000 * GB
    audit = dry_run(trillion, GB)
    assert len(audit.tensors) == 200
    assert audit.problems == ()
    assert 0.9 * GB < audit.traffic.total_bytes < GB
    assert audit.traffic.requests < 200 * 4 + 2 * 2 * 60
    roles = Counter((t.check.subject.outcome, t.check.subject.role) for t in audit.tensors)
    assert {("copied", "embedding"), ("copied", "head"), ("copied", "norm"), ("copied", "router")} <= set(roles)
    assert roles["quantized", "linear"] > 180
    checks = [t.check for t in audit.tensors if t.check.subject.scheme]
    assert all(c.cut.end_row - c.cut.row >= 32 and c.cut.end_column - c.cut.column >= 128 for c in checks)
    scales = {t["name"]: t.get("scale") for t in make_statement(audit)["tensors"]}
    assert {scales[c.subject.name] for c in checks} == ({"taken"} if "NVFP4" in recipe else {None})
    assert {scales[t.check.subject.name] for t in audit.tensors if not t.check.subject.scheme} == {None}


def test_members_of_a_group_are_measured_once() -> None:
    output, source = repos(2, 2, "NVFP4A16@compressed-tensors")
    names = [f"model.layers.0.mlp.experts.0.{p}_proj.weight" for p in ("gate", "up")]
    audit = dry_run((output, source), None)
    found = {t.check.subject.name: t.check for t in audit.tensors}
    assert [t.name for t in found[names[0]].measured] == names
    assert found[names[1]].measured == ()
    assert found[names[1]].scale == "derived"
    planned = audit.traffic
    assert planned.source_bytes == sum(c.source_bytes for c in found.values())
    assert planned.requests - sum(c.requests for c in found.values()) == 2 * 2  # a header of each shard


def test_dry_run_says_what_it_would_read(small: tuple[Output, Heads]) -> None:
    statement = make_statement(dry_run(small, GB))
    assert statement == make_statement(dry_run(small, GB))
    assert statement["verdict"] == "planned"
    assert statement["digest"] == digest(json.loads(json.dumps(statement)))
    assert statement["made_from"] == {"label": "org/model", "commit": "c" * 40}
    assert statement["result"] == {"label": "org/model-W4A16", "commit": "d" * 40}
    assert {t["equal"] for t in statement["tensors"]} == {None}
    for side in ("source_bytes", "result_bytes"):
        assert sum(t[side] for t in statement["tensors"]) == statement["traffic"][side]
    assert make_statement(dry_run(small, GB, 5))["digest"] != statement["digest"]
    assert make_statement(dry_run(small, None))["traffic"]["total_bytes"] > 4 * GB


def test_limit_below_the_headers_is_refused(small: tuple[Output, Heads]) -> None:
    with pytest.raises(BadOption, match="is used up by"):
        dry_run(small, 100_000)


def test_records_that_were_changed_are_found(small: tuple[Output, Heads]) -> None:
    output, source = small
    name = next(n for n, e in output.ledger["tensors"].items() if e["role"] == "router")
    changed = {**output.identity, "recipe.scheme": "other"}
    audit = dry_run((replace(output, provenance={**output.provenance, "identity": changed}), source), GB)
    assert [p for p in audit.problems if "its identity has" in p] == list(audit.problems) != []
    entry = {**output.ledger["tensors"][name], "shape": [1, 2]}
    ledger = {**output.ledger, "tensors": {**output.ledger["tensors"], name: entry}}
    audit = audit_output(
        replace(output, ledger=ledger), Meter(output.source), Meter(source), Question(1000, None, None, True)
    )
    assert [p for p in audit.problems if p.startswith(name) and "the ledger says" in p] == list(audit.problems) != []


def test_other_sources_are_refused(small: tuple[Output, Heads]) -> None:
    output, source = small
    with pytest.raises(BadOption, match=r"is at commit eee.*give --source org/model@ccc"):
        dry_run((output, replace(source, commit="e" * 40)), GB)
    head, *rest = source.listing
    with pytest.raises(BadOption, match=r"shard model-00001-of-00002\.safetensors has 5 bytes"):
        dry_run((output, replace(source, commit=None, listing=(replace(head, size_bytes=5), *rest))), GB)
    with pytest.raises(CheckpointIncomplete, match="has no shard model-00001"):
        dry_run((output, replace(source, listing=tuple(rest))), GB)
    other = repos(2, 10)[1]
    plan = other.plans[head.name]
    header = plan.header.replace(b"q_a_proj", b"q_c_proj")
    changed = replace(other, plans={**other.plans, head.name: replace(plan, header=header)})
    with pytest.raises(BadOption, match="the header of shard model-00001"):
        dry_run((output, changed), GB)
