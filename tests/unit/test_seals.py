"""Which finished files are sealed together, and when."""

from shardq.kernels import sha256
from shardq.seals import TOGETHER, Seals
from shardq.tasks import SealTask, Unsealed

FILES = tuple(Unsealed(0, f"{n}.safetensors", 64) for n in range(5))


def test_seals_wait_for_as_many_as_are_hashed_at_once() -> None:
    assert TOGETHER == sha256.TOGETHER
    seals = Seals(staged=False)
    taken = []
    for file in FILES:
        seals.add(file)
        taken.append(seals.take(is_idle=False))
    assert taken == [None, None, SealTask(FILES[:3]), None, None]
    assert seals.take(is_idle=True) == SealTask(FILES[3:])
    assert seals.take(is_idle=True) is None


def test_seals_that_keep_source_shards_on_the_disk_wait_for_one_other() -> None:
    seals = Seals(staged=True)
    seals.add(FILES[0])
    assert seals.take(is_idle=False) is None
    seals.add(FILES[1])
    assert seals.take(is_idle=False) == SealTask(FILES[:2])


def test_a_file_is_sealed_alone_when_nothing_else_is_to_be_done() -> None:
    seals = Seals(staged=False)
    seals.add(FILES[0])
    assert seals.take(is_idle=True) == SealTask(FILES[:1])
