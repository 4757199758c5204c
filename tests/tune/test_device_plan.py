"""Which matrices lie on which device: neighbours together, to each device its share, and stacks cut between experts."""

import pytest

from shardq.tune.device_plan import Atom, Lot, count_devices, deal_out, plan_lots


@pytest.mark.parametrize(
    ("sizes", "rooms", "dealt"),
    [
        ([1, 1, 1, 1], [1, 1], (0, 0, 1, 1)),
        ([1, 1, 1, 1], [5], (0, 0, 0, 0)),
        ([1, 1, 1, 1], [3, 1], (0, 0, 0, 1)),
        ([1, 1, 1, 1], [0, 7], (1, 1, 1, 1)),
        ([1, 1, 1, 1], [7, -3], (0, 0, 0, 0)),
        ([1, 1, 1, 1], [0, 0], (0, 0, 0, 0)),
        ([1, 1, 1, 9], [1, 1], (0, 0, 0, 1)),
        ([9, 1, 1, 1], [1, 1], (0, 1, 1, 1)),
        ([5], [1, 1, 1], (1,)),
        ([1, 2, 3, 4, 5, 6], [1, 1, 1], (0, 0, 0, 1, 1, 2)),
        ([], [1, 1], ()),
    ],
)
def test_each_device_gets_its_share_of_neighbours(sizes: list[int], rooms: list[int], dealt: tuple[int, ...]) -> None:
    assert deal_out(sizes, rooms) == dealt


def test_no_share_is_more_than_half_an_atom_off() -> None:
    sizes, rooms = [(i * 7919) % 101 + 1 for i in range(300)], [40, 25, 35]
    dealt = deal_out(sizes, rooms)
    assert list(dealt) == sorted(dealt)
    for device, room in enumerate(rooms):
        own = sum(size for size, of in zip(sizes, dealt, strict=True) if of == device)
        assert abs(own - sum(sizes) * room / sum(rooms)) <= max(sizes)


@pytest.mark.parametrize(("size", "count"), [(0, 1), (10, 1), (11, 2), (30, 2), (31, 3), (99, 3)])
def test_no_more_devices_than_it_takes(size: int, count: int) -> None:
    assert count_devices(size, [10, 20, 5]) == count


def test_a_stack_is_cut_between_experts() -> None:
    atoms = [Atom("q", None, 4), *(Atom("experts", e, 2) for e in range(6)), Atom("down", None, 4)]
    assert plan_lots(atoms, [10, 10]) == {
        "q": (Lot(0, None),),
        "experts": (Lot(0, range(3)), Lot(1, range(3, 6))),
        "down": (Lot(1, None),),
    }
    assert plan_lots(atoms, [100, 1])["experts"] == (Lot(0, range(6)),)
    assert plan_lots(atoms, [4, 12, 4])["experts"] == (Lot(1, range(6)),)
