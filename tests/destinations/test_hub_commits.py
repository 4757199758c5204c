"""Exactly one commit: lost answers, branches that move, outputs that are replaced."""

import hashlib
import json
from types import ModuleType
from typing import Any

import pytest

from shardq.destinations.base import StoredFile
from shardq.destinations.hub import HubDestination
from shardq.errors import HubAccess, HubTransfer
from shardq.sources.hub_errors import RetryPolicy

REPO = "org/quantized"
QUICK = RetryPolicy(failures=3, first_wait_s=0.01, longest_wait_s=0.02, timeout_s=5.0)


class Output:
    """A small output, made of one letter."""

    def __init__(self, letter: str, shards: int) -> None:
        names = [f"model-{i}-of-{shards}.safetensors" for i in range(1, shards + 1)]
        self.large = {name: f"{letter}{name}".encode() for name in names}
        self.files = [StoredFile(n, len(d), hashlib.sha256(d).hexdigest()) for n, d in self.large.items()]
        self.small = {"config.json": letter.encode(), "README.md": f"# {letter}\n".encode(), f"{letter}.txt": b"x"}
        record = {"fingerprint": letter, "files": dict.fromkeys(names), "others": [*self.small, "shardq.json"]}
        self.small["shardq.json"] = json.dumps(record).encode()

    def put(self, hub: Any) -> None:
        """Into storage, without requests."""
        hub.objects |= {f.sha256: self.large[f.name] for f in self.files}


A, B = Output("a", 3), Output("b", 2)


@pytest.fixture
def destination(hub: Any) -> HubDestination:
    """A new repo, prepared; the shards of both outputs are in storage."""
    destination = HubDestination(REPO, endpoint=hub.url, retry=QUICK)
    destination.prepare()
    A.put(hub)
    B.put(hub)
    return destination


def push(destination: HubDestination, output: Output) -> str:
    return destination.commit(output.files, output.small, f"Publish {output.small['config.json'].decode()}")


def content(hub: Any) -> dict[str, bytes]:
    return {name: data for name, data in hub.files(REPO).items() if name != ".gitattributes"}


def test_a_lost_answer_makes_one_commit(hub: Any, fake: ModuleType, destination: HubDestination) -> None:
    hub.write_faults.append(fake.WriteFault("lose_reply", "/commit/", times=100))
    commit = push(destination, A)
    assert [c.oid for c in hub.commits] == [commit]
    assert len(hub.seen("/commit/", "POST")) == 1
    assert content(hub) == {**A.large, **A.small}


def test_a_lost_answer_and_then_an_edited_card(hub: Any, fake: ModuleType, destination: HubDestination) -> None:
    """Ours was made, but the head is not it any more."""
    hub.write_faults.append(fake.WriteFault("lose_reply", "/commit/"))
    real = hub.repos[REPO].commit

    def commit_and_edit(files: dict[str, bytes], ref: str) -> str:
        sha: str = real(files, ref)
        hub.repos[REPO].commit = real
        hub.edit(REPO, {"README.md": b"# edited\n"})
        return sha

    hub.repos[REPO].commit = commit_and_edit
    found = push(destination, A)
    assert found == hub.repos[REPO].refs["main"]
    assert len(hub.commits) == 1
    assert content(hub)["README.md"] == b"# edited\n"


@pytest.mark.parametrize("status", [429, 503, 520])
def test_failures_before_the_commit_are_tried_again_on_the_same_parent(
    hub: Any, fake: ModuleType, destination: HubDestination, status: int
) -> None:
    hub.write_faults.append(fake.WriteFault("status", "/commit/", times=2, status=status))
    commit = push(destination, A)
    assert [c.oid for c in hub.commits] == [commit]


def test_patience_with_a_commit_ends(hub: Any, fake: ModuleType, destination: HubDestination) -> None:
    hub.write_faults.append(fake.WriteFault("status", "/commit/", times=100))
    with pytest.raises(HubTransfer, match=r"the commit: gave up after 3 failures.*503"):
        push(destination, A)
    assert hub.commits == []
    assert content(hub) == {}


