"""`verify` and `audit` of GGUF outputs: what is sound passes, and each sort of damage is told."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_files_made as files_made
import gguf_models_made as models_made
import numpy as np
import pytest
from gguf_checkpoints_made import write
from importance_files_made import legacy

import shardq
from shardq import Limits, make_recipe
from shardq.audit_statement import digest, make_statement
from shardq.errors import BadOption, CheckpointIncomplete, NonFiniteWeight, VerifyFailed
from shardq.files.gguf_read import read_gguf
from shardq.gguf.options import GgufOptions
from shardq.gguf_rows import find_made
from shardq.ledger import LEDGER, TABLE, decode_ledger, encode_ledger
from shardq.staging import PROVENANCE

pytest.importorskip("gguf", reason="names of GGUF tensors come from the package gguf")
pytest.importorskip("tokenizers", reason="vocabularies are read with the package tokenizers")

Made = tuple[Path, Path]  # source, output
ALONE = Limits(parallel=1)
COMPUTED = "rope_freqs.weight"


def quantize(source: Path, out: Path, kind: str = "Q4_K_M", importance: Path | None = None, **options: Any) -> Path:
    recipe = make_recipe(f"gguf:{kind}", importance=importance, gguf=GgufOptions(**options))
    shardq.quantize(source, recipe, output_dir=out, limits=ALONE)
    return out


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A tiny Llama, whose rope is computed and whose queries are re-ordered, in five parts and more; read only."""
    folder = tmp_path_factory.mktemp("parts")
    case = models_made.MODELS["llama_rope"]
    source = write(case, folder)
    return source, quantize(source, folder / "out", tokenizer_pre=case.pre, max_part_bytes=60_000)


@pytest.fixture
def copy(parts: Made, tmp_path: Path) -> Path:
    """The output, free to be damaged."""
    return Path(shutil.copytree(parts[1], tmp_path / "copy"))


def first(folder: Path) -> Path:
    return min(folder.glob("*.gguf"))


def home(folder: Path, tensor: str) -> tuple[Path, int, int]:
    """The file of a tensor, where it begins there, and ends."""
    for path in folder.glob("*.gguf"):
        for t in read_gguf(path).tensors:
            if t.name == tensor:
                return path, t.begin, t.end
    raise LookupError(tensor)


