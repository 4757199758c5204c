"""Both formats of llama.cpp's imatrix, its names for modules, and what is refused of a damaged file."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from importance_files_made import (
    L0,
    PAIRS,
    gguf,
    legacy,
    own_file,
    pair,
    put,
    text,
    vectors,
)

from shardq.errors import BadImportance
from shardq.imatrix_names import find_wanted
from shardq.importance import load_importance, match, stand_ins
from shardq.importance_files import Provenance
from shardq.importance_vectors import read_vector, weights_of

# --- imatrix -------------------------------------------------------------------------------------------------------

SUMS = {
    "blk.0.attn_q.weight": ([[2, 4, 6, 8]], [2]),
    "blk.0.attn_output.weight": ([[3, 0, 9]], [3]),
    "blk.0.ffn_gate_exps.weight": ([[2, 4, 2, 2], [0, 0, 0, 0], [6, 6, 6, 12]], [1, 0, 3]),
    "blk.0.ffn_up_exps.weight": ([[2, 4, 2, 2], [0, 0, 0, 0], [6, 6, 6, 12]], [1, 0, 3]),
    "blk.0.ffn_down_exps.weight": ([[1, 2], [0, 0], [3, 6]], [1, 0, 3]),
}
EXPERTS = {f"{L0}.mlp.experts.{e}.{p}_proj": (2, 4) for e in range(3) for p in ("gate", "up")}
DOWNS = {f"{L0}.mlp.experts.{e}.down_proj": (4, 2) for e in range(3)}
ATTENTION = {f"{L0}.self_attn.{p}_proj": (4, 4) for p in "qkv"} | {f"{L0}.self_attn.o_proj": (4, 3)}


@pytest.mark.parametrize("alignment", [1, 32, 64])
@pytest.mark.parametrize("version", [2, 3])
def test_gguf_imatrix(alignment: int, version: int, tmp_path: Path) -> None:
    pairs = (*PAIRS, pair("general.alignment", 4, struct.pack("<I", alignment)))
    path = put(tmp_path, gguf(SUMS, pairs, alignment, version))
    importance = load_importance(path)
    assert importance.provenance == Provenance("text", 5120, text="calibration.txt")
    found = vectors(path, ATTENTION | EXPERTS | DOWNS)
    assert [found[f"{L0}.self_attn.{p}_proj"] for p in "qkv"] == 3 * [[1, 2, 3, 4]]
    assert found[f"{L0}.self_attn.o_proj"] == [1, 0, 3]
    gates = [found[f"{L0}.mlp.experts.{e}.gate_proj"] for e in range(3)]
    assert gates == [[2, 4, 2, 2], [2, 2.5, 2, 3.5], [2, 2, 2, 4]]  # the one that no token reached has all tokens' mean
    assert [found[f"{L0}.mlp.experts.{e}.down_proj"] for e in range(3)] == [[1, 2], [1, 1], [1, 2]]
    told = stand_ins(match(importance, EXPERTS | DOWNS))
    assert told == (
        "Importance that is the mean over all experts or heads of the layer: "
        + ", ".join(f"{L0}.mlp.experts.1.{p}_proj" for p in ("gate", "up"))
        + ".",
        f"No token has reached these, and all their columns count the same: {L0}.mlp.experts.1.down_proj.",
    )


OLD = {
    "blk.0.attn_q.weight": (2, [2, 4, 6, 8]),
    "blk.0.attn_output.weight": (0, [3, 0, 9]),  # no calls: the values as they are
    "blk.0.ffn_gate_exps.weight": (2, [4, 8, 4, 4, 2, 2, 2, 2, 4, 4, 4, 8]),
    "blk.0.ffn_down_exps.weight": (2, [2, 4, 2, 2, 2, 4]),
}


@pytest.mark.parametrize("tail", [b"", struct.pack("<i", 3), struct.pack("<i", 3) + text("d\\x\\wiki.txt", "<i")])
def test_legacy_imatrix(tail: bytes, tmp_path: Path) -> None:
    path = put(tmp_path, legacy(OLD, tail))
    importance = load_importance(path)
    name = "wiki.txt" if len(tail) > 4 else ""
    assert importance.provenance == Provenance("text", 3 * 512 if tail else None, text=name)
    found = vectors(path, ATTENTION | EXPERTS | DOWNS)
    assert found[f"{L0}.self_attn.k_proj"] == [1, 2, 3, 4]
    assert found[f"{L0}.self_attn.o_proj"] == [3, 0, 9]
    assert [found[f"{L0}.mlp.experts.{e}.up_proj"] for e in range(3)] == [[2, 4, 2, 2], [1, 1, 1, 1], [2, 2, 2, 4]]
    assert found[f"{L0}.mlp.experts.2.down_proj"] == [1, 2]


def test_dense_sizes_and_experts_must_agree(tmp_path: Path) -> None:
    old = load_importance(put(tmp_path, legacy(OLD)))
    wrong = {
        f"{L0}.self_attn.q_proj": (4, 2),  # divides the values
        f"{L0}.mlp.experts.0.gate_proj": (2, 3),
        f"{L0}.mlp.experts.2.gate_proj": (2, 3),
        f"{L0}.mlp.experts.2.down_proj": (4, 3),
        f"{L0}.mlp.shared_expert.down_proj": (4, 3),
    }
    with pytest.raises(BadImportance, match=r"lacks 1 of the 5 .*shared_expert.* and does not fit 4: ") as caught:
        match(old, wrong)
    assert "gate_proj (3 experts with 3 columns, 12 values)" in str(caught.value)
    new = load_importance(put(tmp_path, gguf(SUMS)))
    for experts, columns in ((4, 4), (3, 2), (3, 8)):
        with pytest.raises(BadImportance, match="does not fit"):
            match(new, {f"{L0}.mlp.experts.{experts - 1}.up_proj": (2, columns)})


def test_latents_of_newer_conversions_stand_in(tmp_path: Path) -> None:
    """Heads of attn_v_b have one count for all, in older files one each; a kv_b of its own goes before them."""
    module = f"{L0}.self_attn.kv_b_proj"
    heads = [[1, 2, 3], [3, 4, 5]]
    path = put(tmp_path, gguf({"blk.0.attn_v_b.weight": (np.reshape(heads, (1, -1)), [2])}))
    assert vectors(path, {module: (8, 3)}) == {module: [1, 1.5, 2]}
    assert "mean over all experts or heads" in stand_ins(match(load_importance(path), {module: (8, 3)}))[0]
    path = put(tmp_path, gguf({"blk.0.attn_v_b.weight": (heads, [2, 2])}))
    assert vectors(path, {module: (8, 3)}) == {module: [1, 1.5, 2]}
    both = {"blk.0.attn_v_b.weight": (heads, [2, 2]), "blk.0.attn_kv_b.weight": ([7, 8, 9], [1])}
    path = put(tmp_path, gguf(both))
    assert vectors(path, {module: (8, 3)}) == {module: [7, 8, 9]}


def test_layer_without_tokens_has_equal_columns(tmp_path: Path) -> None:
    stats = {"blk.0.ffn_gate_exps.weight": (np.zeros((2, 4)), [0, 0]), "blk.0.attn_q.weight": ([0, 0], [0])}
    modules = {f"{L0}.mlp.experts.1.gate_proj": (2, 4), f"{L0}.self_attn.q_proj": (2, 2)}
    assert list(vectors(put(tmp_path, gguf(stats)), modules).values()) == [[1, 1, 1, 1], [1, 1]]


NAMES = {
    "model.layers.12.self_attn.q_proj": "blk.12.attn_q.weight",
    "model.layers.0.self_attn.k_proj": "blk.0.attn_k.weight",
    "model.layers.0.self_attn.o_proj": "blk.0.attn_output.weight",
    "model.language_model.layers.1.mlp.up_proj": "blk.1.ffn_up.weight",
    "language_model.model.layers.1.mlp.down_proj": "blk.1.ffn_down.weight",
    "model.layers.1.self_attn.qkv_proj": "blk.1.attn_qkv.weight",  # phi3
    "model.layers.1.mlp.gate_up_proj": "blk.1.ffn_up.weight",
    "model.layers.1.block_sparse_moe.experts.5.w1": "blk.1.ffn_gate_exps.weight",  # mixtral
    "model.layers.1.block_sparse_moe.experts.5.w2": "blk.1.ffn_down_exps.weight",
    "model.layers.1.block_sparse_moe.experts.5.w3": "blk.1.ffn_up_exps.weight",
    "model.layers.1.mlp.shared_expert.gate_proj": "blk.1.ffn_gate_shexp.weight",  # qwen2_moe
    "model.layers.1.mlp.shared_experts.down_proj": "blk.1.ffn_down_shexp.weight",  # deepseek
    "model.layers.1.self_attn.q_a_proj": "blk.1.attn_q_a.weight",
    "model.layers.1.self_attn.q_b_proj": "blk.1.attn_q_b.weight",
    "model.layers.1.self_attn.kv_a_proj_with_mqa": "blk.1.attn_kv_a_mqa.weight",
    "model.layers.1.self_attn.kv_b_proj": "blk.1.attn_kv_b.weight",
    "lm_head": "output.weight",
}


def test_names_of_llama_cpp() -> None:
    for module, tensor in NAMES.items():
        wanted = find_wanted(module)
        assert wanted is not None, module
        assert wanted.tensors[0] == tensor
        assert wanted.expert == (5 if ".experts." in module else None)
    for module in (
        "model.vision_tower.encoder.layers.0.self_attn.q_proj",
        "model.layers.0.linear_attn.out_proj",  # its columns are in another order
        "model.layers.0.mlp.experts.3.bias",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.embed_tokens",
    ):
        assert find_wanted(module) is None, module


@pytest.mark.oracle
def test_names_are_those_of_gguf() -> None:
    package = pytest.importorskip("gguf", reason="gguf is not installed here; `nox -s oracles` installs it")
    arches = ("LLAMA", "QWEN2", "QWEN2MOE", "QWEN3", "QWEN3MOE", "GEMMA", "GEMMA2", "GEMMA3", "PHI3", "DEEPSEEK2")
    maps = [package.get_tensor_name_map(getattr(package.MODEL_ARCH, a), 20) for a in arches]
    for module, tensor in NAMES.items():
        plain = module.replace("language_model.", "").replace(".experts.5.", ".experts.")
        plain = plain if plain.startswith(("model.", "lm_head")) else f"model.{plain}"
        known = {m.get_name(plain) for m in maps} - {None}
        assert known == {tensor.removesuffix(".weight")}, module


@pytest.mark.oracle
def test_files_of_gguf_are_read(tmp_path: Path) -> None:
    package = pytest.importorskip("gguf", reason="gguf is not installed here; `nox -s oracles` installs it")
    path = tmp_path / "theirs.gguf"
    writer = package.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a/b.txt", "c.txt"])
    writer.add_uint32("imatrix.chunk_count", 2)
    writer.add_uint32("imatrix.chunk_size", 256)
    for name, (sums, counts) in SUMS.items():
        writer.add_tensor(f"{name}.in_sum2", np.array(sums, np.float32))
        writer.add_tensor(f"{name}.counts", np.array(counts, np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    importance = load_importance(path)
    assert importance.provenance == Provenance("text", 512, text="b.txt, c.txt")
    assert vectors(path, ATTENTION | EXPERTS | DOWNS) == vectors(put(tmp_path, gguf(SUMS)), ATTENTION | EXPERTS | DOWNS)
    reader = package.GGUFReader(put(tmp_path, gguf(SUMS)))
    assert {t.name: t.data.tolist() for t in reader.tensors}["blk.0.attn_output.weight.in_sum2"] == [[3, 0, 9]]


def test_permuted_rows_have_the_same_inputs() -> None:
    """llama.cpp permutes rows of q and k: what a column is multiplied with stays."""
    rng = np.random.default_rng(0)
    weight, inputs = rng.standard_normal((8, 6)), rng.standard_normal((5, 6))
    permuted = weight.reshape(2, 2, 2, 6).swapaxes(1, 2).reshape(8, 6)
    outputs = (inputs @ weight.T).reshape(5, 2, 2, 2).swapaxes(2, 3).reshape(5, 8)
    assert not np.array_equal(permuted, weight)
    assert np.allclose(inputs @ permuted.T, outputs)


ONE = {"a.weight": ([[1.0, 2.0]], [1.0])}
BROKEN: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "number of entries needs 4 bytes"),
    "no entries": (struct.pack("<i", 0), "0 entries"),
    "negative entries": (struct.pack("<i", -1), "-1 entries"),
    "huge entries": (struct.pack("<i", 2**31 - 1) + bytes(100), "2147483647 entries"),
    "negative name": (legacy(OLD)[:4] + struct.pack("<i", -4) + bytes(200), "has -4 bytes"),
    "huge name": (legacy(OLD)[:4] + struct.pack("<i", 2**30) + bytes(200), "1073741824 bytes"),
    "huge values": (
        struct.pack("<i", 1) + text("a", "<i") + struct.pack("<ii", 1, 2**31 - 1) + bytes(8),
        "needs 8589934588 bytes",
    ),
    "no values": (legacy({"a": (1, [])}), "has 0 values"),
    "twice": (struct.pack("<i", 2) + 2 * legacy({"a": (1, [1])})[4:], "'a' is there twice"),
    "NaN": (legacy({"a": (1, [np.nan])}), "negative or not finite"),
    "zero": (legacy({"a": (1, [0, 0])}), "all values are zero"),
    "huge text": (legacy({"a": (1, [1])}, struct.pack("<ii", 1, 2**31 - 1)), "name of the text has"),
    "version 1": (gguf(ONE, version=1), "GGUF version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(100), "GGUF version 50331648"),
    "huge tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0) + bytes(100), "9223372036854775808 tensors"),
    "huge keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**64 - 1) + bytes(100), "18446744073709551615 keys"),
    "huge key": (gguf(ONE, [struct.pack("<Q", 2**62) + bytes(30)]), "key has 4611686018427387904 bytes"),
    "key twice": (gguf(ONE, 2 * PAIRS[:1]), "'general.type' is there twice"),
    "unknown type": (gguf(ONE, [pair("k", 13, bytes(9))]), "unknown type 13"),
    "huge array": (gguf(ONE, [pair("k", 9, struct.pack("<IQ", 10, 2**61))]), "values of 'k' needs"),
    "huge strings": (gguf(ONE, [pair("k", 9, struct.pack("<IQ", 8, 2**61))]), "array of"),
    "nested": (gguf(ONE, [pair("k", 9, struct.pack("<IQ", 9, 1) + bytes(12))]), "array of 1 values of type 9"),
    "alignment": (gguf(ONE, [pair("general.alignment", 4, struct.pack("<I", 24))]), "alignment 24"),
    "alignment 0": (gguf(ONE, [pair("general.alignment", 4, struct.pack("<I", 0))]), "alignment 0"),
    "alignment text": (gguf(ONE, [pair("general.alignment", 8, text("x", "<Q"))]), "alignment 'x'"),
    "a model": (gguf({}), "none of its 0 tensors"),
    "cut": (gguf(ONE)[:-32], "data up to byte"),
    "no counts": (gguf(ONE).replace(b"a.weight.counts", b"b.weight.counts"), "expected F32 in_sum2 and counts"),
    "F16": (gguf(ONE).replace(struct.pack("<QQI", 2, 1, 0), struct.pack("<QQI", 2, 1, 1)), "expected F32"),
    "odd counts": (gguf({"a": ([[1, 2, 3]], [1, 1])}), "2 counts for 3 values"),
    "NaN count": (gguf({"a": ([[1]], [np.nan])}), "counts are negative"),
    "negative count": (gguf({"a": ([[1]], [-1])}), "counts are negative"),
    "dimensions": (
        gguf(ONE).replace(struct.pack("<IQQ", 2, 2, 1), struct.pack("<IQQ", 5, 2, 1)),
        "has 5 dimensions",
    ),
    "overflow": (
        gguf(ONE).replace(struct.pack("<IQQ", 2, 2, 1), struct.pack("<IQQ", 2, 2**63, 2**63)),
        "is missing",
    ),
    "far": (gguf(ONE).replace(struct.pack("<QQIQ", 2, 1, 0, 0), struct.pack("<QQIQ", 2, 1, 0, 2**63)), "is missing"),
    "infinite sum": (gguf({"a": ([[np.inf]], [1])}), "negative or not finite"),
    "zero sums": (gguf({"a": ([[0, 0]], [1])}), "all values are zero"),
}


@pytest.mark.parametrize("lie", BROKEN)
def test_broken_imatrix_is_refused(lie: str, tmp_path: Path) -> None:
    data, message = BROKEN[lie]
    with pytest.raises(BadImportance, match=message) as caught:
        load_importance(put(tmp_path, data))
    assert "stats.dat" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [lambda: legacy(OLD), lambda: gguf(SUMS), lambda: own_file({"a": [1, 2], "b": [3]})])
def test_every_truncation_is_refused(make: Callable[[], bytes], tmp_path: Path) -> None:
    whole = make()
    load_importance(put(tmp_path, whole))
    end = len(whole) - (28 if whole[:4] == b"GGUF" else 0)  # padding behind the last tensor
    for size in range(end):
        with pytest.raises(BadImportance):
            load_importance(put(tmp_path, whole[:size]))


@given(
    st.sampled_from([legacy(OLD, struct.pack("<i", 3) + text("t", "<i")), gguf(SUMS), own_file({"a.{b,c}": [1, 2]})]),
    st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
    st.integers(0, 200),
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_raises_our_errors_only(
    tmp_path: Path, whole: bytes, patches: list[tuple[int, bytes]], cut: int
) -> None:
    """And what is accepted gives vectors that a search can use."""
    data = bytearray(whole)
    for at, patch in patches:
        place = at % len(data)
        data[place : place + len(patch)] = patch
    path = put(tmp_path, bytes(data[: len(data) - cut % len(data)] if cut > 100 else data))
    try:
        importance = load_importance(path)
        modules = {"a.b": (1, 2)} if importance.format == "shardq" else ATTENTION | EXPERTS | DOWNS
        found = match(importance, modules)
    except BadImportance:
        return
    for ref in found.values():
        weights = weights_of(read_vector(ref))
        assert np.isfinite(weights).all()
        assert (weights > 0).all()


@given(data=st.binary(max_size=300), start=st.sampled_from([b"", b"GGUF\x03\0\0\0", b"\x02\0\0\0\x01\0\0\0a"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise_raises_our_errors_only(tmp_path: Path, data: bytes, start: bytes) -> None:
    try:
        load_importance(put(tmp_path, start + data))
    except BadImportance:
        return


def test_large_entry_is_checked_in_pieces(tmp_path: Path) -> None:
    values = np.ones(5 << 20, np.float32)
    values[-1] = np.nan
    with pytest.raises(BadImportance, match="not finite"):
        load_importance(put(tmp_path, own_file({"a": values})))
