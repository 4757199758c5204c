"""Calibration samples: what is chosen, cut, joined, mixed, dropped and told."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers_made import BOS, EOS, MARK, TEMPLATE, make_tokenizer, words

from shardq.errors import BadOption, MissingPackage, SourceUnreadable
from shardq.tune.data import Samples, load_samples
from shardq.tune.data_choice import share
from shardq.tune.tokenizing import Tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return make_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def around(tmp_path: Path) -> Tokenizer:
    return make_tokenizer(tmp_path / "around", around=True)


def write_lines(path: Path, values: Sequence[object]) -> str:
    path.write_text("\n".join(json.dumps(v) for v in values))
    return str(path)


def load(data: str | Sequence[str] | Sequence[Sequence[int]], tokenizer: Tokenizer, count: int, seqlen: int) -> Samples:
    return load_samples(data, tokenizer, count=count, seqlen=seqlen, seed=42)


def test_texts_are_cut_and_short_or_monotonous_ones_dropped(tokenizer: Tokenizer) -> None:
    data = [words(1, 2, 3, 4, 5), words(1, 2, 3), words(5, 5, 9, 5, 5), words(6, 7, 8, 9)]
    found = load(data, tokenizer, 9, 4)
    assert found.ids.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert found.ids.dtype == torch.int64
    assert (found.label, found.kind, found.dropped, found.seed, found.tokens) == ("list", "text", 2, 42, 8)


def test_half_of_one_token_is_not_too_much(tokenizer: Tokenizer) -> None:
    assert load([[1, 2, 5, 5]], tokenizer, 1, 4).ids.tolist() == [[1, 2, 5, 5]]


def test_ids_are_taken_as_they_are(around: Tokenizer) -> None:
    assert load([[1, 2, 3, 4], [5, 6]], around, 9, 3).ids.tolist() == [[1, 2, 3]]
    with pytest.raises(SourceUnreadable, match=f"ids below {MARK + 1}"):
        load([[1, 2, MARK + 1]], around, 1, 3)


def test_a_list_that_holds_something_else_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(SourceUnreadable, match="sample 1 of the list: expected a text, ids or messages"):
        load(["w1", 2.5], tokenizer, 1, 1)  # type: ignore[list-item]


def test_files_are_shuffled_by_the_seed_and_by_nothing_else(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [words(i, i + 1) for i in range(1, 100)])
    first = load(path, tokenizer, 5, 2)
    assert first.ids[:, 0].tolist() == [73, 61, 91, 10, 34]
    assert torch.equal(first.ids, load(path, tokenizer, 5, 2).ids)
    other = load_samples(path, tokenizer, count=5, seqlen=2, seed=43)
    assert not torch.equal(first.ids, other.ids)
    assert first.label == "x.jsonl"


def test_num_limits_a_set(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [words(i, i + 1) for i in range(1, 100)])
    assert torch.equal(load(f"{path}:num=3", tokenizer, 9, 2).ids, load(path, tokenizer, 3, 2).ids)


def test_joined_samples_are_full_and_have_their_special_tokens(
    tokenizer: Tokenizer, around: Tokenizer, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "x.jsonl", [words(i, i + 1, i + 2) for i in range(1, 160, 3)])
    bare, wrapped = (load(f"{path}:concat", t, 4, 5).ids for t in (tokenizer, around))
    flat = bare.flatten().tolist()
    assert bare.shape == (4, 5)
    assert flat[:3] == [flat[0], flat[0] + 1, flat[0] + 2]
    assert wrapped.shape == (4, 5)
    assert wrapped[:, 0].tolist() == [BOS] * 4
    assert wrapped[:, -1].tolist() == [EOS] * 4
    assert wrapped[:, 1:-1].flatten().tolist() == flat[:12]
    with pytest.raises(BadOption, match="no sample has 5 tokens"):
        load(path, tokenizer, 4, 5)


def test_running_text_is_cut_into_windows(around: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("\n".join(words(i, i + 1) for i in range(1, 100, 2)))
    found = load(str(tmp_path / "x.txt"), around, 99, 5)
    assert sorted(found.ids[:, 1].tolist()) == list(range(1, 99, 3))
    assert found.ids[:, 1].tolist() != sorted(found.ids[:, 1].tolist())
    assert found.dropped == 1  # the last window has one word
    assert (found.ids[:, 0] == BOS).all()


def test_a_chat_template_makes_texts_messages(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "chat", chat_template=TEMPLATE)
    path = write_lines(tmp_path / "x.jsonl", [words(1, 2)])
    for options, expected in {
        "apply_chat_template": [7, 0, 0, 0, 0, 0, 1, 2, 9],
        "system_prompt=w5": [7, 5, 1, 2, 9],
        "apply_chat_template:system_prompt=": [1, 2, 9],
    }.items():
        assert load(f"{path}:{options}", tokenizer, 1, len(expected)).ids.tolist() == [expected]
    messages = [{"role": "user", "content": "w3 "}, {"role": "assistant", "content": "w4"}]
    path = write_lines(tmp_path / "y.jsonl", [{"messages": messages}])
    assert load(path, tokenizer, 1, 2).ids.tolist() == [[3, 4]]
    assert load(f"{path}:system_prompt=w5", tokenizer, 1, 5).ids.tolist() == [[7, 5, 3, 4, 9]]


def test_a_rendered_beginning_is_not_doubled(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, around=True, chat_template="{{ bos_token }} {{ messages[-1].content }}")
    path = write_lines(tmp_path / "x.json", [])
    Path(path).write_text(json.dumps([words(1, 2)]))
    assert load(f"{path}:apply_chat_template", tokenizer, 1, 3).ids.tolist() == [[BOS, 1, 2]]


def test_templates_that_cannot_be_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [words(1, 2)])
    with pytest.raises(BadOption, match="has no chat template"):
        load(f"{path}:apply_chat_template", tokenizer, 1, 1)
    (tmp_path / "x.txt").write_text("w1 w2")
    with pytest.raises(BadOption, match="running text has no messages"):
        load(f"{tmp_path / 'x.txt'}:apply_chat_template", tokenizer, 1, 1)
    with pytest.raises(BadOption, match="no splits"):
        load(f"{path}:split=train", tokenizer, 1, 1)


SHARES = {
    "equal": ([50, 50, 50], [None, None, None], 9, [3, 3, 3]),
    "the longer make up": ([1, 50, 50], [None, None, None], 9, [1, 4, 4]),
    "named first": ([50, 60, 70], [None, 2, None], 10, [4, 2, 4]),
    "named alone": ([5, 50], [5, 20], 100, [5, 20]),
    "too many named": ([50, 60], [None, 20], 10, [10, 20]),
    "a named set that lacks some": ([3, 50], [7, None], 10, [3, 3]),
}


@pytest.mark.parametrize("case", SHARES)
def test_a_mix_has_its_proportions(case: str) -> None:
    lengths, wanted, count, expected = SHARES[case]
    assert share(lengths, wanted, count) == expected


def test_a_mix_is_shuffled_and_cut(tokenizer: Tokenizer, tmp_path: Path) -> None:
    low = write_lines(tmp_path / "low.jsonl", [words(i, i) for i in range(1, 50)])
    high = write_lines(tmp_path / "high.jsonl", [words(i, i) for i in range(50, 80)])
    found = load(f"{low},{high}:num=4", tokenizer, 12, 2)
    first = found.ids[:, 0]
    assert (int((first < 50).sum()), int((first >= 50).sum())) == (8, 4)
    assert {(first[i : i + 4] >= 50).all().item() for i in range(9)} == {False}
    assert (found.label, found.kind) == ("low.jsonl,high.jsonl", "text")


def test_random_ids_are_text_and_seeded(around: Tokenizer) -> None:
    found = load("random", around, 20, 100)
    assert found.ids.shape == (20, 100)
    assert int(found.ids.max()) < BOS
    assert len(found.ids.unique()) == BOS
    assert (found.kind, found.label, found.dropped) == ("random ids", "random", 0)
    assert torch.equal(found.ids[:3], load("random:num=3", around, 20, 100).ids)
    assert not torch.equal(found.ids, load_samples("random", around, count=20, seqlen=100, seed=7).ids)


def test_the_models_own_tokens_come_from_a_sampler(tokenizer: Tokenizer, tmp_path: Path) -> None:
    asked: list[tuple[int, int, int]] = []

    def sample(count: int, seqlen: int, seed: int) -> Samples:
        asked.append((count, seqlen, seed))
        return Samples(torch.full((count, seqlen), 3), "self", "self-generated", 0, seed)

    found = load_samples("self", tokenizer, count=2, seqlen=4, seed=5, sampler=sample)
    assert found.ids.tolist() == [[3] * 4] * 2
    assert found.kind == "self-generated"
    path = write_lines(tmp_path / "x.jsonl", [words(1, 2, 1, 2)] * 9)
    mixed = load_samples(f"{path},self", tokenizer, count=6, seqlen=4, seed=5, sampler=sample)
    assert (mixed.kind, sorted(mixed.ids[:, 0].tolist())) == ("unknown", [1, 1, 1, 3, 3, 3])
    assert asked == [(2, 4, 5), (3, 4, 5)]
    with pytest.raises(BadOption, match="the model samples it"):
        load("self", tokenizer, 2, 4)


def test_nothing_at_all_is_an_error_that_says_why(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [words(1, 2), words(3)])
    with pytest.raises(BadOption, match=r"dataset x\.jsonl: no sample has 4 tokens \(2 are too short"):
        load(path, tokenizer, 1, 4)
    with pytest.raises(BadOption, match="at least one sample"):
        load(path, tokenizer, 0, 4)


class Stream(list[dict[str, object]]):
    """What of the package datasets is used: an order of its own, and a limit."""

    def shuffle(self, seed: int) -> "Stream":
        return Stream(self[seed % len(self) :] + self[: seed % len(self)])

    def take(self, count: int) -> "Stream":
        return Stream(self[:count])


HUB = {
    "pile-10k": ({"text": "w1 w2", "meta": {}}, [1, 2]),
    "NeelNanda/pile-10k:split=train": ({"text": "w1 w2", "meta": {}}, [1, 2]),
    "opencode-instruct": ({"input": "w1", "output": "w2"}, [1, 2]),
    "mbpp:split=test": ({"text": "w1 ", "code": "w2"}, [1, 2]),
    "ultrachat_200k": ({"messages": [{"role": "user", "content": "w1 "}, {"role": "x", "content": "w2"}]}, [1, 2]),
    "Ultra-FineWeb:split=zh": ({"content": "w1 w2"}, [1, 2]),
    "someone/their-set": ({"id": 1, "content": "w1 w2"}, [1, 2]),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Stream]:
    """Rows by `repo` and `repo/split`; a repo that is not there cannot be reached."""
    sets: dict[str, Stream] = {}

    def load_dataset(repo: str, split: str, name: str | None = None, streaming: bool = False) -> Stream:
        if repo not in sets:
            raise ConnectionError("no route")
        return sets[repo]

    package = ModuleType("datasets")
    monkeypatch.setattr(package, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", package)
    return sets


@pytest.mark.parametrize("name", HUB)
def test_sets_of_the_hub_are_read_by_their_columns(name: str, tokenizer: Tokenizer, hub: dict[str, Stream]) -> None:
    from shardq.tune.data_grammar import parse_datasets
    from shardq.tune.data_hub import find_hub_set

    row, expected = HUB[name]
    (asked,) = parse_datasets(name)
    hub[find_hub_set(asked).repo] = Stream([row] * 3)
    assert load(name, tokenizer, 1, 2).ids.tolist() == [expected]


def test_an_unreachable_set_and_a_missing_package_are_told(
    tokenizer: Tokenizer, hub: dict[str, Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceUnreadable, match=r"pile-10k, split train: ConnectionError: no route; .*give a file"):
        load("pile-10k", tokenizer, 1, 2)
    hub["a/b"] = Stream([{"id": "w1", "name": "w2"}])
    with pytest.raises(SourceUnreadable, match=r"a/b: expected a column text or content"):
        load("a/b", tokenizer, 1, 2)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackage, match=r"shardq\[tune\]"):
        load("pile-10k", tokenizer, 1, 2)


def test_names_that_nothing_has_are_refused(tokenizer: Tokenizer) -> None:
    for name, message in {
        "pile": "known are random, self, pile-10k",
        "pile-10k:split=test": "it has train",
        "codeparrot/github-code-clean": "is a script",
        "AudioCaps/audiocaps": "not on the Hub",
    }.items():
        with pytest.raises(BadOption, match=message):
            load(name, tokenizer, 1, 2)
    with pytest.raises(SourceUnreadable, match="no such file"):
        load("gone.jsonl", tokenizer, 1, 2)
