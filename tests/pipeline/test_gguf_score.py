"""GGUF files of anyone beside their source: the figures that a run measured while it quantized, found again by a
reader of the file alone; and what is told of files that do not belong to their source."""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_files_made as files_made
import gguf_models_made as models_made
import numpy as np
import pytest
from click.testing import CliRunner
from gguf_blocks_made import write_gguf
from gguf_checkpoints_made import write

import shardq
from shardq import Limits, make_recipe
from shardq.block_tasks import BlocksTask
from shardq.cli.group import commands
from shardq.errors import (
    BadOption,
    CheckpointIncomplete,
    CorruptShard,
    MissingPackage,
    ShardqError,
    UnknownDtype,
    UnsupportedSource,
)
from shardq.figures import Figures, merge_figures
from shardq.files.gguf_read import read_gguf
from shardq.ggml import GGML
from shardq.gguf.contents import find_contents
from shardq.gguf.options import GgufOptions
from shardq.gguf_expected import expect_rows
from shardq.headers import read_checkpoint
from shardq.kernels import load
from shardq.ledger import LEDGER, decode_ledger
from shardq.outputs import PROVENANCE
from shardq.quant_score import score_result
from shardq.scored import Score, Scored
from shardq.sources import open_source

pytest.importorskip("gguf", reason="names of GGUF tensors come from the package gguf")
pytest.importorskip("tokenizers", reason="vocabularies are read with the package tokenizers")

ALONE = Limits(parallel=1)
Made = tuple[Path, Path]  # source, output


