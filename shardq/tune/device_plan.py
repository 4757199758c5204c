"""Which matrices of a block lie on which of several devices: by their bytes, in the order of the block, so that each
device has neighbours."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Final

FILLED: Final = 0.7  # of a device's memory by what is planned; the rest is for what a block computes on its way
LEARNED_BYTES: Final = 6  # of a weight: V in fp32, and a code in a byte of now and one of the best step


@dataclass(frozen=True, slots=True)
class Atom:
    """What lies on one device: a Linear layer, or an expert of a module with stacks."""

    module: str  # of the block
    expert: int | None
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Lot:
    """What one device gets of a module."""

    device: int  # of those that there are
    experts: range | None  # None: the module is not cut


def count_devices(size_bytes: int, rooms_bytes: Sequence[int]) -> int:
    """How many of the devices, from the first on, have room for so much; all where no number of them has."""
    for count, room_bytes in enumerate(accumulate(max(0, room) for room in rooms_bytes), 1):
        if size_bytes <= room_bytes:
            return count
    return len(rooms_bytes)


def deal_out(sizes_bytes: Sequence[int], rooms_bytes: Sequence[int]) -> tuple[int, ...]:
    """The device of each atom, rising: each device gets the share of all bytes that its room is of all rooms, to half
    an atom. Without any room the first has all."""
    rooms = [max(0, room) for room in rooms_bytes]
    total, whole = sum(sizes_bytes), sum(rooms)
    ends = list(accumulate(rooms))
    last = max((i for i, room in enumerate(rooms) if room), default=0)
    found, before = [], 0
    for size in sizes_bytes:
        middle = (2 * before + size) * whole  # of 2 * total * whole: integers, which are exact
        found.append(next((i for i, end in enumerate(ends) if middle < 2 * total * end), last))
        before += size
    return tuple(found)


def plan_lots(atoms: Sequence[Atom], rooms_bytes: Sequence[int]) -> Mapping[str, tuple[Lot, ...]]:
    """What devices get of each module."""
    dealt = deal_out([a.size_bytes for a in atoms], rooms_bytes)
    lots: dict[str, tuple[Lot, ...]] = {}
    for module, own in groupby(zip(atoms, dealt, strict=True), lambda pair: pair[0].module):
        lots[module] = tuple(_lots(list(own)))
    return lots


def _lots(own: Sequence[tuple[Atom, int]]) -> Iterator[Lot]:
    for device, of in groupby(own, lambda pair: pair[1]):
        experts = [a.expert for a, _ in of]
        first, last = experts[0], experts[-1]
        yield Lot(device, None if first is None or last is None else range(first, last + 1))
