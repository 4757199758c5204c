"""Metadata, tensors, and the rows that these are made of, against what llama.cpp's converter made of the same."""

import itertools
import json
import sys
from hashlib import sha256
from typing import Any

import gguf_checkpoints_made as checkpoints
import gguf_models_made as made
import numpy as np
import pytest
from gguf_cases_made import CASES
from golden_gguf_model.dump_converter import shown
from numpy.typing import NDArray

from shardq.errors import MissingPackage, ShardqError, SourceUnreadable, UnsupportedSource
from shardq.files.gguf import KeyValue, plan_gguf
from shardq.gguf.metadata import find_metadata, find_tensors, order_quantized
from shardq.gguf.model_files import ModelFiles
from shardq.gguf.tensors import OutputTensor, Part, SourceTensor, file_spec
from shardq.regrouping import Regrouping

pytest.importorskip("gguf", reason="names of GGUF tensors come from the package gguf")
pytest.importorskip("tokenizers", reason="vocabularies are read with the package tokenizers")

BF16_TYPE, MXFP4_TYPE = 32, 38


def model(case: checkpoints.Case) -> ModelFiles:
    return ModelFiles(case.folder, checkpoints.side_files(case))


def shards(case: checkpoints.Case) -> list[list[SourceTensor]]:
    return [[SourceTensor(name, shape) for name, shape in case.shapes.items()]]


