"""GGUF files of others: what `inspect` shows and `verify` finds, from headers, and with --deep from numbers."""

import struct
from pathlib import Path

import gguf_made as made
import pytest

import shardq
from shardq.errors import BadOption, CorruptShard, SourceUnreadable, UnsupportedSource, VerifyFailed
from shardq.files.gguf import GgufSpec, KeyValue, plan_gguf
from shardq.files.gguf_split import CONVERTER, part_name, plan_parts
from shardq.gguf.file_types import FILE_TYPES, OTHERS, name_file_type
from shardq.gguf.headers import check_parts, find_models, read_gguf_headers
from shardq.gguf_inspection import GgufInspection, TypeCount
from shardq.sources import open_source
from shardq.sources.base import SourceFile

PAIRS = (
    KeyValue("general.architecture", "string", "llama"),
    KeyValue("general.name", "string", "A\nB"),
    KeyValue("general.file_type", "u32", 27),
)
SPECS = (
    GgufSpec("token_embd.weight", "Q6_K", (256, 3)),
    GgufSpec("blk.0.attn_norm.weight", "F32", (256,)),
    GgufSpec("blk.0.ffn_up.weight", "IQ3_S", (256, 4)),
)
SIZES = (3 * 210, 1024, 4 * 110)


def write_file(path: Path, pairs: made.Pairs = PAIRS, specs: made.Specs = SPECS) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(made.written_by_plan(plan_gguf(pairs, specs), list(specs)))
    return path


def write_parts(folder: Path, limit_bytes: int = 1000) -> list[Path]:
    """The tensors above in three parts."""
    folder.mkdir(exist_ok=True)
    plans = plan_parts(PAIRS, SPECS, "tiny", limit_bytes, CONVERTER)
    for name, plan in plans.items():
        (folder / name).write_bytes(made.written_by_plan(plan, [s for s in SPECS if s.name in plan.offsets]))
    return [folder / name for name in plans]


def problems(target: Path, deep: bool = False) -> tuple[str, ...]:
    found = shardq.verify(target, deep=deep)
    assert found.foreign
    return found.problems


def inspect(target: Path) -> GgufInspection:
    found = shardq.inspect(target)
    assert isinstance(found, GgufInspection)
    return found


def test_headers_tell_all_that_inspect_shows(tmp_path: Path) -> None:
    write_file(tmp_path / "models" / "tiny-IQ3_M.gguf")
    (tmp_path / "models" / "README.md").write_text("#")
    found = inspect(tmp_path / "models")
    (model,) = found.models
    assert (found.label, found.commit, found.warnings) == ("models", None, ())
    assert (model.name, model.title, model.architecture, model.file_type) == ("tiny-IQ3_M", "A?B", "llama", "IQ3_M")
    assert (model.files, model.parts, model.tensors, model.size_bytes) == (1, 1, 3, sum(SIZES))
    assert model.parameters == 256 * 8
    assert model.bits_per_weight == pytest.approx(8 * sum(SIZES) / 2048)
    assert model.types == (TypeCount("F32", 1, 1024), TypeCount("Q6_K", 1, 630), TypeCount("IQ3_S", 1, 440))


def test_a_file_is_a_source_and_brings_its_other_parts(tmp_path: Path) -> None:
    paths = write_parts(tmp_path / "models")
    write_file(tmp_path / "models" / "other.gguf")
    assert [m.name for m in inspect(tmp_path / "models").models] == ["other", "tiny"]
    for path in paths:
        (model,) = inspect(path).models
        assert (model.name, model.files, model.parts, model.tensors) == ("tiny", 3, 3, 3)
    (model,) = inspect(tmp_path / "models" / "other.gguf").models
    assert (model.name, model.files) == ("other", 1)
    assert problems(paths[1]) == problems(tmp_path / "models") == ()
    with pytest.raises(UnsupportedSource, match="only GGUF files"):
        shardq.plan(paths[0])
    with pytest.raises(SourceUnreadable, match="is a file"):
        shardq.inspect(write_file(tmp_path / "models" / "tiny.bin"))


def test_parts_in_folders_and_models_of_one_repo_are_told_apart() -> None:
    names = [
        "Q4/a-00002-of-00002.gguf",
        "Q4/a-00001-of-00002.gguf",
        "a.gguf",
        "b-00001-of-00001.gguf",
        "b-00003-of-00002.gguf",
    ]
    models = {m.name: m for m in find_models([SourceFile(n, 1, None) for n in sorted(names)])}
    assert {name: (m.count, len(m.files)) for name, m in models.items()} == {
        "Q4/a": (2, 2), "a": (0, 1), "b": (1, 1), "b-00003-of-00002": (0, 1),
    }  # fmt: skip
    assert models["Q4/a"].names == ("Q4/a-00001-of-00002.gguf", "Q4/a-00002-of-00002.gguf")


