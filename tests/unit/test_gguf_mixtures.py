"""Element types and order of GGUF tensors against what llama_model_quantize wrote, and what is refused."""

import json
from dataclasses import replace
from hashlib import sha256
from typing import Any

import gguf_mixtures_made as made
import pytest
from golden_gguf_types.stored import unpack

from shardq.errors import (
    BadImportance,
    BadOption,
    LayoutRefuses,
    PatternMatchesNothing,
    ShardqError,
    SourceUnreadable,
    UnsupportedSource,
)
from shardq.files.gguf import KeyValue
from shardq.ggml import GGML
from shardq.gguf.architectures import ARCHITECTURES
from shardq.gguf.file_types import FILE_TYPES, FileType, find_file_type
from shardq.gguf.mixtures import MixtureModel, TypeOptions, Wanted, choose_types, order_tensors, read_model
from shardq.kernels.contract_blocks import BLOCK_FORMATS


def golden(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((made.GOLDEN / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize("name", made.CASES)
def test_types_are_those_of_llama_cpp(name: str) -> None:
    case = made.CASES[name]
    stored = {run: text for runs, text in golden(name)["runs"].items() for run in runs.split(", ")}
    runs = list(made.runs(case))
    assert [run.name for run in runs] == sorted(stored, key=[run.name for run in runs].index)
    model = read_model(made.pairs(case))
    for run in runs:
        tensors = made.wanted(case, run.weighed)
        types = choose_types(model, tensors, run.options, run.weighed)
        found = {tensor.name: kind for tensor, kind in zip(tensors, types, strict=True)}
        assert found == unpack(case.tensors, stored[run.name]), run.name


@pytest.mark.parametrize("name", made.CASES)
def test_order_is_that_of_llama_cpp(name: str) -> None:
    ordered = order_tensors(made.CASES[name].tensors)
    assert sha256("\n".join(ordered).encode()).hexdigest() == golden(name)["order"]


def test_cases_have_all_architectures_that_are_written() -> None:
    assert {arch.name for arch in ARCHITECTURES} == {case.arch for case in made.CASES.values()}


def test_types_come_in_the_order_asked_for() -> None:
    case = made.CASES["llama_16"]
    tensors = made.wanted(case, False)
    options = TypeOptions(file_type("Q4_K_M"))
    model = read_model(made.pairs(case))
    types = choose_types(model, tensors, options, False)
    assert choose_types(model, tensors[::-1], options, False) == types[::-1]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Q4_K_M", "Q4_K_M"), ("gguf:q4_k_m", "Q4_K_M"), ("GGUF:q4-k-m", "Q4_K_M"), ("q4_k", "Q4_K_M"),
        ("Q3_K", "Q3_K_M"), ("gguf:q5-k", "Q5_K_M"), ("mxfp4-moe", "MXFP4_MOE"), ("iq4_xs", "IQ4_XS"),
    ],
)  # fmt: skip
def test_file_types_are_found_by_every_spelling(text: str, name: str) -> None:
    assert file_type(text).name == name


@pytest.mark.parametrize("text", ["", "gguf:", "Q4", "IQ2_XS", "gguf:gguf:q4_0", "Q4_K_M ", "w4a16", "15"])
def test_other_names_are_no_file_types(text: str) -> None:
    assert find_file_type(text) is None


def test_file_types_are_distinct_and_their_types_can_be_written() -> None:
    assert len({kind.name for kind in FILE_TYPES}) == len({kind.number for kind in FILE_TYPES}) == len(FILE_TYPES)
    assert {kind.base for kind in FILE_TYPES} == {*BLOCK_FORMATS, "F16", "BF16", "F32"}
    assert all(kind.base in GGML for kind in FILE_TYPES)


def file_type(text: str) -> FileType:
    found = find_file_type(text)
    assert found
    return found


LLAMA = MixtureModel("llama", 2, 8, 8, 0)
TENSORS = (
    Wanted("token_embd.weight", (256, 4), None, False),
    Wanted("blk.0.attn_q.weight", (256, 4), None, True),
    Wanted("blk.1.attn_q.weight", (288, 4), None, False),
    Wanted("output.weight", (288, 4), None, False),
)
CODES = (Wanted("blk.0.ffn_up_exps.weight", (256, 4, 2), "MXFP4", False),)
FAR = (Wanted("blk.2.ffn_up_exps.weight", (256, 4, 2), None, False),)
NOWHERE = (Wanted("mtp.ffn_down.weight", (256, 4, 2), None, False),)


def choose(tensors: tuple[Wanted, ...], name: str, weighed: bool = False, **more: Any) -> tuple[str, ...]:
    experts = 4 if "exps" in tensors[0].name or tensors == NOWHERE else 0
    return choose_types(replace(LLAMA, experts=experts), tensors, TypeOptions(file_type(name), **more), weighed)


@pytest.mark.parametrize(
    ("tensors", "name", "more", "error", "words"),
    [
        (TENSORS, "Q4_0", {"output_type": "IQ2_XS"}, BadOption, "--output-tensor-type 'IQ2_XS': expected one of Q4_0"),
        (TENSORS, "Q4_0", {"embedding_type": "q4"}, BadOption, "--token-embedding-type 'q4'"),
        (TENSORS, "Q4_0", {"overrides": (("a", "IQ1_S"),)}, BadOption, "--tensor-type a= 'IQ1_S'"),
        (TENSORS, "Q4_0", {"overrides": (("", "Q4_0"),)}, BadOption, "pattern is empty"),
        (TENSORS, "Q4_0", {"overrides": (("attn_(q", "Q4_0"),)}, BadOption, "no valid regular expression"),
        (TENSORS, "Q4_0", {"overrides": ((r"blk\.\D", "Q4_0"),)}, BadOption, "lowers patterns"),
        (TENSORS, "Q4_0", {"overrides": (("(?i)blk", "Q4_0"),)}, BadOption, "a group of Python's"),
        (TENSORS, "Q4_0", {"overrides": (("(?<=blk)a", "Q4_0"),)}, BadOption, "a group of Python's"),
        (TENSORS, "Q4_0", {"overrides": (("[[:alpha:]]", "Q4_0"),)}, BadOption, "a class that Python"),
        (TENSORS, "Q4_0", {"overrides": (("a++", "Q4_0"),)}, BadOption, "possessive"),
        (TENSORS, "Q4_0", {"overrides": (("a{,2}", "Q4_0"),)}, BadOption, "brace"),
        (TENSORS, "F16", {"overrides": (("attn_q", "Q4_0"),)}, BadOption, "no meaning for F16"),
        (TENSORS, "Q4_0", {"overrides": (("attn_w", "Q4_0"),)}, PatternMatchesNothing, "'attn_w' matches no tensor"),
        (TENSORS, "Q4_0", {"output_type": "Q6_K"}, LayoutRefuses, "'output.weight' has rows of 288"),
        (TENSORS, "Q2_K_S", {}, BadOption, "needs an imatrix, as for tensor 'blk.0.attn_q.weight'"),
        (FAR, "Q4_K_M", {}, UnsupportedSource, "'blk.2.ffn_up_exps.weight': expected one of the 2 blocks"),
        (NOWHERE, "Q4_K_M", {}, UnsupportedSource, "'mtp.ffn_down.weight'"),
    ],
)
def test_what_is_refused_says_what_to_do(
    tensors: tuple[Wanted, ...], name: str, more: dict[str, Any], error: type[ShardqError], words: str
) -> None:
    with pytest.raises(error) as raised:
        choose(tensors, name, **more)
    assert words in str(raised.value)


def test_an_imatrix_may_lack_only_what_can_do_without() -> None:
    complete = (*TENSORS[:2], replace(TENSORS[2], weighed=True), TENSORS[3])
    assert choose(complete, "Q2_K_S", True) == ("Q2_K", "Q2_K", "Q4_0", "Q8_0")
    lacking = (replace(TENSORS[1], weighed=False),)
    with pytest.raises(BadImportance, match=r"'blk.0.attn_q.weight', which the imatrix lacks"):
        choose(lacking, "Q2_K_S", True)


def test_blocks_of_the_source_stay_or_are_quantized_again() -> None:
    assert choose(CODES, "MXFP4_MOE") == ("MXFP4",)
    assert choose(CODES, "BF16") == ("MXFP4",)
    assert choose(CODES, "Q4_K_M") == ("MXFP4",)
    assert choose(CODES, "Q4_K_M", pure=True) == ("MXFP4",)
    assert choose(CODES, "Q4_K_M", overrides=(("exps", "q6_k"),)) == ("Q6_K",)
    assert choose(CODES, "Q4_K_M", requantize=True) == ("Q4_K",)
    assert choose(CODES, "F16", requantize=True) == ("F16",)


def test_escapes_that_both_grammars_share_are_taken() -> None:
    pattern = r"^BLK\.(?:0|\d{2,})\.(?!ffn)[a-z]+_\w\.weight$"
    assert choose(TENSORS, "Q4_0", overrides=((pattern, "Q5_0"),)) == ("Q4_0", "Q5_0", "Q4_0", "Q8_0")


def test_metadata_may_give_heads_of_each_block() -> None:
    def pairs(*more: tuple[str, int | tuple[int, ...]]) -> list[KeyValue]:
        name = KeyValue("general.architecture", "string", "qwen3")
        return [name, *(KeyValue(f"qwen3.{key}", "i32", value) for key, value in more)]

    plain = pairs(("block_count", 3), ("attention.head_count", 8))
    assert read_model(plain) == MixtureModel("qwen3", 3, 8, 8, 0)
    several = pairs(("block_count", 3), ("attention.head_count", (8, 4)), ("attention.head_count_kv", (2, 0, 4)))
    assert read_model([*several, *pairs(("expert_count", 16))]) == MixtureModel("qwen3", 3, 8, 2, 16)
    with pytest.raises(SourceUnreadable, match=r"block_count"):
        read_model(pairs(("attention.head_count", 8)))


def test_models_without_attention_share_nothing() -> None:
    assert not MixtureModel("llama", 2, 0, 0, 0).shares_values
    assert MixtureModel("llama", 2, 8, 2, 0).shares_values
    assert not MixtureModel("llama", 2, 7, 2, 0).shares_values