def change(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as f:
        f.seek(at)
        f.write(data)


def flip(path: Path, at: int) -> None:
    """Flip a bit of a file; twice is as before."""
    change(path, at, bytes([path.read_bytes()[at] ^ 0x10]))


def edit_ledger(folder: Path, edit: Callable[[Any], None]) -> None:
    ledger = decode_ledger((folder / LEDGER).read_bytes())
    edit(ledger)
    (folder / LEDGER).write_bytes(encode_ledger(ledger))


def edit_record(folder: Path, edit: Callable[[Any], None]) -> None:
    record = json.loads((folder / PROVENANCE).read_bytes())
    edit(record)
    (folder / PROVENANCE).write_text(json.dumps(record))


# --- what is sound ---------------------------------------------------------------------------------------------------

SOUND: Mapping[str, tuple[files_made.FileCase, str, Mapping[str, Any]]] = {
    "phi3": (files_made.FILES["phi3"], "Q4_K_M", {}),  # one weight becomes several tensors
    "deepseek3": (files_made.FILES["deepseek3"], "Q8_0", {}),  # columns become rows
    "gpt_oss": (files_made.FILES["gpt_oss"], "MXFP4_MOE", {}),  # codes are carried
    "qwen2moe": (files_made.FILES["qwen2moe"], "Q3_K_M", {"max_part_bytes": 1_000_000}),  # stacks of experts
    "gemma2": (files_made.FILES["gemma2"], "F16", {}),  # norms grow by one
    "qwen35": (files_made.FILES["qwen35"], "Q4_K_M", {"max_part_bytes": 1_000_000}),  # columns change places
    "qwen3next": (files_made.FILES["qwen3next"], "Q8_0", {}),  # heads of rows go into two tensors
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_outputs_are_derived_again_to_the_byte(name: str, tmp_path: Path) -> None:
    made, file_type, options = SOUND[name]
    source = files_made.write(made, tmp_path)
    out = quantize(source, tmp_path / "out", file_type, tokenizer_pre=made.case.pre, **options)
    found = shardq.verify(out, deep=True, source=source)
    assert found.problems == found.notes == ()
    assert found.compared > 0
    audit = shardq.audit(out, source=source, sample=10_000, max_traffic_bytes=None)
    assert audit.problems == ()
    sizes = [t.end - t.begin for path in out.glob("*.gguf") for t in read_gguf(path).tensors]
    assert sum(t.bytes_compared for t in audit.tensors) == sum(sizes)
    planned = shardq.audit(out, source=source, sample=10_000, max_traffic_bytes=None, dry_run=True)
    assert planned.traffic == audit.traffic
    header_bytes, total_bytes = audit.traffic.header_bytes, audit.traffic.total_bytes
    limit_bytes = header_bytes + (total_bytes - header_bytes) // 2
    for seed in (1, 2):
        blocks = shardq.audit(out, source=source, sample=10_000, seed=seed, max_traffic_bytes=limit_bytes)
        assert blocks.problems == ()
        assert blocks.traffic.total_bytes < limit_bytes
        assert any(not t.check.whole for t in blocks.tensors)
        assert all(t.bytes_compared for t in blocks.tensors)


@pytest.mark.parametrize("name", ["llama", "deepseek3", "phi3", "gpt_oss", "qwen35"])
def test_slabs_cut_no_head_and_nothing_that_is_turned(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of large weights, which have several slabs of several windows."""
    made = files_made.FILES[name]
    source = files_made.write(made, tmp_path)
    out = quantize(source, tmp_path / "out", "MXFP4_MOE", tokenizer_pre=made.case.pre)
    monkeypatch.setattr("shardq.gguf_rows.SLAB_BYTES", 7_000)
    monkeypatch.setattr("shardq.gguf_rows.WINDOW_BYTES", 3_000)
    monkeypatch.setattr("shardq.gguf_audit.WINDOW_BYTES", 3_000)
    assert shardq.verify(out, source=source).problems == ()
    audit = shardq.audit(out, source=source, sample=10_000, max_traffic_bytes=None)
    assert audit.problems == ()
    assert (
        audit.traffic == shardq.audit(out, source=source, sample=10_000, max_traffic_bytes=None, dry_run=True).traffic
    )
    sizes = [t.end - t.begin for path in out.glob("*.gguf") for t in read_gguf(path).tensors if t.name != COMPUTED]
    assert sum(t.bytes_compared for t in audit.tensors) == sum(sizes)
    recipe = make_recipe("MXFP4_MOE", gguf=GgufOptions(tokenizer_pre=made.case.pre))
    for m in find_made(shardq.plan(source, recipe)).values():
        slabs = list(m.slabs(0, m.rows))
        assert [*(row for row, _ in slabs), m.rows] == [0, *(end for _, end in slabs)]
        assert all(m.snap(*slab) == slab for slab in slabs)


def test_a_source_with_codes_in_columns_is_derived_from(tmp_path: Path) -> None:
    made = replace(files_made.FILES["qwen2"], shards=2)
    plain = files_made.write(made, tmp_path)
    shardq.quantize(plain, "W8A16@gptq", output_dir=tmp_path / "Codes-1B", limits=ALONE)
    source = tmp_path / "Codes-1B"
    out = quantize(source, tmp_path / "out", tokenizer_pre=made.case.pre)
    recipe = make_recipe("Q4_K_M", gguf=GgufOptions(tokenizer_pre=made.case.pre))
    assert any(m.encoded and m.encoded.is_strided for m in find_made(shardq.plan(source, recipe)).values())
    assert shardq.verify(out, source=source).problems == ()
    audit = shardq.audit(out, source=source, max_traffic_bytes=None)
    assert audit.problems == ()
    assert audit.traffic == shardq.audit(out, source=source, max_traffic_bytes=None, dry_run=True).traffic


def test_the_source_may_have_moved(parts: Made, tmp_path: Path) -> None:
    """The name of the model in the file is that of the folder that it was made of."""
    moved = shutil.copytree(parts[0], tmp_path / "elsewhere")
    (moved / "notes.txt").write_text("beside the weights")
    assert shardq.verify(parts[1], source=moved).problems == ()
    assert shardq.audit(parts[1], source=moved).problems == ()


def test_statement_tells_rows_and_types(parts: Made) -> None:
    statement = make_statement(shardq.audit(parts[1], source=parts[0], sample=1000))
    assert statement["verdict"] == "equal"
    assert statement["digest"] == digest(statement)
    told = {t["name"]: t for t in statement["tensors"]}
    query = told["model.layers.0.self_attn.q_proj.weight"]
    assert (query["outputs"], query["rows"], query["whole"]) == (["blk.0.attn_q.weight"], [0, 512], True)
    assert told["model.norm.weight"]["types"] == ["F32"]


def test_importance_is_asked_for(tmp_path: Path) -> None:
    made = files_made.FILES["llama"]
    source = files_made.write(made, tmp_path)
    name = "blk.0.attn_output.weight"
    for number in (1, 2):
        values = np.linspace(number, 9, 256, dtype=np.float32)
        (tmp_path / f"imatrix{number}.dat").write_bytes(legacy({name: (1, values.tolist())}))
    right, wrong = tmp_path / "imatrix1.dat", tmp_path / "imatrix2.dat"
    out = quantize(source, tmp_path / "out", importance=right, tokenizer_pre=made.case.pre)
    assert shardq.verify(out, source=source, importance=right).problems == ()
    assert shardq.audit(out, source=source, importance=right, sample=1000).problems == ()
    for given in (None, wrong):
        with pytest.raises(BadOption, match="was made with importance"):
            shardq.verify(out, source=source, importance=given)
        with pytest.raises(BadOption, match="was made with importance"):
            shardq.audit(out, source=source, importance=given)
    with pytest.raises(BadOption, match="give both, or none"):
        shardq.verify(out, importance=right)
    assert shardq.verify(out).problems == ()


# --- what is not -----------------------------------------------------------------------------------------------------


def test_any_changed_byte_is_found_and_named(parts: Made, copy: Path) -> None:
    source, _ = parts
    header = read_gguf(first(copy))
    token = first(copy).read_bytes().index(b"<|endoftext|>", 0, header.header_bytes_len)
    names = (COMPUTED, "blk.0.attn_q.weight", "blk.1.ffn_down.weight", "output_norm.weight")
    places = [(*home(copy, name)[:2], name) for name in names]
    path, _, end = home(copy, "blk.1.attn_k.weight")
    places += [(path, end - 1, "blk.1.attn_k.weight"), (first(copy), token, "its header")]
    for path, at, name in places:
        flip(path, at)
        expected = f"{name} in {path.name} differs at byte {at} of the file: expected 0x"
        (problem,) = shardq.verify(copy, source=source).problems
        assert problem.startswith(expected)
        (problem,) = shardq.audit(copy, source=source, sample=1000).problems
        assert problem.startswith(expected)
        (problem,) = shardq.verify(copy, deep=True).problems
        assert problem.startswith(f"{path.name} has sha256")
        flip(path, at)
    assert shardq.verify(copy, deep=True, source=source).problems == ()


def test_truncated_and_exchanged_files_are_found(copy: Path) -> None:
    one, two = sorted(copy.glob("*.gguf"))[:2]
    data = one.read_bytes()
    one.write_bytes(data[:-100])
    with pytest.raises(VerifyFailed, match=f"{one.name} has {len(data) - 100} bytes: expected {len(data)}"):
        shardq.verify(copy)
    edit_record(copy, lambda r: r["files"][one.name].update(size=len(data) - 100))
    with pytest.raises(VerifyFailed, match=f"GGUF file {one.name}, .*is missing, there are"):
        shardq.verify(copy)
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    with pytest.raises(VerifyFailed, match="bytes: expected"):
        shardq.verify(copy)
    for path in (one, two):
        edit_record(copy, lambda r, p=path: r["files"][p.name].update(size=p.stat().st_size))
    problems = shardq.verify(copy).problems
    assert f"{one.name} says that it is part 1, counted from 0: expected 0" in problems
    assert f"{COMPUTED} is in {two.name}: the ledger has it in {one.name}" in problems
    one.unlink()
    with pytest.raises(VerifyFailed, match=f"lacks {one.name}"):
        shardq.verify(copy)


def problems_of(folder: Path) -> list[str]:
    try:
        return list(shardq.verify(folder).problems)
    except VerifyFailed as e:
        return [str(e)]


def test_header_that_lies_is_refused_in_one_line(copy: Path) -> None:
    path = first(copy)
    data = path.read_bytes()
    end = read_gguf(path).header_bytes_len
    for at in range(0, end, 97):
        change(path, at, bytes([data[at] ^ 0xFF]))
        told = problems_of(copy)
        assert all("\n" not in line for line in told)
        assert "".join(told).isascii()
        change(path, at, data[at : at + 1])
    assert shardq.verify(copy).problems == ()


def other_type(ledger: Any) -> None:
    ledger[TABLE]["blk.0.attn_q.weight"]["type"] = "Q8_0"


def other_shape(ledger: Any) -> None:
    ledger[TABLE]["blk.0.attn_norm.weight"]["shape"] = [32]


def unknown(ledger: Any) -> None:
    del ledger[TABLE]["blk.0.attn_norm.weight"]


def promised(ledger: Any) -> None:
    ledger[TABLE]["blk.7.attn_norm.weight"] = ledger[TABLE]["blk.0.attn_norm.weight"]


def uncounted(ledger: Any) -> None:
    del ledger[TABLE][COMPUTED]["computed"]


def unmade(ledger: Any) -> None:
    ledger["tensors"]["model.norm.weight"]["outputs"] = []


def other_scheme(ledger: Any) -> None:
    ledger["tensors"]["model.layers.0.self_attn.q_proj.weight"]["scheme"] = "Q2_K"


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (other_type, "blk.0.attn_q.weight in .* is Q5_0 .*: expected Q8_0"),
        (other_shape, r"blk.0.attn_norm.weight in .* is F32 \[64\]: expected F32 \[32\]"),
        (unknown, "blk.0.attn_norm.weight in .* is in no ledger entry"),
        (promised, "blk.7.attn_norm.weight is missing"),
        (uncounted, f"{COMPUTED} is made of no weight in the ledger"),
        (unmade, r"model.norm.weight was copied into \[\]"),
        (other_scheme, "q_proj.weight has scheme Q2_K: the ledger has its tensors in Q5_0"),
    ],
)
def test_ledger_and_files_must_agree(edit: Callable[[Any], None], told: str, copy: Path) -> None:
    edit_ledger(copy, edit)
    assert any(re.search(told, p) for p in shardq.verify(copy).problems)


def test_figures_are_measured_again(parts: Made, copy: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_ledger(copy, lambda x: x["tensors"][name].update(max_error=0.5))
    (problem,) = shardq.verify(copy, source=parts[0]).problems
    assert problem.startswith(f"{name}: max_error is ")
    (problem,) = shardq.audit(copy, source=parts[0], sample=1000).problems
    assert problem.startswith(f"{name}: max_error is ")
    edit_ledger(copy, lambda x: x["tensors"][name].update(role="head"))
    assert f"{name}: {LEDGER} says role 'head': expected 'linear'" in shardq.verify(copy, source=parts[0]).problems


BROKEN: tuple[Callable[[Any], Any], ...] = (
    lambda ledger: ledger.pop(TABLE),
    lambda ledger: ledger.update({TABLE: {"a": 1}}),
    lambda ledger: ledger["tensors"].update(a={}),
    lambda ledger: ledger["tensors"]["model.norm.weight"].update(outputs=[[]]),
)


@pytest.mark.parametrize("edit", BROKEN)
def test_broken_records_are_refused(edit: Callable[[Any], None], parts: Made, copy: Path) -> None:
    edit_ledger(copy, edit)
    with pytest.raises(VerifyFailed, match=LEDGER):
        shardq.verify(copy)
    with pytest.raises(VerifyFailed, match=LEDGER):
        shardq.audit(copy, source=parts[0])


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("recipe.decode", "roughly", "no recipe of a GGUF file that is known"),
        ("recipe.gguf", None, "no recipe of a GGUF file that is known"),
        ("recipe.policy", "published", "recipe.policy 'published', which this version does not make"),
        ("numerics", 0, "numerics 0"),
    ],
)
def test_recipes_of_other_versions_are_refused(parts: Made, copy: Path, key: str, value: Any, told: str) -> None:
    edit_record(copy, lambda r: r["identity"].update({key: value}))
    with pytest.raises(VerifyFailed, match=told):
        shardq.verify(copy, source=parts[0])


def test_other_sources_are_refused_and_other_weights_found(parts: Made, tmp_path: Path) -> None:
    source, out = parts
    other = shutil.copytree(source, tmp_path / source.name)
    shard, config, tokenizer = other / "model.safetensors", other / "config.json", other / "tokenizer.json"
    flip(shard, shard.stat().st_size - 2)
    assert "differs at byte" in shardq.verify(out, source=other).problems[0]
    config.write_text(config.read_text() + " ")
    with pytest.raises(BadOption, match=r"its config\.json has sha256"):
        shardq.verify(out, source=other)
    shutil.copy(source / config.name, config)
    tokenizer.write_text(tokenizer.read_text() + " ")
    with pytest.raises(BadOption, match=r"its tokenizer\.json has sha256"):
        shardq.audit(out, source=other)
    shard.rename(other / "other.safetensors")
    with pytest.raises(CheckpointIncomplete, match=r"has no shard model\.safetensors"):
        shardq.verify(out, source=other)


def test_scale_that_is_no_number_is_found_by_deep(copy: Path) -> None:
    for name, at, bad in (("blk.0.attn_q.weight", 22 * 5, b"\0\x7e"), ("output_norm.weight", 8, b"\0\0\x80\x7f")):
        path, begin, _ = home(copy, name)
        before = path.read_bytes()[begin + at : begin + at + len(bad)]
        change(path, begin + at, bad)
        assert shardq.verify(copy).problems == ()
        found = shardq.verify(copy, deep=True).problems
        assert found[0].startswith(f"{path.name} has sha256")
        row = 2 if name.startswith("blk") else 0
        (told,) = found[1:]
        assert told.startswith(f"{name} in {path.name} has a number in row {row} that is NaN or infinite")
        change(path, begin + at, before)


def test_carried_codes_beyond_numbers_are_refused(tmp_path: Path) -> None:
    """Nothing quantizes them that would tell."""
    made = models_made.MODELS["gpt_oss"]  # with scales of all sizes
    with pytest.raises(NonFiniteWeight, match=r"holds inf in rows .* in MXFP4"):
        quantize(write(made, tmp_path), tmp_path / "out", "MXFP4_MOE", tokenizer_pre=made.pre)


# --- a repo ----------------------------------------------------------------------------------------------------------


def test_of_a_repo_headers_and_records_are_read(
    parts: Made, hub: Any, fake_hub_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for name, folder in (("org/out", parts[1]), ("org/source", parts[0])):
        hub.repos[name] = fake_hub_module.Repo()
        hub.repos[name].commit({p.name: p.read_bytes() for p in folder.iterdir()})
    files = len(list(parts[1].glob("*.gguf")))
    found = shardq.verify("org/out")
    assert (found.problems, found.files) == ((), files)
    assert len(hub.seen("/resolve/")) == files + 2
    assert shardq.verify("org/out", deep=True, source=parts[0]).problems == ()
    audit = shardq.audit("org/out", source=parts[0], sample=5)
    assert audit.problems == ()
    assert audit.traffic == shardq.audit("org/out", source=parts[0], sample=5, dry_run=True).traffic
    assert {m.architecture for m in shardq.inspect("org/out").models} == {"llama"}
