"""`shardq worker`"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardq.cli._command import output_options
from shardq.cli._console import Console, print_json, print_pairs
from shardq.cli._exit_codes import RECIPE, SOURCE, epilog
from shardq.cli._fold import AUTO
from shardq.cli._gguf import gguf_options
from shardq.cli._job import JobCommand, need_source, take_words
from shardq.cli._options import recipe_options, take_recipe_words
from shardq.cli._progress import show_progress
from shardq.cli._result_text import describe_result, print_result
from shardq.cli._run import RUN, run_options, take_run_words
from shardq.errors import BadOption, JobUnfinished, MissingPackage, NotExact

if TYPE_CHECKING:
    from shardq.nodes.job import Job
    from shardq.nodes.working import Worked

EXAMPLES = (
    "shardq worker --job /shared/job org/name --scheme W4A16@gptq      # the same on every machine",
    "shardq worker --job /shared/job                                   # join one that was begun",
    "srun shardq worker --job /shared/job org/name --scheme gguf:q4_k_m --split-max-size 40G",
    "shardq worker --job /shared/job org/name --scheme FP8_BLOCK --push-to me/name-FP8 --scratch /tmp",
    "shardq worker --job /shared/job org/name --executor ray --parallel 8",
)
ERRORS = (*RECIPE, *SOURCE, *RUN, NotExact, MissingPackage, JobUnfinished)
# In the context: make no file, only publish. `shardq finalize` has a job's words read here, as they were written.
PUBLISHES = f"{__name__}.publishes"
NOT_OF_JOBS = ("output_dir", "keep_local", "delete_source", "restart", "dry_run")


class WorkerCommand(JobCommand):
    """Its options that are of one machine."""

    own = frozenset(
        {"job", "rank", "stale_s", "scratch", "no_wait", "executor", "ray_address", "parallel", "max_ram"}
        | {"max_disk", "stream", "xet", "as_json", "verbose", "quiet", "log_file"}
    )


def _run_options(function: Any) -> Any:
    return run_options(function, NOT_OF_JOBS)


@click.command("worker", cls=WorkerCommand, epilog=epilog(EXAMPLES, ERRORS))
@click.argument("source", required=False)
@click.option(
    "--job", required=True, metavar="DIR", type=click.Path(file_okay=False, path_type=Path),
    help="Folder that all workers see; the output comes into its folder `output`.",
)  # fmt: skip
@click.option(
    "--worker", "rank", metavar="i/N",
    help="Which of N workers this is, from 0: where it begins. Default: as SLURM, a Kubernetes indexed Job or torchrun "
    "says.",
)  # fmt: skip
@click.option(
    "--scratch", metavar="DIR", type=click.Path(file_okay=False, path_type=Path),
    help="Keep unfinished files and fetched shards here, on a disk of this machine. Default: in the job folder.",
)  # fmt: skip
@click.option(
    "--stale-after", "stale_s", type=click.FloatRange(min=1), metavar="SECONDS",
    help="When a worker that is not heard of counts as dead. Default: 120. The one that begins the job decides.",
)  # fmt: skip
@click.option(
    "--no-wait", is_flag=True, help="End when nothing is left to begin; do not wait to take over from others."
)
@click.option(
    "--executor", type=click.Choice(["here", "ray"]), default="here", show_default=True,
    help="Work here, or on the nodes of a Ray cluster, with --parallel CPUs for each file. Needs shardq[ray].",
)  # fmt: skip
@click.option("--ray-address", default="auto", metavar="ADDRESS", show_default=True, help="Of the Ray cluster.")
@recipe_options
@gguf_options
@_run_options
@output_options
@click.pass_obj
def worker(
    console: Console, source: str | None, job: Path, rank: str | None, scratch: Path | None, stale_s: float | None,
    no_wait: bool, executor: str, ray_address: str,
) -> None:  # fmt: skip
    """Quantize SOURCE together with other machines that see one folder, without a coordinator.

    Start the same command on every machine, whenever you like. Each makes some of the output files; one that dies is
    replaced by the others, and whoever finishes the last file publishes: the bytes are those of `shardq quantize`.
    With --job alone it joins a job that was begun. A worker that is stopped gives back what it has claimed.
    """
    from shardq.nodes import calls

    wanted = need_source(source, job)
    asked = take_recipe_words()
    if asked.fold == AUTO:
        raise BadOption("--fold auto reads weights: let `shardq quantize` make the file first, and name it here")
    recipes = asked.build()
    if len(recipes) != 1:
        raise BadOption(f"{len(recipes)} outputs are asked for, a job makes one: begin a job for each")
    words = take_run_words()
    limits = words.limits(console)
    begun = calls.begin_job(
        job, wanted, recipes[0], subfolder=words.subfolder, limits=limits, push_to=words.push_to,
        private=words.private, branch=words.branch, targets=asked.targets, stale_s=stale_s, words=take_words(),
    )  # fmt: skip
    with show_progress(console) as report:
        if click.get_current_context().meta.get(PUBLISHES):
            from shardq.nodes.working import Worked

            worked = Worked((), True, calls.finalize(begun, limits=limits, report=report))
        elif executor == "ray":
            worked = calls.work_with_ray(begun, ray_address, limits=limits)
        else:
            worked = calls.work(begun, worker=rank, limits=limits, report=report, wait=not no_wait, scratch=scratch)
    _show(console, begun, worked)
    console.warn(begun.plan.warnings)


def _show(console: Console, job: "Job", worked: "Worked") -> None:
    """What was done here, and the result if this worker has published."""
    left = [] if worked.complete else job.left()
    if console.as_json:
        print_json(
            {
                "job": str(job.folder.path),
                "made": list(worked.files),
                "left": left,
                "complete": worked.complete,
                "output": None if job.destination else str(job.folder.output),
                "result": worked.result and describe_result(worked.result),
            }
        )
    elif not console.quiet:
        state = "complete" if worked.complete else f"{len(left)} of {len(job.record.files)} files are left"
        print_pairs([("job", f"{job.folder.path}: {state}"), ("made here", f"{len(worked.files)} files")])
        if worked.result:
            print_result(worked.result)
