"""Cuts a source shard into the pieces in which range mode brings it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from shardq.onepass import BOND_BYTES, OnePass, bond_extents
from shardq.tasks import SPAN_BYTES, Bundle


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive bytes of a source shard, and the bundles that read nothing outside them."""

    shard: str
    begin: int
    end: int
    bundles: tuple[Bundle, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes in it."""
        return self.end - self.begin


def cut_spans(shard: str, size_bytes: int, bundles: Sequence[Bundle]) -> tuple[Span, ...]:
    """The whole shard in order, without gap or overlap: every byte passes by, so that its hash can be taken.

    A span is at most SPAN_BYTES long, unless a single bundle needs more, or bundles that wait for each other do (see
    onepass.BOND_BYTES). What no bundle reads (the header, tensors that are dropped) comes in spans without any.
    """
    spans: list[Span] = []
    at = 0
    for begin, end, group in _groups(bundles):
        spans += _blank(shard, at, begin)
        spans.append(Span(shard, begin, end, tuple(group)))
        at = end
    return (*spans, *_blank(shard, at, size_bytes))


def keep_bundles(spans: Sequence[Span], bundles: Sequence[Bundle]) -> tuple[Span, ...]:
    """The same spans with those `bundles` that an interrupted run has left: cut anew, one could outgrow its memory."""
    left = {b.id: b for b in bundles}
    return tuple(replace(s, bundles=tuple(left[b.id] for b in s.bundles if b.id in left)) for s in spans)


def cut_all(work: OnePass) -> dict[str, tuple[Span, ...]]:
    """The spans of every shard."""
    by_shard: dict[str, list[Bundle]] = {s.name: [] for s in work.checkpoint.shards}
    for bundle in work.bundles:
        by_shard[bundle.shard].append(bundle)
    return {s.name: cut_spans(s.name, s.size_bytes, by_shard[s.name]) for s in work.checkpoint.shards}


def largest_span_bytes(work: OnePass) -> int:
    """Memory that range mode needs for one piece."""
    return max((s.size_bytes for spans in cut_all(work).values() for s in spans), default=0)


def _groups(bundles: Sequence[Bundle]) -> Iterator[tuple[int, int, list[Bundle]]]:
    """Neighbouring bundles that fit into one span, and the bytes from the first to the last."""
    bonds = bond_extents(bundles)
    group: list[Bundle] = []
    first = last = whole = 0  # `whole`: up to here nothing may be cut off, as something in the group waits for it
    for bundle in sorted(bundles, key=lambda b: b.extent):
        begin, end = bundle.extent
        bond = bonds.get(bundle.bond, (begin, end))
        bonded = begin < whole and end - first <= BOND_BYTES
        if group and begin >= last and not bonded and max(end, bond[1]) - first > SPAN_BYTES:
            yield first, last, group
            group = []
        if not group:
            first, last = begin, begin
        group.append(bundle)
        last, whole = max(last, end), max(whole, bond[1])
    if group:
        yield first, last, group


def _blank(shard: str, begin: int, end: int) -> Iterator[Span]:
    for at in range(begin, end, SPAN_BYTES):
        yield Span(shard, at, min(end, at + SPAN_BYTES), ())
