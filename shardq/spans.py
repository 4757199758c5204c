"""Cuts a source shard into the pieces in which range mode brings it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardq.tasks import SPAN_BYTES, Task


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive bytes of a source shard, and the tasks that read nothing outside them."""

    shard: str
    begin: int
    end: int
    tasks: tuple[Task, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes in it."""
        return self.end - self.begin


def cut_spans(shard: str, size_bytes: int, tasks: Sequence[Task]) -> tuple[Span, ...]:
    """The whole shard in order, without gap or overlap: every byte passes by, so that its hash can be taken.

    A span is at most SPAN_BYTES long, unless a single task needs more. What no task reads (the header, tensors that are
    dropped) comes in spans without tasks.
    """
    spans: list[Span] = []
    at = 0
    for begin, end, group in _groups(tasks):
        spans += _blank(shard, at, begin)
        spans.append(Span(shard, begin, end, tuple(group)))
        at = end
    return (*spans, *_blank(shard, at, size_bytes))


def _groups(tasks: Sequence[Task]) -> Iterator[tuple[int, int, list[Task]]]:
    """Neighbouring tasks that fit into one span, and the bytes from the first to the last."""
    group: list[Task] = []
    first = last = 0
    for task in sorted(tasks, key=lambda t: t.extent):
        begin, end = task.extent
        if group and begin >= last and end - first > SPAN_BYTES:
            yield first, last, group
            group = []
        if not group:
            first, last = begin, begin
        group.append(task)
        last = max(last, end)
    if group:
        yield first, last, group


def _blank(shard: str, begin: int, end: int) -> Iterator[Span]:
    for at in range(begin, end, SPAN_BYTES):
        yield Span(shard, at, min(end, at + SPAN_BYTES), ())