def quantize(source: Path, out: Path, kind: str, **options: Any) -> dict[str, Any]:
    """GGUF files of a checkpoint without what says that they are ours; returns their ledger's weights."""
    recipe = make_recipe(f"gguf:{kind}", gguf=GgufOptions(**options))
    shardq.quantize(source, recipe, output_dir=out, limits=ALONE)
    ledger: dict[str, Any] = decode_ledger((out / LEDGER).read_bytes())["tensors"]
    for name in (LEDGER, PROVENANCE):
        (out / name).unlink()
    return ledger


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A tiny Llama whose rope is computed and whose head is its embedding, in one file; read only."""
    folder = tmp_path_factory.mktemp("llama")
    case = models_made.MODELS["llama_rope"]
    source = write(case, folder)
    quantize(source, folder / "out", "Q8_0", tokenizer_pre=case.pre)
    return source, folder / "out"


@pytest.fixture
def copy(llama: Made, tmp_path: Path) -> Path:
    """Its file, free to be damaged."""
    return Path(shutil.copy(only(llama[1]), tmp_path / "copy.gguf"))


def only(folder: Path) -> Path:
    (path,) = folder.glob("*.gguf")
    return path


def by_name(found: Score) -> dict[str, Scored]:
    return {t.name: t for t in found.tensors}


# --- figures ---------------------------------------------------------------------------------------------------------

ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("Q4_K_M", {}),  # rows of heads change places
    "phi3": ("Q5_K_M", {}),  # one weight becomes several tensors
    "deepseek3": ("Q6_K", {}),  # columns become rows
    "gpt_oss": ("MXFP4_MOE", {}),  # codes are carried, biases of experts are stacked
    "gpt_oss_bf16": ("Q4_0", {}),  # experts are turned, gate and up rows alternate
    "qwen2moe": ("Q3_K_M", {"max_part_bytes": 1_000_000}),  # stacks of experts, several files
    "qwen3moe": ("IQ4_XS", {}),
    "gemma2": ("Q2_K", {}),  # norms grow by one
    "gemma3": ("IQ4_NL", {}),  # the embedding loses rows
    "qwen35": ("Q4_K_M", {"max_part_bytes": 1_000_000}),  # columns change places
    "qwen3next": ("Q5_1", {}),  # heads of rows go into two tensors
    "qwen35_f16": ("Q4_1", {}),
    "phi3_f32": ("Q5_0", {}),
    "mixtral": ("TQ1_0", {"pure": True}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_figures_are_those_of_the_run(name: str, tmp_path: Path) -> None:
    made = files_made.FILES[name]
    kind, options = ARCHITECTURES[name]
    source = files_made.write(made, tmp_path)
    ledger = quantize(source, tmp_path / "out", kind, tokenizer_pre=made.case.pre, **options)
    found = shardq.score(tmp_path / "out", source, full=True)
    assert (found.lacking, found.extra, found.left, found.moved) == ((), (), {}, ())
    tensors = by_name(found)
    assert tensors.keys() == {t.name for path in (tmp_path / "out").glob("*.gguf") for t in read_gguf(path).tensors}
    assert found.matrices == sum(t.kind != "" for t in found.tensors) > 0
    quantized = {n: e for n, e in ledger.items() if e["outcome"] == "quantized"}
    joined: dict[frozenset[str], list[str]] = {}  # tensors -> weights, all that go into them and nowhere else
    for weight, entry in quantized.items():
        joined.setdefault(frozenset(t for t in entry["outputs"] if tensors[t].kind), []).append(weight)
    assert sorted(t for own in joined for t in own) == sorted(t.name for t in found.tensors if t.kind)
    for names, weights in joined.items():
        mine = merge_figures(tensors[n].errors.figures for n in names)
        entries = [quantized[w] for w in weights]
        keys = ("squared_error", "squared_weight", "max_error")
        told = merge_figures(Figures(*(e[k] for k in keys), zeroed_groups=e["zeroed_groups"]) for e in entries)
        assert (mine.max_error, mine.zeroed_groups) == (told.max_error, told.zeroed_groups)
        if len(names) > 1:  # sums of rounded sums
            assert mine.squared_error == pytest.approx(told.squared_error, rel=1e-14)
            continue
        assert (mine.squared_error, mine.squared_weight) == (told.squared_error, told.squared_weight)
        (tensor,) = names
        if len(weights) == 1:
            described = tensors[tensor].errors.describe()
            assert {k: v for k, v in described.items() if k != "saturated_share"} == {
                k: v for k, v in quantized[weights[0]].items() if k in described and k != "saturated_share"
            }
            assert tensors[tensor].origin == weights[0]
        assert tensors[tensor].errors.weights == np.prod(tensors[tensor].shape)


def check_cover(folder: Path, rows: int) -> None:
    """What is read for some rows has them, none twice, and of others no more than what is cut with them."""
    source, kernels = open_source(str(folder)), load()
    contents = find_contents(read_checkpoint(source), source)
    expected = expect_rows(contents, source)
    for name, content in contents.tensors.items():
        count = int(np.prod(content.shape[1:]))
        takes = [(m, t) for m in expected.made.get(name, ()) if isinstance(m.work, BlocksTask) for t in m.takes]
        runs = [m.work.columns if t.turned else t.order.run if t.order else 0 for m, t in takes]
        for first in {0, count // 3, max(0, count - rows)}:
            wanted = range(first, min(count, first + rows))
            windows = [(first, first + 1), (min(first + 2, wanted.stop - 1), wanted.stop)]
            found = expected.rows(name, windows, kernels)
            read = [at + i for at, some in found for i in range(len(some))]
            assert len(set(read)) == len(read), name
            assert {row for window in windows for row in range(*window)} <= set(read), name
            assert not runs or len(read) <= len(wanted) + 2 * max(runs), name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_of_a_sample_are_the_right_ones(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that has lost nothing: any other row would differ."""
    made = files_made.FILES[name]
    source = files_made.write(made, tmp_path)
    quantize(source, tmp_path / "out", "F32", tokenizer_pre=made.case.pre)
    for key, value in {"SAMPLED_WEIGHTS": 6000, "WINDOWS": 3, "ROWS": 1}.items():
        monkeypatch.setattr(f"shardq.scoring.{key}", value)
    monkeypatch.setattr("shardq.scored.WINDOW_BYTES", 5_000)
    monkeypatch.setattr("shardq.gguf_rows.SLAB_BYTES", 9_000)
    monkeypatch.setattr("shardq.gguf_rows.WINDOW_BYTES", 3_000)
    found = shardq.score(only(tmp_path / "out"), source)
    assert (found.lacking, found.extra, found.moved) == ((), (), ())
    check_cover(source, 7)
    assert all(t.same for t in found.tensors if not t.kind)
    assert any(t.rows < np.prod(t.shape[:-1]) for t in found.tensors if len(t.shape) == 2)
    assert not found.left


