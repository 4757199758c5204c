"""Recipes as files: words to a recipe, and back."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from shardq.errors import BadOption
from shardq.gguf.options import GgufOptions
from shardq.recipe import make_recipe
from shardq.recipe_file import WORDS, read_recipe_file, recipe_of, toml_of, words_of

TABLES: list[dict[str, Any]] = [
    {},
    {"scheme": "W4A16@gptq", "group_size": 32, "sym": False},
    {"scheme": "W4A16", "bits": 8, "quant_lm_head": True, "ragged": "shrink", "search": "auto"},
    {"scheme": "MXFP4", "ignore": ["re:.*\\d\"'\t_proj", "lm_head"], "include": ["model.x"], "policy": "published"},
    {"scheme": "W4A16", "layer_config": {"re:.*[0-9].down": {"bits": 8, "sym": False}, "a.b": "W8A16"}, "mtp": "drop"},
    {"ignore": ["down_proj"], "ignore_dialect": "auto-round", "quant_nontext": True, "decode": "rounded"},
    {
        "scheme": "gguf:Q4_K_M", "tensor_type": ["attn_v=Q6_K"], "pure": True, "split_max_size": "40G",
        "tokenizer_pre": "llama-bpe", "output_tensor_type": "Q8_0", "requantize": True,
    },
]  # fmt: skip


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_what_is_written_is_read_as_the_same_recipe(table: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_of(table, "here", tmp_path).recipe
    path = tmp_path / "recipe.toml"
    path.write_text(toml_of(words_of(recipe), "two\nlines"))
    assert read_recipe_file(path).recipe == recipe
    assert tomllib.loads(path.read_text()).keys() <= WORDS.keys()


def test_words_are_those_of_make_recipe(tmp_path: Path) -> None:
    table = {"scheme": "W4A16", "format": "gptq", "ignore": ["a"], "search": "auto"}
    assert recipe_of(table, "here", tmp_path).recipe == make_recipe("W4A16@gptq", ignore=["a"], search="auto")
    gguf = recipe_of({"scheme": "q4_k_m", "split_max_size": 5000}, "here", tmp_path).recipe
    assert gguf == make_recipe("gguf:q4_k_m", gguf=GgufOptions(max_part_bytes=5000))


def test_engines_that_run_modules_one_by_one_may_split_fused_groups(tmp_path: Path) -> None:
    assert recipe_of({"target": ["transformers"]}, "here", tmp_path).recipe.split_fused
    served = recipe_of({"target": ["vllm:tp=2"]}, "here", tmp_path)
    assert (served.recipe.split_fused, served.targets) == (False, ("vllm:tp=2",))


def test_a_mixture_is_read_but_not_chosen(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('target_bits = 5\noptions = "W2A16G64,W8A16"\n')
    written = read_recipe_file(path)
    assert written.recipe == make_recipe("W2A16G64")
    assert written.mixture
    assert (written.mixture.target_bits, written.mixture.options) == (5.0, "W2A16G64,W8A16")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([], "here: expected a table"),
        ({"shceme": "W4A16"}, "here: unknown key 'shceme'"),
        ({"bits": "4"}, "here: bits = '4': expected a whole number"),
        ({"ignore": "lm_head"}, "here: ignore = 'lm_head': expected a list"),
        ({"ignore": ["a", 3]}, "here: ignore: expected strings, found 3"),
        ({"scheme": ""}, "here: scheme is empty"),
        ({"target_bits": 4.5}, "here: target_bits needs options"),
        ({"tensor_type": ["x"], "scheme": "q8_0"}, "here: tensor_type: expected"),
        ({"mtp": "lose"}, "--mtp 'lose'"),
    ],
)
def test_what_is_wrong_is_named(table: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadOption) as raised:
        recipe_of(table, "here", tmp_path)
    assert words in str(raised.value)
