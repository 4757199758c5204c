"""Worker processes: what they inherit, what they survive, and that they go with their caller."""

import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from executor_jobs import ENTRY, LIMIT_S, finish, job

from shardq.budget import ByteBudget
from shardq.errors import KernelUnavailable, ShardqError, TaskFailed
from shardq.executors.base import Outcome
from shardq.executors.processes import ProcessExecutor
from shardq.executors.worker_process import cause_of_death

HERE = Path(__file__).parent

Pool = Callable[..., ProcessExecutor]


@pytest.fixture
def pool() -> Iterator[Pool]:
    made: list[ProcessExecutor] = []

    def build(
        workers: int, entry: str = ENTRY, context: object = None, limit_bytes: int | None = None
    ) -> ProcessExecutor:
        made.append(ProcessExecutor(entry, context, workers, ByteBudget(limit_bytes)))
        return made[-1]

    yield build
    for executor in made:
        executor.close()


def test_spawn_serves_where_there_is_no_fork_server(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    executor = pool(1)
    executor.submit(job(1, "surroundings"))
    outcome = finish(executor)[1]
    assert isinstance(outcome.result, dict)
    assert outcome.result["threads"] == "1"
    assert psutil.Process(outcome.worker_pid).ppid() == os.getpid()


def test_workers_overlap(pool: Pool) -> None:
    executor = pool(2)
    for i in range(2):
        executor.submit(job(i, "span", 0.3))
    outcomes = finish(executor)
    assert len({o.worker_pid for o in outcomes.values()} | {os.getpid()}) == 3
    assert _peak([(*_span(o), 1) for o in outcomes.values()]) == 2


def test_worker_surroundings(pool: Pool) -> None:
    before = os.environ.get("OMP_NUM_THREADS")
    executor = pool(1)
    executor.submit(job(1, "surroundings"))
    found = finish(executor)[1].result
    assert isinstance(found, dict)
    assert found["threads"] == "1"
    assert found["sigint_ignored"]
    assert found["sigterm_default"]
    assert found["loaded"] == []
    assert found["python_threads"] == 2  # the second waits for the caller's death
    assert found["native_threads"] in (2, None)
    assert os.environ.get("OMP_NUM_THREADS") == before


def test_result_that_cannot_be_pickled_fails_its_job_only(
    pool: Pool,
) -> None:
    executor = pool(1)
    executor.submit(job(1, "unpicklable"))
    executor.submit(job(2, "echo", 5))
    outcomes = finish(executor)
    assert type(outcomes[1].error) is TaskFailed
    assert outcomes[2].result == 5
    assert outcomes[1].worker_pid == outcomes[2].worker_pid


def test_survives_random_kills_a_poison_job_and_an_error(
    pool: Pool,
) -> None:
    executor = pool(4, limit_bytes=100)
    chance = random.Random(7)
    todo = [job(i, "sleep", 0.004, chance.randint(1, 60)) for i in range(200)]
    todo[50:50] = [job(901, "die", signal.SIGKILL), job(902, "bug"), job(903, "echo", 1, 500)]
    outcomes: dict[int, Outcome] = {}
    kills = 0
    deadline_s = time.monotonic() + LIMIT_S
    while todo or executor.unfinished():
        assert time.monotonic() < deadline_s
        while todo and executor.room():
            executor.submit(todo.pop(0))
        for outcome in executor.wait(1.0):
            assert outcome.job.id not in outcomes
            outcomes[outcome.job.id] = outcome
        if kills < 8 and len(outcomes) > 20 * (kills + 1) and (victims := _worker_pids()):
            os.kill(chance.choice(victims), signal.SIGKILL)
            kills += 1
    failed = {i: o.error for i, o in outcomes.items() if o.error is not None}
    assert kills == 8
    assert len(outcomes) == 203
    assert sorted(failed) == [901, 902]
    assert str(failed[902]) == "tensor 902: ValueError: bad tensor"
    assert "tensor 901: 3 workers died" in str(failed[901])
    assert "signal 9), likely out of memory: lower --parallel" in str(failed[901])


def test_killed_worker_lowers_the_number_of_workers(pool: Pool, tmp_path: Path) -> None:
    executor = pool(3)
    executor.submit(job(1, "die_once", str(tmp_path / "marker")))
    assert finish(executor)[1].result == "survived"
    for i in range(2, 14):
        executor.submit(job(i, "sleep", 0.05))
    assert len({o.worker_pid for o in finish(executor).values()}) == 2


def test_crashed_worker_is_replaced(pool: Pool) -> None:
    executor = pool(1)
    executor.submit(job(1, "die", signal.SIGSEGV))
    executor.submit(job(2, "leave", 5))
    executor.submit(job(3, "echo", 1))
    outcomes = finish(executor)
    assert "signal 11 (Segmentation fault), a fault in native code" in str(outcomes[1].error)
    assert "left with exit code 5" in str(outcomes[2].error)
    assert outcomes[3].result == 1


def test_worker_that_dies_idle_is_replaced(pool: Pool) -> None:
    executor = pool(1)
    executor.submit(job(1, "echo"))
    first_pid = finish(executor)[1].worker_pid
    os.kill(first_pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(first_pid)], timeout=LIMIT_S)
    executor.submit(job(2, "echo", 2))
    outcome = finish(executor)[2]
    assert outcome.result == 2
    assert outcome.worker_pid != first_pid


