"""Which worker a process is, as schedulers say it."""

import pytest

from shardq.errors import BadOption
from shardq.nodes.environment import Rank, find_rank

ARRAY = {"SLURM_ARRAY_TASK_ID": "13", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "10"}


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, Rank(0, 1)),
        (ARRAY, Rank(3, 4)),
        ({**ARRAY, "RANK": "0", "WORLD_SIZE": "2"}, Rank(3, 4)),
        ({"JOB_COMPLETION_INDEX": "5"}, Rank(5, None)),
        ({"RANK": "1", "WORLD_SIZE": "8"}, Rank(1, 8)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "3"}, Rank(2, 3)),
        ({"SLURM_ARRAY_TASK_ID": "20", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "0"}, Rank(20, 21)),
    ],
)
def test_of_the_environment(environment: dict[str, str], rank: Rank) -> None:
    assert find_rank(None, environment) == rank


def test_word_comes_first() -> None:
    assert find_rank("2/3", ARRAY) == Rank(2, 3)


@pytest.mark.parametrize("word", ["3/3", "1", "a/b", "-1/3", "1/0", "0/0"])
def test_bad_word(word: str) -> None:
    with pytest.raises(BadOption, match="expected i/N"):
        find_rank(word, {})


def test_bad_environment() -> None:
    with pytest.raises(BadOption, match="RANK=first"):
        find_rank(None, {"RANK": "first", "WORLD_SIZE": "2"})


def test_every_worker_wants_all_files_its_own_share_first() -> None:
    for rank in (Rank(0, 3), Rank(2, 3), Rank(7, None)):
        assert sorted(rank.order(10)) == list(range(10))
    assert [Rank(i, 5).order(10)[0] for i in range(5)] == [0, 2, 4, 6, 8]
    assert [Rank(i, None).order(8)[0] for i in range(8)] == [0, 4, 2, 6, 1, 5, 3, 7]
