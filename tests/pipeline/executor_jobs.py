"""What tests of executors give them, and how they wait; executor_work.py is what runs."""

import time

from shardq.executors.base import Executor, Job, Outcome

ENTRY = "executor_work:start"
LIMIT_S = 30.0  # for anything that takes milliseconds on an idle machine


def job(number: int, action: str, argument: object = None, cost_bytes: int = 1) -> Job:
    return Job(number, (action, argument), cost_bytes, f"tensor {number}")


def finish(executor: Executor) -> dict[int, Outcome]:
    """Outcomes by job id, once nothing is left to do."""
    outcomes: list[Outcome] = []
    deadline_s = time.monotonic() + LIMIT_S
    while executor.unfinished():
        outcomes += executor.wait(1.0)
        assert time.monotonic() < deadline_s, f"{executor.unfinished()} jobs are stuck"
    assert len({o.job.id for o in outcomes}) == len(outcomes)
    return {o.job.id: o for o in outcomes}
