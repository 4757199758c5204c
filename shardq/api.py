"""The functions that scripts call. They return typed values, print nothing, and raise ShardqError."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shardq.destinations.base import Destination
from shardq.errors import BadOption
from shardq.headers import read_checkpoint, read_dump
from shardq.limits import XET_BUFFER_BYTES, Limits
from shardq.plans import Plan, make_plan
from shardq.progress import Progress, Report
from shardq.recipe import Recipe, make_recipe
from shardq.run import Result, quantize_to_folder
from shardq.sources import open_source

if TYPE_CHECKING:
    from shardq.audit_statement import Audit
    from shardq.inspection import Inspection
    from shardq.sources.hub_xet import XetOptions
    from shardq.verification import Verification


def quantize(
    source: str | Path,
    recipe: str | Recipe = "W4A16",
    *,
    output_dir: str | Path | None = None,
    subfolder: str | None = None,
    limits: Limits | None = None,
    restart: bool = False,
    report: Report | None = None,
    push_to: str | None = None,
    private: bool = False,
    branch: str | None = None,
    targets: Sequence[str] = (),
) -> Result:
    """Quantize a checkpoint into a folder, or resume a run that stopped, or answer that it is done.

    `source`: a folder, "org/name", "org/name@revision", "hf://org/name@revision" or "demo".
    `recipe`: a scheme's name, which may carry a layout ("W4A16@gptq"), or what `make_recipe` returns.
    `output_dir`: by default the source's name with the scheme's behind it, in the current folder.
    `restart`: discard what an earlier run with other parameters left. `report` is called with each step.
    `push_to`: a Hub repo, "org/name"; each finished file is uploaded and, without `limits.keep_local`, deleted here;
    all appear there with one commit at the end. Repo (`private` or not) and `branch` are made if need be.
    `targets`: engines that must load the output, as in "vllm:tp=8"; refused before a weight is read.
    Raises a ShardqError whose class and message say what is wrong; what is finished is kept, and the same call resumes.
    """
    wanted, limits = _recipe(recipe), limits or Limits()
    destination = _destination(push_to, private, branch, limits)
    opened = open_source(str(source), subfolder, xet=_xet(limits))
    if targets:
        _check(make_plan(read_checkpoint(opened), wanted), targets)
    out = Path(output_dir) if output_dir else Path(f"{opened.label.rpartition('/')[2]}-{wanted.scheme.name}")
    return quantize_to_folder(opened, wanted, out, limits, restart, report or _silent, destination)


def plan(
    source: str | Path,
    recipe: str | Recipe = "W4A16",
    *,
    subfolder: str | None = None,
    targets: Sequence[str] = (),
) -> Plan:
    """What `quantize` would do with the same words, from headers alone; raises what it raises before that."""
    return _check(make_plan(read_checkpoint(open_source(str(source), subfolder)), _recipe(recipe)), targets)


def plan_headers(folder: str | Path, recipe: str | Recipe = "W4A16", *, targets: Sequence[str] = ()) -> Plan:
    """The plan of a checkpoint of which only a folder with config.json and headers.json.gz ({shard: {tensor: [dtype,
    shape]}}) or an index is at hand. With an index alone, shapes and bytes are unknown."""
    return _check(make_plan(read_dump(Path(folder)), _recipe(recipe)), targets)


def verify(result: str | Path, *, deep: bool = False, source: str | Path | None = None) -> "Verification":
    """Check a finished output, a folder or "org/name[@revision]", against its ledger, index, headers and configuration;
    and a quantized checkpoint that others made, which has no ledger, for what its headers and configuration tell.

    `deep` also takes the hash of each shard and unpacks every module; with `source` the error figures are recomputed
    from the original weights and copies are compared byte for byte. Of a repo only headers and records are read unless
    `deep` or `source` is given. Raises VerifyFailed when nothing can be checked.
    """
    from shardq.foreign import is_foreign, verify_foreign
    from shardq.outputs import open_result

    opened = open_result(str(result))
    if is_foreign(opened):
        if deep or source is not None:
            raise BadOption(f"{result} has no records of shardq: --deep and --source have nothing to compare with")
        return verify_foreign(opened, str(result))
    from shardq.verification import verify_output  # brings numpy

    return verify_output(str(result), deep, open_source(str(source)) if source is not None else None)


def audit(
    result: str | Path,
    *,
    source: str | Path | None = None,
    subfolder: str | None = None,
    sample: int = 200,
    seed: int | None = None,
    max_traffic_bytes: int | None = 10**9,
    dry_run: bool = False,
) -> "Audit":
    """Derive `sample` random tensors of a finished output again from its source, and compare the bytes.

    `result`: a folder or "org/name[@revision]". `source` (and a `subfolder` of it): what it was made of, by default the
    repo that its records name. No more than `max_traffic_bytes` are read of both, None: no limit; of large tensors
    blocks are compared then. `seed` chooses the tensors, by default the fingerprint does. `dry_run` only plans.
    Differences are among the problems of the Audit; raises BadOption and VerifyFailed when it cannot be made.
    """
    from shardq.auditing import Question, audit_result  # brings numpy
    from shardq.outputs import open_result

    question = Question(sample, seed, max_traffic_bytes, dry_run)
    named = None if source is None else str(source)
    return audit_result(open_result(str(result)), str(result), named, subfolder, question)


def inspect(source: str | Path, *, subfolder: str | None = None) -> "Inspection":
    """Roles, schemes, layout and bits per weight of a repo or folder, from headers alone."""
    from shardq.inspection import inspect_source

    return inspect_source(open_source(str(source), subfolder))


def _destination(push_to: str | None, private: bool, branch: str | None, limits: Limits) -> Destination | None:
    """Raises BadOption."""
    if push_to is None:
        if private or branch or limits.keep_local:
            raise BadOption("--private, --branch and --keep-local have a meaning only with --push-to")
        return None
    if limits.delete_source and not limits.keep_local:
        raise BadOption(
            "--delete-source with --push-to would leave uploads that no commit names as the only copy of the weights: "
            "add --keep-local, or delete the source afterwards"
        )
    from shardq.destinations.hub import HubDestination  # brings an HTTP client

    return HubDestination(push_to, branch=branch, private=private)


def _xet(limits: Limits) -> "XetOptions | None":
    if not limits.xet:
        return None
    from shardq.sources.hub_xet import XetOptions

    return XetOptions(XET_BUFFER_BYTES)


def _check(plan: Plan, targets: Sequence[str]) -> Plan:
    """`plan`, if every target loads what it makes. Raises BadOption and TargetRefuses."""
    if targets:
        from shardq.serving.served import served_of_plan
        from shardq.serving.targets import check_targets, parse_target

        if not plan.files:
            raise BadOption("--target needs headers: of this checkpoint only an index is known")
        check_targets(served_of_plan(plan), [parse_target(t) for t in targets])
    return plan


def _recipe(recipe: str | Recipe) -> Recipe:
    return make_recipe(recipe) if isinstance(recipe, str) else recipe


def _silent(step: Progress) -> None:
    """Report nothing."""
