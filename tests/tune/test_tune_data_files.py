"""Calibration texts from local files."""

from pathlib import Path

import pytest

from shardq.errors import SourceUnreadable
from shardq.tune.data_files import PIECE_CHARACTERS, Conversation, Running, cut_text, is_local, read_local

MESSAGE = '{"role": "user", "content": "hi"}'
READ = {
    "list.json": ('["a \\n", {"any": "b"}, {"text": "c", "id": 1}]', ["a", "b", "c"]),
    "object.json": ('{"x": "a", "y": "b"}', ["a", "b"]),
    "lines.jsonl": ('{"text": "a"}\n\n"b"\n', ["a", "b"]),
    "ids.jsonl": ('{"input_ids": [1, 2], "attention_mask": [1, 1]}\n[3]', [(1, 2), (3,)]),
    "chat.json": (f'[{{"messages": [{MESSAGE}], "id": 7}}]', [Conversation(({"role": "user", "content": "hi"},))]),
    "plain.txt": ("one\ntwo\n", [Running("one\ntwo\n")]),
    "separator.jsonl": ('"a\u2028b"\n"c"', ["a\u2028b", "c"]),  # no end of a line in JSON
}
REFUSED = {
    "number.json": ("[1.5]", "number.json, entry 0: expected a text"),
    "two.json": ('[{"a": "x", "b": "y"}]', "two.json, entry 0: expected one member"),
    "scalar.json": ('"x"', "expected a list or an object"),
    "truth.json": ("[[true]]", "entry 0"),
    "negative.json": ("[[-1]]", "entry 0"),
    "damaged.json": ("[", "damaged.json: not JSON"),
    "damaged.jsonl": ('"a"\n{', "damaged.jsonl, line 2: not JSON"),
    "message.json": ('[[{"role": "user"}]]', "role and content"),
    "table.csv": ("a,b", "known endings"),
}


@pytest.mark.parametrize("name", READ)
def test_each_form_is_read(tmp_path: Path, name: str) -> None:
    text, expected = READ[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_local(str(tmp_path / name)) == expected


@pytest.mark.parametrize("name", REFUSED)
def test_errors_name_the_file_and_the_entry(tmp_path: Path, name: str) -> None:
    text, message = REFUSED[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(SourceUnreadable, match=message) as caught:
        read_local(str(tmp_path / name))
    assert str(tmp_path) not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(SourceUnreadable, match=r"x\.txt: not UTF-8"):
        read_local(str(tmp_path / "x.txt"))


def test_a_folder_is_its_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jsonl").write_text('"second"')
    (tmp_path / "a.json").write_text('["first"]')
    (tmp_path / "c.txt").write_text("third")
    (tmp_path / "c.csv").write_text("not read")
    assert read_local(str(tmp_path)) == ["first", "second", Running("third")]


def test_an_empty_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceUnreadable, match=r"has no \.json"):
        read_local(str(tmp_path))
    with pytest.raises(SourceUnreadable, match="no such file"):
        read_local(str(tmp_path / "gone.json"))


def test_running_text_is_cut_at_ends_of_lines() -> None:
    text = ("x" * 99 + "\n") * (PIECE_CHARACTERS // 50)
    pieces = list(cut_text(text))
    assert len(pieces) > 1
    assert "".join(pieces) == text
    assert all(p.endswith("\n") and len(p) <= PIECE_CHARACTERS for p in pieces)
    unbroken = "y" * (PIECE_CHARACTERS + 1)
    assert [len(p) for p in cut_text(unbroken)] == [PIECE_CHARACTERS, 1]


def test_paths_are_told_from_names_of_the_hub(tmp_path: Path) -> None:
    assert all(is_local(n) for n in (str(tmp_path), "gone.jsonl", "./data", "~/data"))
    assert not any(is_local(n) for n in ("owner/name", "pile-10k"))