def test_an_answer_that_says_nothing_is_looked_into(hub: Any, fake: ModuleType, destination: HubDestination) -> None:
    hub.write_faults.append(fake.WriteFault("status", "/commit/", status=200))
    commit = push(destination, A)
    assert [c.oid for c in hub.commits] == [commit]


@pytest.mark.parametrize("when", ["before", "during"])
def test_an_edited_card_is_followed(hub: Any, destination: HubDestination, when: str) -> None:
    def edit() -> None:
        hub.edit(REPO, {"notes.md": b"by hand"})

    if when == "before":
        edit()
    else:
        hub.before_commit = edit
    commit = push(destination, A)
    assert [c.oid for c in hub.commits] == [commit]
    assert content(hub) == {**A.large, **A.small, "notes.md": b"by hand"}


def test_a_branch_that_keeps_moving_is_left_alone(hub: Any, destination: HubDestination) -> None:
    def edit() -> None:
        hub.edit(REPO, {"notes.md": str(len(hub.repos[REPO].commits)).encode()})
        hub.before_commit = edit

    hub.before_commit = edit
    with pytest.raises(HubAccess, match="keeps moving"):
        push(destination, A)
    assert hub.commits == []


@pytest.mark.parametrize("when", ["before", "during"])
def test_another_output_is_not_overwritten(hub: Any, destination: HubDestination, when: str) -> None:
    def publish() -> None:
        hub.edit(REPO, {**B.large, **B.small})

    if when == "before":
        publish()
    else:
        hub.before_commit = publish
    with pytest.raises(HubAccess, match=r"brought another shardq.json") as caught:
        push(destination, A)
    assert hub.repos[REPO].refs["main"] in str(caught.value)
    assert content(hub) == {**B.large, **B.small}


def test_a_twin_that_was_faster_counts_as_ours(hub: Any, destination: HubDestination) -> None:
    def publish() -> None:
        hub.edit(REPO, {**A.large, **A.small})

    hub.before_commit = publish
    assert push(destination, A) == hub.repos[REPO].refs["main"]
    assert hub.commits == []


def test_what_the_replaced_output_lists_goes_away(hub: Any, destination: HubDestination) -> None:
    hub.edit(REPO, {"by_hand.txt": b"mine", "sub/more.safetensors": b"mine too"})
    push(destination, A)
    again = HubDestination(REPO, endpoint=hub.url, retry=QUICK)
    again.prepare()
    assert again.provenance() == json.loads(A.small["shardq.json"])
    push(again, B)
    kept = {"by_hand.txt": b"mine", "sub/more.safetensors": b"mine too"}
    assert content(hub) == {**B.large, **B.small, **kept}
    assert len(hub.commits) == 2


@pytest.mark.parametrize(
    "record",
    [b"no JSON", b"[]", b'{"files": 7, "others": [1, "absent.txt", ".gitattributes"]}', b'{"files": {"keep.bin": 1}}'],
)
def test_a_strange_record_harms_nothing(hub: Any, destination: HubDestination, record: bytes) -> None:
    hub.edit(REPO, {"shardq.json": record, "config.json": b"old"})
    again = HubDestination(REPO, endpoint=hub.url, retry=QUICK)
    again.prepare()
    push(again, A)
    assert content(hub) == {**A.large, **A.small}
    assert ".gitattributes" in hub.files(REPO)


def test_a_new_card_of_the_same_output_is_committed(hub: Any, destination: HubDestination) -> None:
    push(destination, A)
    small = {**A.small, "README.md": b"# new\n"}
    again = HubDestination(REPO, endpoint=hub.url, retry=QUICK)
    again.prepare()
    assert not again.holds(A.files, small)
    again.commit(A.files, small, "New card")
    assert [c.message for c in hub.commits] == ["Publish a", "New card"]
    assert content(hub)["README.md"] == b"# new\n"