def test_worker_killed_while_it_starts_is_replaced(pool: Pool, tmp_path: Path) -> None:
    executor = pool(1, "executor_work:start_dying_once", str(tmp_path / "marker"))
    executor.submit(job(1, "echo", 3))
    assert finish(executor)[1].result == 3


def test_survives_the_death_of_the_fork_server(pool: Pool) -> None:
    executor = pool(2)
    executor.submit(job(1, "echo"))
    workers = [psutil.Process(finish(executor)[1].worker_pid)]
    executor.submit(job(2, "sleep", 0.5))
    _fork_server().kill()
    assert finish(executor)[2].result == 0.5
    assert psutil.wait_procs(workers, timeout=LIMIT_S)[1] == []


@pytest.mark.parametrize(
    ("entry", "error_class", "message"),
    [
        ("executor_work:start_refused", KernelUnavailable, "no kernels for here"),
        ("executor_work:start_with_bug", TaskFailed, "worker start: LookupError: no such thing"),
        ("executor_work:start_dying", TaskFailed, "no worker process gets ready.*exit code 7"),
        ("executor_work:no_such_name", TaskFailed, "worker start: AttributeError"),
        ("no_such_module:start", TaskFailed, "worker start: ModuleNotFoundError"),
    ],
)
def test_handler_that_cannot_be_built_fails_every_job(
    pool: Pool, entry: str, error_class: type[ShardqError], message: str
) -> None:
    executor = pool(2, entry, "here")
    for i in range(3):
        executor.submit(job(i, "echo"))
    outcomes = finish(executor)
    assert executor.room() > 0
    executor.submit(job(3, "echo"))
    outcomes |= finish(executor)
    assert sorted(outcomes) == [0, 1, 2, 3]
    for outcome in outcomes.values():
        assert type(outcome.error) is error_class
        with pytest.raises(error_class, match=message):
            raise outcome.error


def test_jobs_start_in_order_and_overtake_only_what_does_not_fit(
    pool: Pool,
) -> None:
    executor = pool(2, limit_bytes=10)
    warm_up: set[int] = set()
    for number in range(100, 200):  # until both workers are up: the order is about idle ones
        executor.submit(job(number, "span", 0.02))
        executor.submit(job(number + 100, "span", 0.02))
        warm_up |= {o.worker_pid for o in finish(executor).values()}
        if len(warm_up) == 2:
            break
    costs = {0: 8, 1: 5, 2: 2, 3: 6, 4: 30, 5: 1}
    for number, cost_bytes in costs.items():
        executor.submit(job(number, "span", 0.1, cost_bytes))
    spans = {i: _span(o) for i, o in finish(executor).items()}
    order = sorted(spans, key=lambda i: spans[i][0])
    assert order.index(2) < order.index(1)  # 5 bytes do not fit beside 8, 2 do
    assert order.index(1) < order.index(3)  # they never fit together
    assert _overlaps(spans[4], [spans[i] for i in spans if i != 4]) == 0