def test_a_file_may_be_the_source(llama: Made, tmp_path: Path) -> None:
    source, out = llama
    quantize(source, tmp_path / "plain", "BF16", tokenizer_pre=models_made.MODELS["llama_rope"].pre)
    beside = shardq.score(out, tmp_path / "plain", full=True)
    direct = shardq.score(out, source, full=True)
    assert (beside.source_file, direct.source_file) == (only(tmp_path / "plain").stem, None)
    assert [replace(t, origin="") for t in direct.tensors] == list(beside.tensors)
    assert beside.lacking == beside.extra == beside.moved == ()
    assert not any(t.same for t in beside.tensors if t.kind)


def test_quantized_sources_are_decoded(tmp_path: Path) -> None:
    """Codes that lie in columns, and codes in rows with their scales."""
    made = files_made.FILES["qwen2"]
    plain = files_made.write(made, tmp_path)
    for scheme in ("W8A16@gptq", "FP8_BLOCK@fp8"):
        source = tmp_path / scheme / "Codes-1B"
        shardq.quantize(plain, make_recipe(scheme, ragged="keep"), output_dir=source, limits=ALONE)
        ledger = quantize(source, tmp_path / scheme / "out", "Q4_K_M", tokenizer_pre=made.case.pre)
        found = by_name(shardq.score(tmp_path / scheme / "out", source, full=True))
        down = ledger["model.layers.0.mlp.down_proj.weight"]
        for key in ("squared_error", "squared_weight", "max_error"):
            assert found["blk.0.ffn_down.weight"].errors.describe()[key] == down[key]


def test_a_flipped_block_changes_its_tensor_alone(llama: Made, copy: Path) -> None:
    before = by_name(shardq.score(copy, llama[0]))
    name = "blk.1.attn_k.weight"
    (t,) = (t for t in read_gguf(copy).tensors if t.name == name)
    data = bytearray(copy.read_bytes())
    data[t.begin + 34 * 7 + 3] ^= 0x40
    copy.write_bytes(data)
    after = by_name(shardq.score(copy, llama[0]))
    assert {n for n in before if before[n] != after[n]} == {name}
    assert after[name].errors.max_error > before[name].errors.max_error
    data[t.begin + 34 * 7 + 1] |= 0x7C  # a scale that is infinite or NaN
    copy.write_bytes(data)
    broken = by_name(shardq.score(copy, llama[0]))[name]
    assert not np.isfinite(broken.errors.figures.squared_error)
    assert not broken.same


# --- files of others -------------------------------------------------------------------------------------------------


def test_what_does_not_belong_together_is_told(llama: Made, tmp_path: Path) -> None:
    """A file of another version: a tensor less, one more, one of another shape, and a norm that was trained."""
    path = only(llama[1])
    header, data = read_gguf(path), path.read_bytes()
    tensors = {
        t.name: (t.type, np.frombuffer(data[t.begin : t.end], np.uint8).reshape(-1, row_bytes(t.type, t.shape[0])))
        for t in header.tensors
    }
    del tensors["rope_freqs.weight"]
    tensors["output.weight"] = tensors["token_embd.weight"]
    kind, rows = tensors["blk.0.ffn_up.weight"]
    tensors["blk.0.ffn_up.weight"] = kind, rows[:-1]
    norm = tensors["blk.0.attn_norm.weight"][1].view(np.float32)
    tensors["blk.0.attn_norm.weight"] = "F32", norm * np.float32(2)
    found = shardq.score(write_gguf(tmp_path / "other.gguf", tensors), llama[0])
    assert found.lacking == ("rope_freqs.weight",)
    assert found.extra == ("output.weight",)
    assert found.moved == ("blk.0.attn_norm.weight",)
    count = rows.shape[0]
    assert found.left == {"blk.0.ffn_up.weight": f"[{count - 1}, 64] there, [{count}, 64] in the source"}


def row_bytes(kind: str, columns: int) -> int:
    return columns // GGML[kind].block_weights * GGML[kind].block_bytes