def golden(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoints.GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    return found


def as_stored(pair: KeyValue) -> list[Any]:
    value = list(pair.value) if isinstance(pair.value, tuple) else pair.value
    return [pair.key, pair.type, shown(pair.type, value)]


@pytest.mark.parametrize("name", CASES)
def test_metadata_is_the_converters(name: str) -> None:
    case = CASES[name]
    file_type = MXFP4_TYPE if "quantization_config" in case.config else BF16_TYPE  # the converter's names for its files
    pairs = find_metadata(model(case), find_tensors(model(case), shards(case)), file_type, case.pre)
    assert [as_stored(pair) for pair in pairs] == golden(name)["pairs"]


@pytest.mark.parametrize("name", CASES)
def test_tensors_are_the_converters_to_the_byte(name: str) -> None:
    case = CASES[name]
    found = []
    for tensor in find_tensors(model(case), shards(case)):
        spec = file_spec(tensor, "BF16")
        data = packed(tensor, case) if spec.type == "MXFP4" else unpacked(tensor, case)
        assert data.shape == tensor.shape or spec.type == "MXFP4", tensor.name
        raw = checkpoints.bf16(data) if spec.type == "BF16" else data.tobytes()
        found.append([spec.name, spec.type, list(tensor.shape), sha256(raw).hexdigest()])
    expected = golden(name)["tensors"]
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    assert found == expected


def unpacked(tensor: OutputTensor, case: checkpoints.Case) -> NDArray[np.float32]:
    """A tensor out of its parts, by the words of their descriptions."""
    if tensor.values:
        return np.array(tensor.values, np.float32)
    pieces = [rows_of(part, checkpoints.values(part.source, case.shapes[part.source])) for part in tensor.parts]
    data = np.concatenate([piece.reshape(-1) for piece in pieces]).reshape(tensor.shape)
    data = data + np.float32(tensor.added)
    return -np.exp(data.astype(np.float64)).astype(np.float32) if tensor.negative_exp else data


def swapped(place: int, order: Regrouping) -> int:
    """Which row comes to a place: the one that a loop over the axes finds there."""
    axes = itertools.product(range(order.outer), range(order.second), range(order.first), range(order.inner))
    o, s, f, i = next(itertools.islice(axes, place, None))
    return ((o * order.first + f) * order.second + s) * order.inner + i


@pytest.mark.parametrize("order", [Regrouping(3, 2, 5), Regrouping(1, 2, 3, 4), Regrouping(2, 5, 1, 2)])
def test_rows_are_found_where_they_were_and_where_they_are(order: Regrouping) -> None:
    assert order.origins(0, order.size).tolist() == [swapped(place, order) for place in range(order.size)]
    assert order.places(0, order.size)[order.origins(3, 9)].tolist() == list(range(3, 9))


def rows_of(part: Part, source: NDArray[Any]) -> NDArray[Any]:
    data = source.reshape(-1) if part.slice is None and source.ndim > 2 else source
    data = data if part.slice is None else data[part.slice]
    data = data[list(part.rows)]
    if part.columns is not None:
        data = data[:, list(part.columns)]
    if part.order:
        data = data[[swapped(place, part.order) for place in range(len(data))]]
    if part.column_order:
        data = data[:, [swapped(place, part.column_order) for place in range(data.shape[1])]]
    return data.T if part.turned else data


def packed(tensor: OutputTensor, case: checkpoints.Case) -> NDArray[np.uint8]:
    """MXFP4 as ggml has it: the scale first, and weights j and j+16 in one byte where the source has 2j and 2j+1."""
    found = []
    for part in tensor.parts:
        assert part.scales is not None
        blocks = rows_of(part, checkpoints.codes(part.source, case.shapes[part.source]))
        scales = rows_of(part, checkpoints.codes(part.scales, case.shapes[part.scales]))
        weights = np.stack((blocks & 15, blocks >> 4), axis=-1).reshape(*blocks.shape[:-1], 32)
        found.append(np.concatenate((scales[..., None], weights[..., :16] | weights[..., 16:] << 4), axis=-1))
    return np.stack(found).astype(np.uint8)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_a_header_can_be_planned_of_it(name: str) -> None:
    case = CASES[name]
    tensors = find_tensors(model(case), shards(case))
    pairs = find_metadata(model(case), tensors, BF16_TYPE, case.pre)
    plan = plan_gguf(pairs, [file_spec(tensor, "BF16") for tensor in tensors])
    assert len(plan.offsets) == len(tensors)
    assert order_quantized(pairs)[-2:] == (
        KeyValue("general.quantization_version", "u32", 2), KeyValue("general.file_type", "u32", BF16_TYPE),
    )  # fmt: skip
    assert sorted(p.key for p in order_quantized(pairs)) == sorted(p.key for p in pairs)


def changed(name: str, files: dict[str, bytes | None] | None = None, **config: Any) -> ModelFiles:
    case = CASES[name]
    own = checkpoints.side_files(case)
    own["config.json"] = json.dumps({**case.config, **config}).encode()
    for file, data in (files or {}).items():
        if data is None:
            del own[file]
        else:
            own[file] = data
    return ModelFiles(case.folder, own)


REFUSED: list[tuple[str, ModelFiles, type[ShardqError], str]] = [
    ("architecture", changed("llama", architectures=["NoSuchModel"]), UnsupportedSource, "LlamaForCausalLM"),
    ("no architecture", changed("llama", architectures=None), UnsupportedSource, "names no architectures"),
    ("pre-tokenizer", changed("llama"), UnsupportedSource, "--tokenizer-pre"),
    ("no config", changed("llama", {"config.json": None}), SourceUnreadable, "has no config.json"),
    ("damaged config", changed("llama", {"config.json": b"{"}), SourceUnreadable, "not JSON"),
    ("config of another sort", changed("llama", {"config.json": b"[]"}), SourceUnreadable, "expected a JSON object"),
    ("damaged tokenizer", changed("qwen2moe", {"tokenizer.json": b"{}"}), SourceUnreadable, "tokenizer.json"),
    ("no tokenizer", changed("qwen2moe", {"tokenizer.json": None}), UnsupportedSource, "has no tokenizer.json"),
    ("no pieces", changed("gemma2", {"tokenizer.model": None}), UnsupportedSource, "has no tokenizer.model"),
    ("damaged pieces", changed("gemma2", {"tokenizer.model": b"\x0a\x7f"}), SourceUnreadable, "no SentencePiece model"),
    ("a vocabulary too small", changed("qwen3", vocab_size=7), UnsupportedSource, "vocab_size 7"),
    (
        "rope",
        changed("llama", rope_scaling={"rope_type": "curly", "factor": 2}),
        UnsupportedSource,
        "rope type 'curly'",
    ),
    ("router", changed("minimax", scoring_func="dice"), UnsupportedSource, "softmax, sigmoid"),
    ("a fractional width", changed("llama", hidden_size=1.5), UnsupportedSource, "expected a whole number"),
    ("not UTF-8", changed("llama", {"README.md": b"\xff"}), SourceUnreadable, "not UTF-8"),
    ("a card that is no YAML", changed("llama", {"README.md": b"---\na: [\n---\n"}), SourceUnreadable, "no YAML"),
]


@pytest.mark.parametrize(("files", "error", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_is_refused_says_what_is_known(files: ModelFiles, error: type[ShardqError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        find_metadata(files, (), BF16_TYPE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["gguf", "tokenizers"])
def test_a_package_that_is_missing_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["qwen2"]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=rf"package {package} is not there .*; install shardq\[gguf\]"):
        find_metadata(model(case), find_tensors(model(case), shards(case)), BF16_TYPE, case.pre)


def test_a_named_token_that_is_not_there_is_refused() -> None:
    files = changed("qwen3", {"tokenizer_config.json": b'{"eos_token": "<gone>"}'})
    with pytest.raises(UnsupportedSource, match=r"eos_token '<gone>' is not in tokenizer\.json"):
        find_metadata(files, (), BF16_TYPE, "qwen2")


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (63, 64), "4 heads need a multiple of 8 rows"),
        ("model.layers.0.self_attn.strange.weight", (64, 64), "has no place"),
        ("model.layers.0.mlp.up_proj.weight", (2, 2, 2, 2), "expected 1 to 3 axes"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(UnsupportedSource, match=words):
        find_tensors(changed("llama"), [[SourceTensor(name, shape)]])


@pytest.mark.parametrize(
    ("model", "name", "shape", "words"),
    [
        ("qwen35", "in_proj_qkv.weight", (111, 64), r"\[111, 64\]: expected 112 rows"),
        ("qwen35", "in_proj_z.weight", (112, 64), r"\[112, 64\]: expected 64 rows"),
        ("qwen35", "A_log", (5,), r"\[5\]: expected 4 rows"),
        ("qwen35", "conv1d.weight", (112, 2, 4), r"expected \[channels, 1, taps\]"),
        ("qwen35", "conv1d.weight", (64, 1, 4), "expected 112 rows"),
        ("qwen3next", "in_proj_qkvz.weight", (175, 64), "expected 2 heads of 88 rows"),
    ],
)
def test_heads_of_linear_attention_that_do_not_fit_are_refused(
    model: str, name: str, shape: tuple[int, ...], words: str
) -> None:
    with pytest.raises(UnsupportedSource, match=words):
        find_tensors(changed(model), [[SourceTensor(f"model.layers.0.linear_attn.{name}", shape)]])


@pytest.mark.parametrize("heads", [0, 3, 8])
def test_heads_of_values_are_a_multiple_of_those_of_keys(heads: int) -> None:
    files = changed("qwen35", linear_num_key_heads=heads)
    source = SourceTensor("model.layers.0.linear_attn.out_proj.weight", (64, 64))
    if heads:
        with pytest.raises(UnsupportedSource, match=f"4 heads of 16 for values and {heads} of 12 for keys"):
            find_tensors(files, [[source]])
    else:
        (found,) = find_tensors(files, [[source]])
        assert found.parts == (Part(source.name, range(64)),)


@pytest.mark.parametrize(("name", "said"), [("qwen35", {"mtp_num_hidden_layers": 0}), ("qwen3next", {})])
def test_layers_for_further_tokens_are_counted_where_they_are(name: str, said: dict[str, int]) -> None:
    """Without one the file is that of the converter with --no-mtp."""
    case, files = CASES[name], changed(name, **said)
    kept = [source for source in shards(case)[0] if not source.name.startswith("mtp.")]
    for sources, blocks in (([*shards(case)[0]], 3), (kept, 2)):
        pairs = {p.key: p.value for p in find_metadata(files, find_tensors(files, [sources]), BF16_TYPE, case.pre)}
        arch = pairs["general.architecture"]
        assert pairs[f"{arch}.block_count"] == blocks
        assert pairs[f"{arch}.attention.recurrent_layers"] == (True, False, False)[:blocks]
        assert pairs.get(f"{arch}.nextn_predict_layers", 0) == blocks - 2


def test_types_of_layers_are_as_many_as_layers() -> None:
    with pytest.raises(UnsupportedSource, match=r"layer_types has 1 entries, expected one for each of 2"):
        find_metadata(changed("qwen35", layer_types=["linear_attention"]), (), BF16_TYPE, "qwen35")


@pytest.mark.parametrize("gone", ["experts.3.w2", "experts.0.w1"])
def test_experts_that_are_not_all_there_are_refused(gone: str) -> None:
    case = CASES["mixtral"]
    kept = [[source for source in shards(case)[0] if gone not in source.name or ".1." not in source.name]]
    with pytest.raises(ShardqError, match="11 tensors of experts, expected 4 experts with w1, w2, w3"):
        find_tensors(model(case), kept)


ODD: tuple[Any, ...] = (None, -1, 1.5, "x", [], [1], {"a": 1}, 1 << 40)


@pytest.mark.parametrize("name", ["llama_json_pieces", "gemma3_bpe", "phi3_long", "deepseek3", "qwen35"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"])
def test_odd_values_are_refused_or_taken_but_never_a_bug(name: str, file: str) -> None:
    case = CASES[name]
    files = {"generation_config.json": made.GENERATION.encode(), **checkpoints.side_files(case)}
    content = json.loads(files[file])
    bugs = []
    for key in content:
        for odd in ODD:
            text = json.dumps({**content, key: odd})
            odd_model = ModelFiles(case.folder, {**files, file: text.encode()})
            try:
                pairs = find_metadata(odd_model, find_tensors(odd_model, shards(case)), BF16_TYPE, case.pre)
                plan_gguf(pairs, ())
            except ShardqError as error:
                bugs += [f"{file}: {key} = {odd!r}: {error}"] if "\n" in str(error) else []
    assert not bugs