def test_bytes_in_use_stay_below_the_cap_except_for_a_lone_giant(
    pool: Pool,
) -> None:
    executor = pool(4, limit_bytes=100)
    chance = random.Random(3)
    costs = {i: chance.randint(1, 80) for i in range(60)} | {60: 500}
    for number, cost_bytes in costs.items():
        executor.submit(job(number, "span", 0.003, cost_bytes))
    spans = {i: _span(o) for i, o in finish(executor).items()}
    assert _peak([(*spans[i], costs[i]) for i in range(60)]) <= 100
    assert _overlaps(spans[60], [spans[i] for i in range(60)]) == 0


def test_budget_is_whole_again_after_everything(pool: Pool) -> None:
    budget = ByteBudget(10)
    with ProcessExecutor(ENTRY, None, 2, budget) as executor:
        for i, action in enumerate(("echo", "bug", "unpicklable")):
            executor.submit(job(i, action, None, 7))
        executor.submit(job(3, "die", signal.SIGKILL, 7))
        finish(executor)
        assert (budget.used_bytes, budget.peak_bytes) == (0, 7)
        executor.submit(job(4, "sleep", 60.0, 7))
    assert budget.used_bytes == 0


def test_leaving_by_an_exception_kills_running_workers(
    pool: Pool,
) -> None:
    executor = pool(2)
    executor.submit(job(1, "echo"))
    worker = psutil.Process(finish(executor)[1].worker_pid)

    def work() -> None:
        with executor:
            executor.submit(job(2, "sleep", 600.0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert psutil.wait_procs([worker], timeout=LIMIT_S)[1] == []


def test_signal_with_a_wakeup_pipe_ends_the_wait(pool: Pool) -> None:
    executor = pool(1)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    seen: list[int] = []
    old_handler = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    old_fd = signal.set_wakeup_fd(write_end)
    try:
        executor.submit(job(1, "sleep", 60.0))
        killer = f"import os,time; time.sleep(0.2); os.kill({os.getpid()}, {signal.SIGUSR1:d})"
        process = subprocess.Popen([sys.executable, "-S", "-c", killer])
        began_s = time.monotonic()
        assert executor.wait(None, [read_end]) == []
        assert time.monotonic() - began_s < LIMIT_S
        assert seen == [signal.SIGUSR1]
        process.wait()
    finally:
        signal.set_wakeup_fd(old_fd)
        signal.signal(signal.SIGUSR1, old_handler)
        os.close(read_end)
        os.close(write_end)


@pytest.mark.parametrize("forks", [False, True])
def test_no_worker_outlives_a_killed_caller(tmp_path: Path, forks: bool) -> None:
    script = f"""
        {"import shardq.executors.preload" if forks else "import shardq"}
        from shardq.budget import ByteBudget
        from shardq.executors.base import Job
        from shardq.executors.processes import ProcessExecutor

        if __name__ == "__main__":
            with ProcessExecutor("executor_work:start", None, 3, ByteBudget(None)) as executor:
                executor.submit(Job(0, ("echo", None), 0, "first"))
                executor.wait(None)
                for i in (1, 2):
                    executor.submit(Job(i, ("sleep", 600.0), 0, "long"))
                print("busy", flush=True)
                executor.wait(None)
        """
    process = _start_script(tmp_path, script)
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n"
    family = psutil.Process(process.pid).children(recursive=True)
    caller = psutil.Process(process.pid)
    assert len([p for p in family if (p.parent() == caller) is forks]) == 3
    process.kill()
    process.wait()
    deadline_s = time.monotonic() + LIMIT_S
    while any(_lives(p) for p in family) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    survivors = [p for p in family if _lives(p)]
    for survivor in survivors:
        survivor.kill()
    process.communicate()
    assert survivors == []


def test_script_without_main_guard_is_told(tmp_path: Path) -> None:
    script = """
        from shardq.budget import ByteBudget
        from shardq.executors.base import Job
        from shardq.executors.processes import ProcessExecutor

        with ProcessExecutor("executor_work:start", None, 2, ByteBudget(None)) as executor:
            executor.submit(Job(0, ("echo", None), 0, "first"))
            print(executor.wait(None)[0].error)
        """
    process = _start_script(tmp_path, script)
    output, errors = process.communicate(timeout=LIMIT_S)
    assert 'under `if __name__ == "__main__":`' in output
    assert "RuntimeError" in errors
    assert process.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="forks only where the threads of a process can be counted")
@pytest.mark.parametrize("has_thread", [False, True])
def test_workers_are_forks_only_of_a_process_of_our_own_without_threads(tmp_path: Path, has_thread: bool) -> None:
    """And a lock that the caller holds ends with the caller, not with a worker that goes on."""
    script = f"""
        import os
        import fcntl
        import threading

        import shardq.executors.preload
        from shardq.budget import ByteBudget
        from shardq.executors.base import Job
        from shardq.executors.processes import ProcessExecutor

        if __name__ == "__main__":
            with open("lock", "w") as lock, open("lock") as again:
                fcntl.flock(lock, fcntl.LOCK_EX)
                end = threading.Event()
                if {has_thread}:
                    threading.Thread(target=end.wait).start()
                with ProcessExecutor("executor_work:start", None, 1, ByteBudget(None)) as executor:
                    executor.submit(Job(0, ("parent", None), 0, "who made you"))
                    (outcome,) = executor.wait(None)
                    lock.close()
                    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
                end.set()
            print(outcome.result == os.getpid())
        """
    output, errors = _start_script(tmp_path, script, tmp_path).communicate(timeout=LIMIT_S)
    assert (output, errors) == (f"{not has_thread}\n", "")


@pytest.mark.parametrize(
    ("exit_code", "words"),
    [
        (0, "left with exit code 0"),
        (3, "left with exit code 3"),
        (-9, "likely out of memory"),
        (-15, "signal 15 (Terminated)"),
        (-6, "native code"),
        (-34, "signal 34"),
    ],
)
def test_cause_of_death_names_the_exit_code(exit_code: int, words: str) -> None:
    assert words in cause_of_death(exit_code)


def test_every_error_survives_the_pipe() -> None:
    classes = [ShardqError]
    for one in classes:
        classes += one.__subclasses__()
    assert len(classes) > 10
    for one in classes:
        copy = pickle.loads(pickle.dumps(one("what happened")))
        assert type(copy) is one
        assert str(copy) == "what happened"


def _start_script(folder: Path, text: str, cwd: Path | None = None) -> "subprocess.Popen[str]":
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text))
    search = os.pathsep.join([str(HERE), *(p for p in sys.path if p)])
    return subprocess.Popen(
        [sys.executable, str(path)],
        env=os.environ | {"PYTHONPATH": search},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


def _worker_pids() -> list[int]:
    return [worker.pid for worker in _fork_server().children()]


def _fork_server() -> psutil.Process:
    """Our child, and the parent of the workers."""
    (server,) = (p for p in psutil.Process().children() if "forkserver" in " ".join(p.cmdline()))
    return server


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _span(outcome: Outcome) -> tuple[float, float]:
    assert isinstance(outcome.result, tuple)
    began_s, ended_s = outcome.result
    return began_s, ended_s


def _peak(spans: list[tuple[float, float, int]]) -> int:
    """The largest sum of weights at any time; an end comes before a beginning at the same time."""
    events = sorted([(b, 1, w) for b, _, w in spans] + [(e, 0, -w) for _, e, w in spans])
    total = peak = 0
    for _, _, weight in events:
        total += weight
        peak = max(peak, total)
    return peak


def _overlaps(span: tuple[float, float], others: list[tuple[float, float]]) -> int:
    return sum(began < span[1] and span[0] < ended for began, ended in others)
