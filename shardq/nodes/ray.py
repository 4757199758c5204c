"""The files of a job as tasks of a Ray cluster: the same function that workers call, without claims, as Ray gives each
file to one node, and gives it to another when that dies.

Checked with ray 2.60. All nodes must see the job folder, the source and the same shardq.
"""

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from shardq.errors import BadOption, MissingPackage, ShardqError, TaskFailed
from shardq.limits import Limits
from shardq.nodes.ending import finalize
from shardq.nodes.job import check_limits
from shardq.nodes.working import Worked, make_file

if TYPE_CHECKING:
    from shardq.nodes.job import Job

RETRIES: Final = 8  # of a file whose node died


def work_on_cluster(job: "Job", address: str, limits: Limits) -> Worked:
    """See calls.work_with_ray."""
    check_limits(limits)
    if job.is_over():
        return Worked((), True, None)
    ray = _import_ray()
    try:
        ray.init(address=address, log_to_driver=False)
    except ConnectionError as error:
        raise BadOption(f"--ray-address {address}: no cluster answers ({error})") from error
    try:
        _check_nodes(ray, limits.parallel)
        task = ray.remote(num_cpus=limits.parallel, max_retries=RETRIES)(make_file)
        posted = ray.put(job.post())
        own = replace(limits, log=None)  # its file is on this machine
        tasks = {task.remote(posted, file, own): file for file in job.left()}
        made: list[str] = []
        while tasks:
            (done,), _ = ray.wait(list(tasks), num_returns=1)
            file = tasks.pop(done)
            _take(ray, done, file)
            made.append(file)
    finally:
        ray.shutdown()
    return Worked(tuple(made), True, finalize(job, limits, lambda _: None))


def _check_nodes(ray: Any, cpus: int) -> None:
    """Raises BadOption where no node can ever run a task."""
    most = max((n["Resources"].get("CPU", 0) for n in ray.nodes() if n["Alive"]), default=0)
    if cpus > most:
        raise BadOption(f"--parallel {cpus}: no node of the Ray cluster has more than {most:.0f} CPUs; say a number")


def _take(ray: Any, done: Any, file: str) -> None:
    """Raises what the task has raised, TaskFailed where Ray gave it up."""
    try:
        ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ShardqError):
            raise error.cause from error
        raise TaskFailed(f"{file}: {error.cause!r} on a node of the Ray cluster; look at its logs") from error
    except ray.exceptions.RayError as error:
        raise TaskFailed(f"{file}: Ray gave it up ({type(error).__name__}); look at `ray status`, run again") from error


def _import_ray() -> Any:
    """Raises MissingPackage."""
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise MissingPackage(f"--executor ray needs Ray ({error}): pip install 'shardq[ray]'") from error
