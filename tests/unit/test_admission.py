"""Admission: never more disk than the cap, and every run that is admitted gets through."""

import random
import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.admission import AHEAD, Admission, ShardCost, least_disk_bytes, megabytes
from shardq.errors import BudgetTooSmall

COSTS = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 30)), min_size=1, max_size=12)
MB = 1_000_000


def make(costs: list[tuple[int, int]], holds: Sequence[int] = ()) -> list[ShardCost]:
    """Shards that wait for so many after them, as far as there are that many."""
    wanted = [*holds, *[0] * len(costs)][: len(costs)]
    held = [min(hold, len(costs) - 1 - i) for i, hold in enumerate(wanted)]
    return [ShardCost(f"s{i}", *cost, hold) for i, (cost, hold) in enumerate(zip(costs, held, strict=True))]


class Disk:
    """What a run would have on the disk, by the pipeline's rules; events happen in any order."""

    def __init__(self, kept: int, waiting: dict[str, int], uploads: bool) -> None:
        self.kept, self.uploads = kept, uploads
        self.staged: dict[str, int] = {}
        self.outputs = dict(waiting)
        self.uploading = set(waiting)

    @property
    def used(self) -> int:
        return self.kept + sum(self.staged.values()) + sum(self.outputs.values())


def play(
    todo: list[ShardCost], kept: int, waiting: dict[str, int], cap: int | None, uploads: bool, seed: int
) -> tuple[int, int]:
    """Run to the end with events in random order; the highest use of disk, and of shards begun at a time."""
    chance = random.Random(seed)
    admission = Admission(todo, kept, waiting, cap, uploads, hurried=False)
    disk = Disk(kept, waiting, uploads)
    working: list[ShardCost] = []
    begun, peak, most = 0, disk.used, 0
    while begun < len(todo) or working or disk.uploading:
        while cost := admission.next():
            begun += 1
            working.append(cost)
            disk.outputs[cost.name] = cost.output_bytes
            if cost.staged_bytes:
                disk.staged[cost.name] = cost.staged_bytes
        assert admission.used_bytes == disk.used
        peak, most = max(peak, disk.used), max(most, len(disk.staged))
        ended = [c for c in working if todo.index(c) + c.hold < begun]
        assert ended or disk.uploading, "nothing runs and nothing may begin"
        if ended and (not disk.uploading or chance.random() < 0.5):
            cost = chance.choice(ended)
            working.remove(cost)
            disk.staged.pop(cost.name, None)
            admission.free(cost.name)
            if uploads:
                disk.uploading.add(cost.name)
        else:
            name = chance.choice(sorted(disk.uploading))
            disk.uploading.remove(name)
            size = disk.outputs.pop(name)
            admission.release(name, size)
    return peak, most


@given(COSTS, st.integers(1, 20), st.integers(0, 60), st.integers(0, 99))
def test_without_uploads_all_outputs_stay(costs: list[tuple[int, int]], kept: int, spare: int, seed: int) -> None:
    todo = make(costs)
    cap = least_disk_bytes(todo, kept, uploads=False) + spare
    peak, most = play(todo, kept, {}, cap, False, seed)
    assert peak <= cap
    assert most <= AHEAD


@given(COSTS, st.integers(1, 20), st.lists(st.integers(1, 30), max_size=4), st.integers(0, 60), st.integers(0, 99))
def test_with_uploads_outputs_leave(
    costs: list[tuple[int, int]], kept: int, waiting: list[int], spare: int, seed: int
) -> None:
    todo = make(costs)
    before = {f"w{i}": size for i, size in enumerate(waiting)}
    cap = max(least_disk_bytes(todo, kept, uploads=True), kept + sum(waiting)) + spare
    peak, _ = play(todo, kept, before, cap, True, seed)
    assert peak <= cap


