"""The manifest of a batch: what it says, what it is refused for, and the examples."""

from pathlib import Path

import pytest

from shardq.batch.manifest import Manifest, read_manifest
from shardq.batch.schedule import Patience, kind_of
from shardq.batch.standing import first_standing, next_standing
from shardq.batch.state import Standing, StatusFile, Trouble, read_status
from shardq.batch.up_to_date import Look, identify
from shardq.errors import BadOption, HubTransfer, ShardqError, UnknownScheme
from shardq.version import VERSION

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "batch").glob("*.toml"))
MODEL = '[[model]]\nsource = "org/name"\npush_to = "me/name"\n'


def read(tmp_path: Path, text: str) -> Manifest:
    path = tmp_path / "some.toml"
    path.write_text(text)
    return read_manifest(path)


def test_everything_that_a_manifest_says(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    text = """
        folder = "state"
        [recipes.small]
        scheme = "W2A16G64"
        ignore = ["lm_head"]
        [defaults]
        push_to = "me/{owner}-{name}-{scheme}-{layout}-{recipe}"
        private = true
        collection = "me/All of them"
        recipes = ["small", "MXFP4@compressed-tensors", { scheme = "W4A16@gptq", bits = 8 }]
        [budget]
        parallel = 3
        max_ram = "6G"
        max_disk = "50GiB"
        max_rate = "400Mbit"
        stream = true
        [retry]
        attempts = 2
        first_wait = "90s"
        longest_wait = "2h"
        [[model]]
        source = "org/name@v1"
        [[model]]
        source = "checkpoint"
        output_dir = "out/{name}"
        push_to = "me/other@dev"
        keep_local = true
        subfolder = "inside"
        [model.recipes]
        fine = { scheme = "W4A16", layer_config = { "**.down_proj" = "W8A16" } }
    """
    manifest = read(tmp_path, text)
    assert manifest.folder == tmp_path / "state"
    assert manifest.patience == Patience(2, 90.0, 7200.0)
    limits = manifest.limits
    assert (limits.parallel, limits.stream, limits.max_rate_bytes_s) == (3, True, 50_000_000)
    assert (limits.max_ram_bytes, limits.max_disk_bytes) == (6_000_000_000, 50 << 30)
    first, second = manifest.models
    assert (first.source, first.revision, first.is_repo) == ("org/name", "v1", True)
    assert [e.label for e in first.entries] == [
        "me/org-name-W2A16G64-auto_round-small",
        "me/org-name-MXFP4-compressed-tensors-MXFP4",
        "me/org-name-W8A16-gptq-W8A16",
    ]
    assert {(e.private, e.keep_local, e.collection) for e in first.entries} == {(True, False, "me/All of them")}
    assert first.entries[0].out == tmp_path / "state" / "work" / "me--org-name-W2A16G64-auto_round-small"
    assert (second.source, second.revision, second.subfolder, second.is_repo) == (
        str(tmp_path / "checkpoint"), None, "inside", False,
    )  # fmt: skip
    (entry,) = second.entries
    assert (entry.label, entry.out, entry.keep_local) == ("me/other@dev", tmp_path / "out" / "checkpoint", True)
    assert entry.recipe.layer_rules[0].scheme == "W8A16"


def test_what_a_manifest_need_not_say(tmp_path: Path) -> None:
    manifest = read(tmp_path, '[[model]]\nsource = "org/name@latest"\noutput_dir = "{name}"\n')
    assert manifest.folder == tmp_path / "some.batch"
    (model,) = manifest.models
    assert (model.revision, model.entries[0].title, model.entries[0].repo) == (None, "W4A16", None)
    assert manifest.patience == Patience()


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("", BadOption, "at least one [[model]]"),
        ("= 3", BadOption, "line 1"),
        (f'floder = "x"\n{MODEL}', BadOption, "some.toml: unknown key 'floder'"),
        (f"{MODEL}recipe = []", BadOption, "some.toml: model 1: unknown key 'recipe'"),
        (f"[budget]\nmax_ram = 6\n{MODEL}", BadOption, "budget: max_ram = 6: expected a string"),
        (f'[budget]\nmax_ram = "6X"\n{MODEL}', BadOption, "budget: max_ram '6X' is not a size"),
        (f"[budget]\nparallel = true\n{MODEL}", BadOption, "parallel = True: expected a whole number"),
        (f'[budget]\nmax_rate = "1k"\n{MODEL}', BadOption, "--max-rate 1000 bytes/s"),
        (f'[retry]\nfirst_wait = "5"\n{MODEL}', BadOption, "first_wait '5' is not a time"),
        (f"[retry]\nattempts = 0\n{MODEL}", BadOption, "attempts = 0"),
        ('[[model]]\npush_to = "me/a"\n', BadOption, "model 1: expected a source"),
        ('[[model]]\nsource = "org/name"\n', BadOption, "model 1 (org/name): nowhere to go"),
        ('[[model]]\nsource = "nothing"\npush_to = "me/a"\n', BadOption, "neither org/name[@revision] nor a folder"),
        (f'{MODEL}recipes = ["W4A17"]', UnknownScheme, "W4A17"),
        (f"{MODEL}recipes = [{{ sheme = 'W4A16' }}]", BadOption, "model 1 (org/name): recipe 1: unknown key 'sheme'"),
        (f'[recipes.a]\nscheme = "W4A16"\npure = true\n{MODEL}', BadOption, "recipes.a: pure means nothing for scheme"),
        (f'[recipes.a]\noptions = "W4A16"\n{MODEL}', BadOption, "recipes.a: options has a meaning only with"),
        (f'{MODEL}recipes = ["W4A16", "W8A16"]', BadOption, "me/name would be made more than once"),
        (f"{MODEL}{MODEL}", BadOption, "me/name would be made more than once"),
        ('[[model]]\nsource = "org/name"\npush_to = "me/{size}"\n', BadOption, "unknown field {size}"),
        ('[[model]]\nsource = "org/name"\npush_to = "me"\n', BadOption, "push_to gives 'me'"),
        ('[[model]]\nsource = "org/name@a"\nrevision = "b"\npush_to = "me/a"\n', BadOption, "two revisions"),
        ('[[model]]\nsource = "."\nrevision = "b"\npush_to = "me/a"\n', BadOption, "a folder has no revisions"),
        ('[[model]]\nsource = "org/name"\noutput_dir = "a"\nprivate = true\n', BadOption, "private has a meaning only"),
        (f"{MODEL}keep_local = true", BadOption, "keep_local needs output_dir"),
        (f'{MODEL}collection = "mine"', BadOption, "collection 'mine': expected owner/title"),
        (
            '[[model]]\nsource = "org/name"\npush_to = "me/{recipe}"\n[model.recipes]\na = { mtp = "drop" }\nb = {}\n',
            BadOption,
            "model 1 (org/name): --mtp drop for some outputs only",
        ),
    ],
)
def test_what_is_wrong_is_refused_with_its_place(
    tmp_path: Path, text: str, error: type[ShardqError], words: str
) -> None:
    with pytest.raises(error) as raised:
        read(tmp_path, text)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_are_read(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    (tmp_path / "checkpoints" / "first").mkdir(parents=True)
    assert sum(len(m.entries) for m in read(tmp_path, text).models) >= 3


def test_the_manifest_of_the_documentation_is_read(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "batch.md").read_text()
    block = text.partition("```toml\n")[2].partition("```")[0]
    labels = [e.label for m in read(tmp_path, block).models for e in m.entries]
    assert labels == ["me/name-W4A16", "me/name-MXFP4", "me/name-FP8-W4A16", "me/name-FP8-MXFP4"]


def test_every_error_has_a_kind() -> None:
    assert {kind_of(e.__name__) for e in ShardqError.__subclasses__() if e.__module__ == "shardq.errors"} == {
        "passing", "outside", "settled",
    }  # fmt: skip
    assert kind_of("HubTransfer") == kind_of("Terminated") == kind_of("Crashed") == "passing"
    assert kind_of("HubAccess") == kind_of("BudgetTooSmall") == "outside"
    assert kind_of("UnknownTensor") == kind_of("NonFiniteWeight") == "settled"


def test_waits_grow_and_stay_the_same_for_the_same_history() -> None:
    assert [Patience().wait_s(n) for n in (1, 2, 3, 4, 500)] == [60.0, 240.0, 960.0, 3600.0, 3600.0]


def test_standings_follow_from_what_was(tmp_path: Path) -> None:
    (model,) = read(tmp_path, MODEL).models
    (entry,) = model.entries
    look, patience = Look(entry, "c" * 40, False, "new"), Patience()
    new = first_standing(None, model, look, patience)
    assert (new.state, new.attempts, new.recipe) == ("waiting", 0, identify(entry.recipe))
    later = next_standing(new, Trouble("HubTransfer", "x"), True, patience)
    assert (later.state, later.attempts) == ("waiting", 1)
    again = first_standing(later, model, look, patience)
    assert (again.attempts, again.next_try) == (1, later.next_try)
    settled = next_standing(new, Trouble("UnknownTensor", "x"), False, patience)
    assert settled.state == first_standing(settled, model, look, patience).state == "failed"
    moved = Look(entry, "d" * 40, False, "moved")
    assert first_standing(settled, model, moved, patience).state == "waiting"
    outside = next_standing(new, Trouble("HubAccess", "x"), False, patience)
    assert first_standing(outside, model, look, patience).state == "waiting"
    stopped = next_standing(new, Trouble("Terminated", "x"), True, patience, stopped=True)
    assert (stopped.state, stopped.attempts, stopped.error) == ("waiting", 0, None)
    unknown = first_standing(later, model, Look(entry, None, False, "", error=HubTransfer("x")), patience)
    assert (unknown.state, unknown.attempts) == ("waiting", 2)
    done = first_standing(later, model, Look(entry, "c" * 40, True, "up to date"), patience)
    assert (done.state, done.attempts, done.error) == ("done", 0, None)


def test_status_file(tmp_path: Path) -> None:
    path = tmp_path / "state" / "status.json"
    status = StatusFile(path, "some.toml", ["a", "b"])
    kept = Standing("failed", "org/name", "c" * 40, error=Trouble("HubAccess", "no"), next_try=1.5)
    status.put({"a": kept, "b": Standing("done")})
    assert read_status(path) == {"a": kept, "b": Standing("done")}
    assert StatusFile(path, "some.toml", ["a"]).get("b") is None  # no longer in the manifest
    assert VERSION in path.read_text()
    for text, words in (("{", "is no status file"), ('{"format": 9, "entries": {}}', "has format 9, expected 1")):
        path.write_text(text)
        with pytest.raises(BadOption, match=words):
            read_status(path)
