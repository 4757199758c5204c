"""The contract that every executor keeps."""

import os
import time
from collections.abc import Callable, Iterator

import pytest
from executor_jobs import ENTRY, LIMIT_S, finish, job

from shardq.budget import ByteBudget
from shardq.errors import CorruptShard, KernelUnavailable, TaskFailed
from shardq.executors.base import Executor
from shardq.executors.inline import InlineExecutor
from shardq.executors.processes import ProcessExecutor

Make = Callable[..., Executor]


@pytest.fixture(params=["inline", "processes"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    made: list[Executor] = []

    def build(entry: str = ENTRY, context: object = None) -> Executor:
        executor: Executor
        if request.param == "inline":
            executor = InlineExecutor(entry, context)
        else:
            executor = ProcessExecutor(entry, context, 2, ByteBudget(None))
        made.append(executor)
        return executor

    yield build
    for executor in made:
        executor.close()


def test_results_arrive_with_their_jobs(make: Make) -> None:
    executor = make()
    jobs = [job(i, "echo", i * i) for i in range(20)]
    for one in jobs:
        executor.submit(one)
    assert executor.unfinished() == 20
    outcomes = finish(executor)
    assert {i: o.result for i, o in outcomes.items()} == {i: i * i for i in range(20)}
    assert [outcomes[i].job for i in range(20)] == jobs
    assert all(o.error is None and o.worker_pid > 0 for o in outcomes.values())


def test_context_reaches_the_handler(make: Make) -> None:
    executor = make(context={"part": "/x"})
    executor.submit(job(1, "context"))
    assert finish(executor)[1].result == {"part": "/x"}


def test_shardq_error_keeps_class_and_message(make: Make) -> None:
    executor = make()
    executor.submit(job(1, "refuse"))
    error = finish(executor)[1].error
    assert type(error) is CorruptShard
    assert str(error) == "model-1.safetensors: header lies; get the file again"
    assert error.__traceback__ is None


def test_other_exception_becomes_one_line_naming_the_job(make: Make) -> None:
    executor = make()
    executor.submit(job(1, "bug"))
    executor.submit(job(2, "no_memory"))
    outcomes = finish(executor)
    assert type(outcomes[1].error) is TaskFailed
    assert str(outcomes[1].error) == "tensor 1: ValueError: bad tensor"
    assert "lower --parallel or --max-ram" in str(outcomes[2].error)


def test_goes_on_after_errors(make: Make) -> None:
    executor = make()
    for i in range(6):
        executor.submit(job(i, "echo" if i % 2 else "bug", i))
    outcomes = finish(executor)
    assert [outcomes[i].result for i in range(6)] == [None, 1, None, 3, None, 5]


def test_wait_without_jobs_returns_at_once(make: Make) -> None:
    assert make().wait(None) == []


def test_wait_wakes_for_another_object(make: Make) -> None:
    executor = make()
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, b"x")
        assert executor.wait(LIMIT_S, [read_end]) == []
        executor.submit(job(1, "sleep", 0.2))
        executor.wait(LIMIT_S, [read_end])
        assert executor.unfinished() <= 1
        os.read(read_end, 1)
        assert finish(executor)[1].result == 0.2
    finally:
        os.close(read_end)
        os.close(write_end)


def test_wait_times_out(make: Make) -> None:
    executor = make()
    read_end, write_end = os.pipe()
    try:
        began_s = time.monotonic()
        assert executor.wait(0.1, [read_end]) == []
        assert 0.09 < time.monotonic() - began_s < LIMIT_S
    finally:
        os.close(read_end)
        os.close(write_end)


def test_room_ends_and_comes_back(make: Make) -> None:
    executor = make()
    submitted = 0
    while executor.room() and submitted < 1000:
        executor.submit(job(submitted, "echo"))
        submitted += 1
    assert 2 <= submitted <= 8
    finish(executor)
    assert executor.room() >= 2


def test_cancel_gives_back_what_has_not_started(make: Make) -> None:
    executor = make()
    for i in range(10):
        executor.submit(job(i, "sleep", 0.01))
    first = executor.wait(None)
    cancelled = [j.id for j in executor.cancel_queued()]
    done = {o.job.id for o in first} | set(finish(executor))
    assert cancelled == sorted(cancelled)
    assert len(cancelled) >= 5
    assert sorted([*done, *cancelled]) == list(range(10))


def test_closed_executor_takes_no_jobs(make: Make) -> None:
    with make() as executor:
        executor.submit(job(1, "echo"))
    executor.close()
    with pytest.raises(RuntimeError, match="closed"):
        executor.submit(job(2, "echo"))
    assert executor.unfinished() == 0


def test_inline_handler_that_cannot_be_built_raises() -> None:
    with pytest.raises(KernelUnavailable, match="no kernels for here"):
        InlineExecutor("executor_work:start_refused", "here")
