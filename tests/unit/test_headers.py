"""From a source to a Checkpoint: which files are the model, and what index and headers must agree on."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from network_source import NetworkSource

from shardq.checkpoint import Checkpoint
from shardq.errors import (
    CheckpointIncomplete,
    CorruptShard,
    ShardqError,
    SourceUnreadable,
    UnknownDtype,
    UnsupportedSource,
)
from shardq.files.safetensors import TensorSpec, plan_file
from shardq.headers import read_checkpoint, read_dump
from shardq.side_files import select_side_files
from shardq.sources.local import open_folder

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CONFIG = b'{"model_type": "llama"}'


def shard(*names: str, dtype: str = "U8", padding: int = 0) -> bytes:
    plan = plan_file([TensorSpec(n, dtype, (2, 4)) for n in names])
    body = plan.header[8:] + b" " * padding
    return len(body).to_bytes(8, "little") + body + bytes(plan.size_bytes - len(plan.header))


def index(weight_map: Mapping[str, str]) -> bytes:
    return json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}).encode()


def model(**changes: bytes | None) -> dict[str, bytes]:
    """Two shards with index and config; `changes` replaces or removes by short name."""
    files = {
        "one": shard("b", "a"),
        "two": shard("c"),
        "index": index({"a": ONE, "b": ONE, "c": TWO}),
        "config": CONFIG,
    }
    names = {"one": ONE, "two": TWO, "index": INDEX, "config": "config.json"}
    merged = {**files, **changes}
    return {names[k]: v for k, v in merged.items() if v is not None}


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read(files: Mapping[str, bytes], folder: Path) -> Checkpoint:
    """Read locally and remotely; both must agree."""
    local = read_checkpoint(open_folder(str(write(folder, files)), label="org/name"))
    remote = read_checkpoint(NetworkSource(files, []))
    assert local.tensors == remote.tensors
    assert local.warnings == remote.warnings
    assert [s.header_sha256 for s in local.shards] == [s.header_sha256 for s in remote.shards]
    return local


def refusal(files: Mapping[str, bytes], folder: Path) -> ShardqError:
    """The error, equal for a folder and a remote source."""
    with pytest.raises(ShardqError) as local:
        read_checkpoint(open_folder(str(write(folder, files)), label="org/name"))
    with pytest.raises(ShardqError) as remote:
        read_checkpoint(NetworkSource(files, []))
    assert str(local.value) == str(remote.value)
    assert type(local.value) is type(remote.value)
    assert "\n" not in str(local.value)
    return local.value


def test_indexed_checkpoint(tmp_path: Path) -> None:
    files = {**model(), "tokenizer.json": b"{}", "original/params.json": b"{ }"}
    c = read(files, tmp_path)
    assert [(t.name, t.shard, t.dtype, t.shape) for t in c.tensors.values()] == [
        ("a", ONE, "U8", (2, 4)),
        ("b", ONE, "U8", (2, 4)),
        ("c", TWO, "U8", (2, 4)),
    ]
    assert c.tensors["b"].end == len(files[ONE])
    assert c.tensors["a"].size_bytes == 8
    assert [s.name for s in c.shards] == [ONE, TWO]
    assert [s.size_bytes for s in c.shards] == [len(files[ONE]), len(files[TWO])]
    assert c.config == {"model_type": "llama"}
    assert c.config_bytes == CONFIG
    assert c.index_name == INDEX
    assert [(f.name, f.size_bytes) for f in c.side_files] == [
        ("original/params.json", 3),
        ("tokenizer.json", 2),
    ]
    assert c.warnings == ()


def test_shards_come_in_numeric_order(tmp_path: Path) -> None:
    names = {f"t{k}": f"model-{k}-of-11.safetensors" for k in range(1, 12)}
    files = {n: shard(t) for t, n in names.items()}
    c = read({**files, INDEX: index(dict(sorted(names.items()))), "config.json": CONFIG}, tmp_path)
    assert list(c.tensors) == list(names)


def test_single_file_and_missing_config(tmp_path: Path) -> None:
    c = read({"model.safetensors": shard("a")}, tmp_path)
    assert c.index_name is None
    assert c.config is None
    assert c.config_bytes is None
    assert len(c.warnings) == 1
    assert "No config.json" in c.warnings[0]


@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        (["diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model.safetensors"),
        (["gptq_model-4bit-128g.safetensors", "adapter_model.safetensors", "consolidated.safetensors"],
         "gptq_model-4bit-128g.safetensors"),
        (["model.safetensors", "model.fp16.safetensors", "consolidated.safetensors"], "model.safetensors"),
        (["model-00001-of-00001.safetensors"], "model-00001-of-00001.safetensors"),
    ],
)  # fmt: skip
def test_single_file_is_chosen(others: list[str], chosen: str, tmp_path: Path) -> None:
    c = read({n: shard(f"t{i}") for i, n in enumerate(others)} | {"config.json": CONFIG}, tmp_path)
    assert [s.name for s in c.shards] == [chosen]


@pytest.mark.parametrize(
    "names",
    [
        [f"model-0000{k}-of-00002.safetensors" for k in range(3)],
        [f"model-{k}-of-12.safetensors" for k in range(1, 13)],
        ["model_00001-of-00002.safetensors", "model_00002-of-00002.safetensors"],
        [f"model.safetensors-0000{k}-of-00002.safetensors" for k in (1, 2)],
    ],
)
def test_whole_numbered_set_without_index_is_taken_with_a_warning(names: list[str], tmp_path: Path) -> None:
    c = read({n: shard(f"t{i:02}") for i, n in enumerate(names)} | {"config.json": CONFIG}, tmp_path)
    assert [s.name for s in c.shards] == names
    assert list(c.tensors) == [f"t{i:02}" for i in range(len(names))]
    assert c.warnings[0].startswith("No index: the ")


REFUSED: dict[str, tuple[Mapping[str, bytes], type[ShardqError], str]] = {
    "nothing": ({"README.md": b""}, SourceUnreadable, "no weight files"),
    "subfolders only": (
        {"transformer/m.safetensors": b"", "vae/m.safetensors": b""},
        SourceUnreadable,
        "in subfolders: transformer, vae; choose one with --subfolder",
    ),
    "pickle": (
        {"pytorch_model.bin": b"", "config.json": CONFIG},
        UnsupportedSource,
        r"only pickle files \(pytorch_model.bin\); convert",
    ),
    "gguf": ({"m.gguf": b""}, UnsupportedSource, "only GGUF files"),
    "adapter": ({"adapter_model.safetensors": shard("a")}, UnsupportedSource, "merge it into its base model"),
    "consolidated": ({"consolidated.safetensors": shard("a")}, UnsupportedSource, "Mistral's own names"),
    "params.json only": (
        {
            "params.json": b"{}",
            "consolidated-00001-of-00001.safetensors": shard("a"),
            "consolidated.safetensors.index.json": index({"a": "consolidated-00001-of-00001.safetensors"}),
        },
        UnsupportedSource,
        "Mistral's own names",
    ),
    "pickle with index": (
        {"pytorch_model-1-of-1.bin": b"", "pytorch_model.bin.index.json": b"{}", "config.json": CONFIG},
        UnsupportedSource,
        r"only pickle files \(pytorch_model-1-of-1.bin\); convert",
    ),
    "two unrelated files": (
        {"x.safetensors": shard("a"), "y.safetensors": shard("b")},
        SourceUnreadable,
        "not clear: x.safetensors, y.safetensors",
    ),
    "two numbered sets": (
        {f"{s}-{k}-of-2.safetensors": shard(f"{s}{k}") for s in "xy" for k in (1, 2)},
        SourceUnreadable,
        "not clear",
    ),
    "numbered set without its first": ({TWO: shard("a")}, CheckpointIncomplete, "number 1 is missing"),
    "gap in numbered set": ({ONE: shard("a")}, CheckpointIncomplete, "number 2 is missing"),
    "numbers that go too far": (
        {ONE: shard("a"), TWO: shard("b"), "model-00003-of-00002.safetensors": shard("c")},
        CheckpointIncomplete,
        "number 3 is one too many",
    ),
    "zero-based set without its last": (
        {"model-0-of-2.safetensors": shard("a"), "model-1-of-2.safetensors": shard("b")},
        CheckpointIncomplete,
        "number 2 is missing",
    ),
    "two odd indexes": (
        {"x.safetensors.index.json": b"", "y.safetensors.index.json": b""},
        SourceUnreadable,
        "several indexes",
    ),
    "missing shard": (
        model(two=None),
        CheckpointIncomplete,
        f"shard {TWO} is missing, which the index names for tensor 'c'",
    ),
    "tensor missing from its shard": (
        model(two=shard("d")),
        CheckpointIncomplete,
        f"tensor 'c' is not in shard {TWO}, where the index has it nor in any other",
    ),
    "tensor in another shard": (
        model(index=index({"a": TWO, "b": ONE, "c": TWO})),
        CheckpointIncomplete,
        f"'a' is not in shard {TWO}, where the index has it, but is in {ONE}",
    ),
    "two copies and no index": ({ONE: shard("a"), TWO: shard("a")}, CorruptShard, f"'a' is in {ONE} and in {TWO}"),
    "two unlisted copies": (model(one=shard("a", "b", "x"), two=shard("c", "x")), CorruptShard, "no index says"),
    "truncated shard": (model(one=shard("a", "b")[:-1]), CorruptShard, f"{ONE} is truncated"),
    "tiny shard": (model(one=b"abc"), CorruptShard, f"{ONE} is truncated: 3 bytes"),
    "trailing bytes": (model(two=shard("c") + b"x"), CorruptShard, f"{TWO} has 1 trailing bytes"),
    "unknown dtype": (model(two=shard("c").replace(b'"U8"', b'"U7"')), UnknownDtype, f"shard {TWO}, tensor 'c'"),
    "index no JSON": (model(index=b"{"), SourceUnreadable, "index.json is not valid JSON"),
    "index no object": (model(index=b"[1]"), SourceUnreadable, "no weight_map"),
    "index empty": (model(index=index({})), SourceUnreadable, "no weight_map"),
    "index with numbers": (model(index=b'{"weight_map": {"a": 1}}'), SourceUnreadable, "'a' is mapped to 1"),
    "index escapes upwards": (
        model(index=index({"a": "../" + ONE})),
        SourceUnreadable,
        "which is no file of this folder",
    ),
    "index escapes to the root": (
        model(index=index({"a": "/etc/x.safetensors"})),
        SourceUnreadable,
        "which is no file of this folder",
    ),
    "index with a line break": (
        model(index=index({"a": "x\n.safetensors"})),
        SourceUnreadable,
        "which is no file of this folder",
    ),
    "index with a giant number": (
        model(index=index({"a": "9" * 5000 + ".safetensors", "b": ONE})),
        CheckpointIncomplete,
        "is missing, which the index names for tensor 'a'",
    ),
    "index of pickle files": (model(index=index({"a": "m.bin"})), UnsupportedSource, "not a safetensors file"),
    "config no JSON": (model(config=b"{"), SourceUnreadable, "config.json is not valid JSON"),
    "config no UTF-8": (model(config=b'{"\xff": 1}'), SourceUnreadable, "config.json is not valid JSON"),
    "config no object": (model(config=b"[]"), SourceUnreadable, "config.json is not a JSON object"),
    "config deep": (model(config=b"[" * 100_000), SourceUnreadable, "config.json is not valid JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_source_is_refused(case: str, tmp_path: Path) -> None:
    files, kind, message = REFUSED[case]
    error = refusal(files, tmp_path)
    assert type(error) is kind
    with pytest.raises(kind, match=message):
        raise error


def test_duplicate_sets_and_other_files_are_left_out(tmp_path: Path) -> None:
    """As in gpt-oss-20b (three copies), Mistral-7B (its own names beside) and BLOOM (pickle beside)."""
    extra = {
        "consolidated.safetensors": shard("native"), "consolidated.safetensors.index.json": index({"n": ONE}),
        "params.json": b"{}", "pytorch_model.bin": b"x", "model.gguf": b"x", "adapter_model.safetensors": shard("lora"),
        "original/model.safetensors": shard("a"), "metal/model.bin": b"x",
    }  # fmt: skip
    c = read({**model(), **extra}, tmp_path)
    assert [s.name for s in c.shards] == [ONE, TWO]
    assert list(c.tensors) == ["a", "b", "c"]
    assert [f.name for f in select_side_files(c.side_files)] == ["params.json"]


def test_index_of_a_variant_is_left_out_with_a_warning_or_taken_alone(tmp_path: Path) -> None:
    """As in Mochi: two precisions in one folder."""
    stem = "diffusion_pytorch_model"
    full, half = f"{stem}-00001-of-00001.safetensors", f"{stem}.bf16-00001-of-00001.safetensors"
    variant = {half: shard("h"), f"{stem}.safetensors.index.bf16.json": index({"h": half})}
    both = {full: shard("f"), f"{stem}.safetensors.index.json": index({"f": full}), **variant, "config.json": CONFIG}
    (tmp_path / "both").mkdir()
    c = read(both, tmp_path / "both")
    assert list(c.tensors) == ["f"]
    assert any("index.bf16.json" in w for w in c.warnings)
    assert any(half in w for w in c.warnings)
    (tmp_path / "alone").mkdir()
    c = read({**variant, "config.json": CONFIG}, tmp_path / "alone")
    assert (list(c.tensors), c.index_name) == (["h"], f"{stem}.safetensors.index.bf16.json")


@pytest.mark.parametrize("metadata", [{"metadata": {"total_size": 0}}, {"metadata": {}}, {}, {"metadata": None}])
def test_total_size_of_an_index_means_nothing(metadata: dict[str, Any], tmp_path: Path) -> None:
    raw = json.dumps({**metadata, "weight_map": {"a": ONE, "b": ONE, "c": TWO}}).encode()
    c = read(model(index=raw), tmp_path)
    assert (list(c.tensors), c.warnings) == (["a", "b", "c"], ())


def test_zero_based_shards_with_an_index(tmp_path: Path) -> None:
    names = {f"t{k}": f"model-0000{k}-of-00002.safetensors" for k in range(3)}
    c = read({**{n: shard(t) for t, n in names.items()}, INDEX: index(names), "config.json": CONFIG}, tmp_path)
    assert (list(c.tensors), c.warnings) == (["t0", "t1", "t2"], ())


def test_buffers_may_be_in_the_index_only(tmp_path: Path) -> None:
    buffers = {"layers.0.self_attn.rotary_emb.inv_freq": ONE, "h.0.attn.masked_bias": TWO, "position_ids": TWO}
    c = read(model(index=index({"a": ONE, "b": ONE, "c": TWO, **buffers})), tmp_path)
    assert list(c.tensors) == ["a", "b", "c"]
    assert len(c.warnings) == 1
    assert c.warnings[0].startswith("3 buffers are in the index but in no shard, and readers compute them: layers.0.")


def test_params_json_is_no_config(tmp_path: Path) -> None:
    c = read({"model.safetensors": shard("a"), "params.json": b"{}"}, tmp_path)
    assert c.config is None
    assert "params.json is not read" in c.warnings[0]


def test_text_behind_the_index_is_ignored_with_a_warning(tmp_path: Path) -> None:
    c = read(
        model(index=b" " + index({"a": ONE, "b": ONE, "c": TWO}) + b'\n{"weight_map": {"x": "y"}}'),
        tmp_path,
    )
    assert list(c.tensors) == ["a", "b", "c"]
    assert any("behind the end of the index" in w for w in c.warnings)


def test_unlisted_tensor_is_taken_with_a_warning(tmp_path: Path) -> None:
    c = read(model(index=index({"b": ONE, "c": TWO})), tmp_path)
    assert list(c.tensors) == ["a", "b", "c"]
    assert c.warnings == ("1 tensors are in shards but not in the index and were taken: a, ...",)


def test_copy_that_the_index_does_not_name_is_left_out_with_a_warning(tmp_path: Path) -> None:
    c = read(model(two=shard("a", "c")), tmp_path)
    assert c.tensors["a"].shard == ONE
    assert len(c.tensors) == 3
    assert c.warnings[0].startswith("1 tensors are also in shards")


def test_unlisted_file_and_second_index_are_left_out_with_warnings(tmp_path: Path) -> None:
    extra = {"mtp.safetensors": shard("m"), "diffusion_pytorch_model.safetensors.index.json": b"{}"}
    c = read({**model(), **extra}, tmp_path)
    assert list(c.tensors) == ["a", "b", "c"]
    assert any("mtp.safetensors" in w for w in c.warnings)
    assert any("diffusion_pytorch_model.safetensors.index.json" in w for w in c.warnings)
    assert {f.name for f in c.side_files} == set(extra)


def test_index_may_name_shards_in_a_subfolder(tmp_path: Path) -> None:
    files = {
        "w/x.safetensors": shard("a"),
        INDEX: index({"a": "w/x.safetensors"}),
        "config.json": CONFIG,
    }
    assert read(files, tmp_path).tensors["a"].shard == "w/x.safetensors"


def test_remote_header_takes_one_request_and_a_long_one_two() -> None:
    files = {"model.safetensors": shard("a"), "config.json": CONFIG}
    source = NetworkSource(files, [])
    read_checkpoint(source)
    assert len([r for r in source.reads if r[0] == "model.safetensors"]) == 1
    long = shard("a", padding=300_000)
    source = NetworkSource({"model.safetensors": long, "config.json": CONFIG}, [])
    assert read_checkpoint(source).tensors["a"].end == len(long)
    assert [r[1:] for r in source.reads if r[0] == "model.safetensors"] == [
        (0, 262_144),
        (262_144, len(long) - 8),
    ]


def test_lying_remote_header_length_is_never_downloaded() -> None:
    lie = (99_000_000).to_bytes(8, "little") + b"{}" + bytes(1000)
    source = NetworkSource({"model.safetensors": lie}, [])
    with pytest.raises(CorruptShard, match="truncated: its header needs 99000008"):
        read_checkpoint(source)
    assert source.reads == [("model.safetensors", 0, len(lie))]


def dump(folder: Path, files: Mapping[str, Any]) -> Path:
    for name, value in files.items():
        raw = json.dumps(value).encode()
        (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return folder


def test_dump_with_headers_has_the_offsets_of_the_real_file(tmp_path: Path) -> None:
    recorded = {ONE: {"b": ["U8", [2, 4]], "a": ["U8", [2, 4]]}, TWO: {"c": ["U8", [2, 4]]}}
    folder = dump(
        tmp_path,
        {"headers.json.gz": recorded, INDEX: {}, "config.json": {"x": 1}, "params.json": {}},
    )
    c = read_dump(folder)
    real = read_checkpoint(NetworkSource(model(), []))
    assert c.tensors == real.tensors
    assert [(s.name, s.size_bytes) for s in c.shards] == [(s.name, s.size_bytes) for s in real.shards]
    assert c.config == {"x": 1}
    assert c.index_name == INDEX
    assert [f.name for f in c.side_files] == ["params.json"]


def test_dump_with_an_index_only_has_names_only(tmp_path: Path) -> None:
    files = {
        "pytorch_model.bin.index.json": {"weight_map": {"a": "m.bin"}},
        "X__model.safetensors.index.json.gz": {"weight_map": {"b": TWO, "a": ONE}},
        "X__config.json": {"x": 2},
    }
    c = read_dump(dump(tmp_path, files))
    assert list(c.tensors) == ["a", "b"]
    assert (
        c.tensors["a"].dtype,
        c.tensors["a"].shape,
        c.tensors["a"].begin,
        c.tensors["a"].size_bytes,
    ) == (None, None, -1, 0)
    assert c.config == {"x": 2}
    assert c.index_name == "X__model.safetensors.index.json"


@pytest.mark.parametrize(
    ("files", "kind", "message"),
    [
        ({"config.json": {}}, SourceUnreadable, "neither recorded headers .* nor an index"),
        (
            {"headers.json.gz": {"s": {"a": ["F7", [1]]}}},
            UnknownDtype,
            "shard s: unknown dtype 'F7'",
        ),
        ({"headers.json.gz": {"s": {"a": ["F4", [1]]}}}, SourceUnreadable, "whole byte"),
        ({"headers.json.gz": {"s": {"a": 5}}}, SourceUnreadable, "expected {tensor"),
        ({"headers.json.gz": {"s": 5}}, SourceUnreadable, "expected {tensor"),
        ({"headers.json.gz": [1]}, SourceUnreadable, "not a JSON object"),
        (
            {"headers.json.gz": {s: {"a": ["U8", [1]]} for s in "xy"}},
            CorruptShard,
            "'a' is in x and in y",
        ),
    ],
)
def test_bad_dump_is_refused(files: Mapping[str, Any], kind: type[ShardqError], message: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=message):
        read_dump(dump(tmp_path, files))


def test_damaged_dump_is_refused(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"s": {"a": ["U8", [1]]}}')
    for raw in (b"no gzip", packed[:-9], packed[:12] + b"\xff\xff" + packed[14:]):
        (tmp_path / "headers.json.gz").write_bytes(raw)
        with pytest.raises(SourceUnreadable, match=r"headers\.json\.gz"):
            read_dump(tmp_path)
    with pytest.raises(SourceUnreadable, match="nowhere"):
        read_dump(tmp_path / "nowhere")


def test_large_dump_reads_quickly(tmp_path: Path) -> None:
    # the largest real dumps have 70,000 tensors; a quadratic step would take minutes here
    recorded = {
        f"model-{s}-of-40.safetensors": {f"layers.{s}.experts.{e}.w.weight": ["U8", [4]] for e in range(1000)}
        for s in range(40)
    }
    c = read_dump(dump(tmp_path, {"headers.json.gz": recorded}))
    assert len(c.tensors) == 40_000