def test_missing_and_exchanged_parts_are_told(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    data = [p.read_bytes() for p in paths]
    paths[1].unlink()
    missing = f"{paths[1].name} is missing: get it again"
    assert problems(tmp_path) == (missing,)
    assert inspect(tmp_path).warnings == (f"{missing}.",)
    paths[1].write_bytes(data[2])
    assert problems(tmp_path) == (
        f"{paths[1].name} says that it is part 2, counted from 0: expected 1",
        f"tensor 'blk.0.ffn_up.weight' is in {paths[1].name} and in {paths[2].name}",
        *(f"{p.name} says that all parts have 3 tensors: expected 2" for p in paths),
    )
    for path in paths:
        path.unlink()
    (tmp_path / "renamed.gguf").write_bytes(data[1])
    assert problems(tmp_path)[0] == "renamed.gguf says that it is one of 3 parts: expected 1"
    assert problems(tmp_path)[-1] == "renamed.gguf does not say its general.architecture: no loader takes it"
    one = tmp_path / part_name("tiny", 0, 4)
    one.write_bytes(data[0])
    (tmp_path / "renamed.gguf").unlink()
    assert problems(tmp_path)[0] == f"{part_name('tiny', 1, 4)} and 2 more of 4 parts is missing: get it again"


@pytest.mark.parametrize("size", [0, 3, 100, 500, -1])
def test_truncated_files_are_problems_and_errors(size: int, tmp_path: Path) -> None:
    path = write_file(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: size if size >= 0 else len(data) - 40])
    (problem,) = problems(tmp_path)
    assert problem.startswith("GGUF file tiny.gguf, byte ")
    with pytest.raises(CorruptShard, match=r"GGUF file tiny\.gguf, byte "):
        shardq.inspect(tmp_path)


def test_types_that_nobody_knows_are_told(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(made.pack((), [made.info("a", kind=99)], 32))
    (problem,) = problems(tmp_path)
    assert "unknown type 99" in problem


def test_deep_reads_numbers_where_a_kernel_knows_their_type(tmp_path: Path) -> None:
    path = write_file(tmp_path / "tiny.gguf")
    begins = {
        t.name: t.begin
        for t in read_gguf_headers(open_source(str(tmp_path)), open_source(str(tmp_path)).files())["tiny.gguf"].tensors
    }
    data = bytearray(path.read_bytes())
    for row in range(3):  # halves of blocks of Q6_K that are numbers
        struct.pack_into("<e", data, begins["token_embd.weight"] + 210 * row + 208, 0.5)
    struct.pack_into("<256f", data, begins["blk.0.attn_norm.weight"], *range(256))
    path.write_bytes(data)
    found = shardq.verify(tmp_path, deep=True)
    assert (found.problems, found.notes) == ((), ("tiny.gguf has tensors in IQ3_S, which were not decoded.",))
    for name, at, bad, row in (
        ("token_embd.weight", 210 + 208, struct.pack("<e", float("inf")), 1),
        ("blk.0.attn_norm.weight", 4 * 200, struct.pack("<f", float("nan")), 0),
    ):
        damaged = bytearray(data)
        damaged[begins[name] + at : begins[name] + at + len(bad)] = bad
        path.write_bytes(damaged)
        assert problems(tmp_path) == ()
        (problem,) = problems(tmp_path, deep=True)
        assert problem.startswith(f"{name} in tiny.gguf has a number in row {row} that is NaN or infinite")


@pytest.mark.parametrize(
    "kind", ["F16", "BF16", "F64", "Q4_0", "Q8_0", "Q4_K", "IQ4_NL", "IQ4_XS", "Q3_K", "Q2_K", "MXFP4", "TQ2_0"]
)
def test_each_type_with_bad_scales_is_found(kind: str, tmp_path: Path) -> None:
    spec = GgufSpec("a", kind, (256, 2))
    path = write_file(tmp_path / "tiny.gguf", PAIRS, [spec])
    size = path.stat().st_size
    plan = plan_gguf(PAIRS, [spec])
    begin, end = plan.offsets["a"]
    path.write_bytes(path.read_bytes()[:begin] + bytes(end - begin) + bytes(size - end))
    assert problems(tmp_path, deep=True) == ()
    path.write_bytes(path.read_bytes()[:begin] + b"\xff" * (end - begin) + bytes(size - end))
    (problem,) = problems(tmp_path, deep=True)
    assert problem.startswith("a in tiny.gguf has a number in row 0")


def test_there_is_nothing_to_compare_others_with(tmp_path: Path) -> None:
    write_file(tmp_path / "tiny.gguf")
    with pytest.raises(BadOption, match="--source has nothing to compare with"):
        shardq.verify(tmp_path, source="demo")
    with pytest.raises(VerifyFailed, match=r"no shardq\.json"):
        shardq.audit(tmp_path, source="demo")


def test_names_of_file_types_are_those_of_gguf() -> None:
    gguf = pytest.importorskip("gguf", reason="the names are those of the package gguf")
    theirs = {
        int(t): t.name.removeprefix("MOSTLY_").removeprefix("ALL_") for t in gguf.LlamaFileType if t.name != "GUESSED"
    }
    assert {n: name_file_type(n) for n in theirs} == theirs
    assert {*theirs, 41} == {*OTHERS, *(t.number for t in FILE_TYPES)}
    assert name_file_type(5) is name_file_type("Q4_0") is name_file_type(None) is None


def test_keys_of_parts_may_be_of_any_type(tmp_path: Path) -> None:
    """A hostile header: values are compared, not computed with."""
    odd = [KeyValue("split.count", "string", "x" * 1000), KeyValue("split.no", "f32", float("nan"))]
    write_file(tmp_path / "tiny.gguf", [*PAIRS[:1], *odd, KeyValue("general.file_type", "string", "\x1b[2J")])
    (model,) = inspect(tmp_path).models
    assert model.file_type == r"'\x1b[2J'"
    source = open_source(str(tmp_path))
    (found,) = find_models(source.files())
    (problem,) = check_parts(found, read_gguf_headers(source, source.files()))
    assert len(problem) < 200
    assert problem.isascii()