def test_a_source_with_nan_leaves_its_tensor_out(llama: Made, tmp_path: Path) -> None:
    source = Path(shutil.copytree(llama[0], tmp_path / "source"))
    (path,) = source.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, _ = json.loads(data[8 : 8 + length])["model.layers.1.mlp.up_proj.weight"]["data_offsets"]
    data[8 + length + begin : 8 + length + begin + 2] = b"\xc0\x7f"
    path.write_bytes(data)
    found = shardq.score(llama[1], source)
    assert list(found.left) == ["blk.1.ffn_up.weight"]
    assert "holds nan" in found.left["blk.1.ffn_up.weight"]


# --- one of several, and what is refused ------------------------------------------------------------------------------


@pytest.fixture
def shelf(llama: Made, tmp_path: Path) -> Path:
    """A folder as published ones are: several models, one of them in parts below."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    shutil.copy(only(llama[1]), folder / "tiny-Q8_0.gguf")
    pre = models_made.MODELS["llama_rope"].pre
    quantize(llama[0], tmp_path / "q5", "Q5_0", tokenizer_pre=pre)
    shutil.copy(only(tmp_path / "q5"), folder / "tiny-Q5_0.gguf")
    quantize(llama[0], tmp_path / "parts", "Q4_0", tokenizer_pre=pre, max_part_bytes=60_000)
    (folder / "Q4").mkdir()
    for path in (tmp_path / "parts").glob("*.gguf"):
        shutil.copy(path, folder / "Q4" / path.name)
    return folder


def test_one_of_several_models_is_chosen(shelf: Path, llama: Made) -> None:
    parts = sorted(p.relative_to(shelf).as_posix() for p in (shelf / "Q4").iterdir())
    stem = parts[0].partition("-00001")[0]
    for wanted, name in {"q8_0": "tiny-Q8_0", "tiny-Q5_0.gguf": "tiny-Q5_0", parts[1]: stem, stem: stem}.items():
        found = shardq.score(shelf, llama[0], file=wanted)
        assert found.file == name
        assert found.lacking == found.extra == ()
    kinds = {t.kind for t in shardq.score(shelf, llama[0], file="Q4").tensors}
    assert "Q4_0" in kinds
    assert shardq.score(shelf / "tiny-Q8_0.gguf", shelf, source_file="Q5").source_file == "tiny-Q5_0"
    names = f"{stem}, tiny-Q5_0, tiny-Q8_0"
    beside = Path(shutil.copytree(llama[0], shelf.parent / "beside"))  # as a repo that has both
    shutil.copy(shelf / "tiny-Q5_0.gguf", beside)
    assert shardq.score(beside, llama[0]).file is None
    assert shardq.score(beside, llama[0], file="Q5").file == "tiny-Q5_0"
    assert shardq.score(shelf / "tiny-Q8_0.gguf", beside).source_file is None
    refused = {None: f"with --file: {names}", "IQ1": f"fits none .*{names}", "TINY-Q": f"fits 3 .*{names}"}
    for wanted, told in refused.items():
        with pytest.raises(BadOption, match=told):
            shardq.score(shelf, llama[0], file=wanted)
    with pytest.raises(BadOption, match="with --source-file"):
        shardq.score(shelf / "tiny-Q8_0.gguf", shelf)


def test_what_cannot_be_compared_is_refused(shelf: Path, llama: Made, tmp_path: Path) -> None:
    source, one = llama[0], shelf / "tiny-Q8_0.gguf"
    shardq.quantize("demo", "W4A16", output_dir=tmp_path / "w4", limits=ALONE)
    config = json.loads((Path(shutil.copytree(source, tmp_path / "t5")) / "config.json").read_text())
    (tmp_path / "t5" / "config.json").write_text(json.dumps({**config, "architectures": ["T5Model"]}))
    other = write_gguf(tmp_path / "other.gguf", {"a": ("F32", np.ones((1, 4), np.float32))}, "qwen2")
    rows: tuple[tuple[Any, Any, Mapping[str, str], type[ShardqError], str], ...] = (
        (tmp_path / "w4", one, {}, UnsupportedSource, "w4 is not in GGUF: expected the checkpoint"),
        (tmp_path / "w4", "demo", {"file": "Q4"}, BadOption, "w4 holds no GGUF files: leave --file out"),
        (one, source, {"source_file": "Q4"}, BadOption, "holds no GGUF files: leave --source-file out"),
        (other, source, {}, UnsupportedSource, "architecture is 'qwen2', and that of tiny is 'llama'"),
        (one, tmp_path / "t5", {}, UnsupportedSource, "names architecture 'T5Model'; GGUF is written for"),
    )
    for result, original, words, error, told in rows:
        with pytest.raises(error, match=told):
            shardq.score(result, original, **words)
    part = max((shelf / "Q4").iterdir())
    part.unlink()
    with pytest.raises(CheckpointIncomplete, match=f"{part.name} is missing"):
        shardq.score(shelf, source, file="Q4")


def test_names_need_the_package(llama: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingPackage, match=r"install shardq\[gguf\]"):
        shardq.score(llama[1], llama[0])


def error_of(result: Path, source: Path) -> str:
    """What a score is refused with, or nothing."""
    try:
        shardq.score(result, source, sample=1)
    except (CorruptShard, UnknownDtype, UnsupportedSource, CheckpointIncomplete) as e:
        return str(e)
    return ""


def test_a_header_that_lies_is_told_in_one_line(llama: Made, copy: Path) -> None:
    data, end = copy.read_bytes(), read_gguf(copy).header_bytes_len
    copy.write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptShard, match="is missing, there are"):
        shardq.score(copy, llama[0])
    told = []
    for at in range(0, end, end // 60):
        copy.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        told.append(error_of(copy, llama[0]))
    assert any(told)
    assert "\n" not in "".join(told)
    assert "".join(told).isascii()


# --- repos and the command -------------------------------------------------------------------------------------------


def test_a_sample_from_a_repo_reads_little(tmp_path: Path, hub: Any, make_model: Callable[[Path], Any]) -> None:
    made = files_made.FILES["qwen2moe"]
    source = files_made.write(made, tmp_path)
    quantize(source, tmp_path / "out", "Q8_0", tokenizer_pre=made.case.pre)
    whole = by_name(shardq.score(tmp_path / "out", source))
    remote = make_model(tmp_path / "out")
    hub.log.clear()
    found = score_result(remote.open(), open_source(str(source)), sample=2)
    assert sum(t.kind != "" for t in found.tensors) == 2 < found.matrices
    assert all(t == whole[t.name] for t in found.tensors)
    assert found.result_commit == remote.hub.repos["org/model"].refs["main"]
    assert all(seen.range for seen in hub.seen("/store/"))
    sent = sum(seen.sent_bytes for seen in hub.seen("/store/"))
    assert sent < only(tmp_path / "out").stat().st_size / 3


def test_a_source_in_a_repo_is_read_by_ranges(
    tmp_path: Path, hub: Any, make_model: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = files_made.FILES["qwen2"]
    source = files_made.write(made, tmp_path)
    quantize(source, tmp_path / "out", "Q4_0", tokenizer_pre=made.case.pre)
    for key, value in {"SAMPLED_WEIGHTS": 9000, "WINDOWS": 2, "ROWS": 16}.items():
        monkeypatch.setattr(f"shardq.scoring.{key}", value)
    local = shardq.score(tmp_path / "out", source)
    remote = make_model(source)
    hub.log.clear()
    found = score_result(open_source(str(tmp_path / "out")), remote.open())
    assert found.tensors == local.tensors
    size = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    assert sum(remote.sent().values()) < size / 2
    assert not hub.seen("tokenizer.json")


def test_the_command_shows_files_and_weights(shelf: Path, llama: Made) -> None:
    words = ["score", str(shelf), "--file", "Q8_0", "--source", str(llama[0])]
    done = CliRunner().invoke(commands, words)
    assert done.exit_code == 0, done.output
    assert "file          tiny-Q8_0\n" in done.stdout
    assert "blk.0.attn_k.weight" in done.stdout
    told = json.loads(CliRunner().invoke(commands, [*words, "--json"]).stdout)
    assert (told["file"], told["source_file"], told["not_compared"]) == ("tiny-Q8_0", None, {})
    query = told["tensors"]["blk.0.attn_q.weight"]
    assert (query["weight"], query["codes"]) == ("model.layers.0.self_attn.q_proj.weight", "Q8_0")
    assert "weight" not in told["tensors"]["rope_freqs.weight"]
    several = CliRunner().invoke(commands, ["score", str(shelf), "--source", str(llama[0])])
    assert several.exit_code == BadOption.exit_code
