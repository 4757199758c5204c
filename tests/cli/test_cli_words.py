"""What the command line makes of the user's words, and how it shows names."""

import pytest

from shardq.cli._console import show_bytes, show_share
from shardq.cli._options import split_patterns
from shardq.collapse import collapse
from shardq.errors import BadOption
from shardq.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1", 1),
        ("6000000000", 6_000_000_000),
        ("500M", 500_000_000),
        ("500m", 500_000_000),
        ("6G", 6_000_000_000),
        ("6 GB", 6_000_000_000),
        ("6GiB", 6 << 30),
        ("6gi", 6 << 30),
        ("1.5k", 1500),
        ("0.5KiB", 512),
        (" 2T ", 2_000_000_000_000),
    ],
)
def test_size_is_parsed(text: str, size_bytes: int) -> None:
    assert parse_size(text, "--max-ram") == size_bytes


@pytest.mark.parametrize("text", ["", "0", "-1", "lots", "6X", "6GG", "1e9", "G", "6iB", "nan", "0.1B", "1,5G"])
def test_size_is_refused_with_the_option(text: str) -> None:
    with pytest.raises(BadOption, match="--max-disk"):
        parse_size(text, "--max-disk")


def test_no_size_is_no_limit() -> None:
    assert parse_size(None, "--max-ram") is None


@pytest.mark.parametrize(
    ("values", "patterns"),
    [
        ([], []),
        (["lm_head"], ["lm_head"]),
        (["lm_head,*.mlp", "a"], ["lm_head", "*.mlp", "a"]),
        ([" a , b ,"], ["a", "b"]),
        (["re:a{1,2}b,c"], ["re:a{1,2}b", "c"]),
        (["re:(a,(b,c)),d"], ["re:(a,(b,c))", "d"]),
        (["re:x[,]y,re:z"], ["re:x[,]y", "re:z"]),
        (["re:a\\(,b"], ["re:a\\(", "b"]),
        ([""], [""]),
        ([","], [","]),
    ],
)
def test_patterns_are_split_at_commas_outside_brackets(values: list[str], patterns: list[str]) -> None:
    assert split_patterns(values) == patterns


def test_collapse_joins_names_that_differ_in_numbers() -> None:
    names = [f"layers.{i}.experts.{e}.up" for i in (0, 1, 2, 5) for e in (0, 1)]
    assert collapse([*names, "norm", "layers.7.x2"]) == {
        "layers.[0-2,5].experts.[0-1].up": 8,
        "norm": 1,
        "layers.7.x2": 1,
    }


def test_collapse_leaves_odd_names_alone() -> None:
    assert collapse(["a.#.b", "", "..", "3"]) == {"a.#.b": 1, "": 1, "..": 1, "3": 1}


def test_sizes_are_shown_in_decimal_units() -> None:
    assert [show_bytes(n) for n in (0, 999, 1000, 2_700_000_000)] == ["0 B", "999 B", "1.0 kB", "2.7 GB"]
    assert show_share(100_000_000, 2_700_000_000) == "0.1/2.7 GB"
