"""Folders as sources, and which source a text names."""

import os
from pathlib import Path

import pytest

from shardq.errors import BadOption, CorruptShard, SourceUnreadable
from shardq.sources import open_source
from shardq.sources.base import find_file
from shardq.sources.local import open_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "My-Model"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / ".cache").mkdir()
    (root / "config.json").write_bytes(b"0123456789")
    (root / "sub" / "a.safetensors").write_bytes(b"abc")
    (root / "sub" / "deep" / "b.json").write_bytes(b"{}")
    (root / ".cache" / "hidden").write_bytes(b"x")
    (root / ".gitattributes").write_bytes(b"x")
    (root / "link.bin").symlink_to(root / "config.json")
    (root / "dangling.bin").symlink_to(root / "nowhere")
    return root


def test_listing_is_recursive_sorted_and_follows_file_links(folder: Path) -> None:
    source = open_source(str(folder))
    assert [(f.name, f.size_bytes, f.sha256) for f in source.files()] == [
        (".gitattributes", 1, None),
        ("config.json", 10, None),
        ("link.bin", 10, None),
        ("sub/a.safetensors", 3, None),
        ("sub/deep/b.json", 2, None),
    ]
    assert source.label == "My-Model"
    assert source.commit is None
    assert not source.remote


def test_label_is_the_folder_name_however_it_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert open_source(".").label == "My-Model"
    assert open_source("./sub/..").label == "My-Model"
    assert open_source(f"{folder}/").label == "My-Model"


def test_subfolder_names_are_relative(folder: Path) -> None:
    source = open_source(str(folder), subfolder="./sub/")
    assert [f.name for f in source.files()] == ["a.safetensors", "deep/b.json"]
    assert source.read("deep/b.json", 0, 2) == b"{}"
    assert source.label == "My-Model"


def test_reads_are_exact(folder: Path) -> None:
    source = open_folder(str(folder))
    assert source.read("config.json", 2, 5) == b"234"
    assert source.read("config.json", 3, 3) == b""
    assert source.local_path("config.json") == folder / "config.json"
    assert source.local_path("nothing") is None
    with pytest.raises(CorruptShard, match=r"config\.json is truncated: 2 of 4 bytes"):
        source.read("config.json", 8, 12)
    with pytest.raises(SourceUnreadable, match="nothing: No such file"):
        source.read("nothing", 0, 1)
    with pytest.raises(SourceUnreadable, match="My-Model has no file 'nothing'"):
        find_file(source.files(), "nothing", source.label)


def test_folder_wins_over_other_meanings(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("org/model", "demo"):
        (tmp_path / name).mkdir(parents=True)
        assert not open_source(name).remote
    monkeypatch.chdir(folder)
    assert open_source("demo").label == "demo"
    assert open_source("demo").remote


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("./nothing", "no folder ./nothing: check the path"),
        ("/no/such/folder", "no folder /no/such/folder"),
        ("~/no-such-folder", "no folder ~/no-such-folder"),
        ("nothing", "neither a folder here nor a Hub repo"),
        ("a/b/c", "neither a folder here nor a Hub repo"),
        ("org/na me", "neither a folder here nor a Hub repo"),
        ("", "neither a folder here nor a Hub repo"),
        ("hf://datasets/org/name", "neither a folder here nor a Hub repo"),
        ("org/name@", "without a revision"),
        ("s3://bucket/name", "a URL of a kind that is not read"),
    ],
)
def test_text_that_names_nothing_is_explained(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceUnreadable, match=message):
        open_source(text)


def test_file_instead_of_folder_is_explained(folder: Path) -> None:
    with pytest.raises(SourceUnreadable, match="is a file; give the folder"):
        open_source(str(folder / "config.json"))
    with pytest.raises(SourceUnreadable, match=r"no folder .*missing"):
        open_source(str(folder), subfolder="missing")


def test_options_that_contradict_are_refused(folder: Path) -> None:
    with pytest.raises(BadOption, match="has no revisions"):
        open_source(str(folder), revision="main")
    with pytest.raises(BadOption, match="demo model has neither"):
        open_source("demo", revision="main")
    for subfolder in ("../other", "/etc", "a/../../b"):
        with pytest.raises(BadOption, match="inside the source"):
            open_source(str(folder), subfolder=subfolder)


def test_unreadable_folder_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # permission bits do not stop root, so the system call fails here instead
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SourceUnreadable, match=r"cannot read .*My-Model: Permission denied"):
        open_source(str(folder))