@given(COSTS, st.lists(st.integers(0, 5), max_size=12), st.integers(1, 20), st.booleans(), st.integers(0, 99))
def test_shards_that_wait_for_later_ones_get_through_at_the_least_cap(
    costs: list[tuple[int, int]], holds: list[int], kept: int, uploads: bool, seed: int
) -> None:
    todo = make(costs, holds)
    cap = least_disk_bytes(todo, kept, uploads)
    peak, _ = play(todo, kept, {}, cap, uploads, seed)
    assert peak <= cap
    play(todo, kept, {}, None, uploads, seed)


@given(COSTS, st.integers(1, 20), st.booleans(), st.integers(0, 99))
def test_without_a_cap_few_are_under_way(costs: list[tuple[int, int]], kept: int, uploads: bool, seed: int) -> None:
    _, most = play(make(costs), kept, {}, None, uploads, seed)
    assert most <= AHEAD


def test_uploads_hold_the_next_shard_back() -> None:
    admission = Admission(make([(0, 1)] * 20), 1, {}, None, uploads=True, hurried=False)
    begun = 0
    while admission.next():
        begun += 1
    assert begun == 2 * AHEAD
    admission.release("s0", 1)
    assert admission.next() is not None
    assert admission.next() is None


def test_hurried_begins_all() -> None:
    admission = Admission(make([(0, 1)] * 20), 1, {}, None, uploads=False, hurried=True)
    assert sum(admission.next() is not None for _ in range(30)) == 20


def test_shards_begin_in_order_and_a_small_one_does_not_overtake() -> None:
    admission = Admission(make([(10, 10), (30, 1), (1, 1)]), 1, {}, 43, uploads=False, hurried=False)
    first = admission.next()
    assert first is not None
    assert first.name == "s0"
    assert admission.staged == ("s0",)
    assert admission.next() is None
    admission.free("s0")
    assert [c.name for c in iter(admission.next, None)] == ["s1"]
    admission.free("s1")
    assert [c.name for c in iter(admission.next, None)] == ["s2"]


ALL = r"at least ([\d.]+) MB, or ([\d.]+) MB with --stream, or ([\d.]+) MB with --push-to, or ([\d.]+) MB with both"
PUSHED = r"at least ([\d.]+) MB, or ([\d.]+) MB with --stream"
STREAMED = r"at least ([\d.]+) MB, or ([\d.]+) MB with --push-to"
BOTH = r"at least ([\d.]+) MB"


@pytest.mark.parametrize(
    ("uploads", "staged", "text"), [(False, 1, ALL), (True, 1, PUSHED), (False, 0, STREAMED), (True, 0, BOTH)]
)
def test_refusal_names_what_would_fit(uploads: bool, staged: int, text: str) -> None:
    outputs = (11 * MB + 7, 12 * MB)
    todo = make([(staged * (40 * MB + 1), outputs[0]), (staged * 30 * MB, outputs[1])])
    bare = make([(0, size) for size in outputs])
    costs = {"": (todo, uploads), "--stream": (bare, uploads), "--push-to": (todo, True), "both": (bare, True)}
    with pytest.raises(BudgetTooSmall) as refused:
        Admission(todo, 12_345, {}, least_disk_bytes(todo, 12_345, uploads) - 1, uploads, hurried=False)
    named = re.search(text + "$", str(refused.value))
    assert named is not None
    ways = ["", *re.findall(r"with (--stream|--push-to|both)", text)]
    for way, size in zip(ways, named.groups(), strict=True):
        shards, pushed = costs[way]
        cap, least = round(float(size) * MB), least_disk_bytes(shards, 12_345, pushed)
        assert least <= cap < least + 10_000
        assert play(shards, 12_345, {}, cap, pushed, 1)[0] <= cap


def test_outputs_that_wait_for_their_upload_count() -> None:
    Admission([], 1, {"a": 10, "b": 5}, 16, uploads=True, hurried=False)
    with pytest.raises(BudgetTooSmall):
        Admission([], 1, {"a": 10, "b": 5}, 15, uploads=True, hurried=False)


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(0, "0.00 MB"), (1, "0.01 MB"), (10_000, "0.01 MB"), (10_001, "0.02 MB")]
)
def test_megabytes_are_rounded_up(size_bytes: int, text: str) -> None:
    assert megabytes(size_bytes) == text
