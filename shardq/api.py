"""The functions that scripts call. They return typed values, print nothing, and raise ShardqError."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardq.checkpoint import Checkpoint
from shardq.errors import BadOption
from shardq.headers import read_checkpoint, read_dump
from shardq.limits import Limits
from shardq.opening import check_engines, make_orders, open_destinations, open_within
from shardq.plans import Plan, make_plan
from shardq.progress import Progress, Report
from shardq.recipe import Recipe, as_recipe
from shardq.run import Result, quantize_all
from shardq.sources import Source, open_source

if TYPE_CHECKING:
    from shardq.audit_statement import Audit
    from shardq.batch.driver import Row
    from shardq.fit import Fit
    from shardq.gguf_inspection import GgufInspection
    from shardq.inspection import Inspection
    from shardq.verified import Verification


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
    return quantize_many(
        source, (recipe,), output_dir=output_dir, subfolder=subfolder, limits=limits, restart=restart, report=report,
        push_to=push_to, private=private, branch=branch, targets=targets,
    )[0]  # fmt: skip


def quantize_many(
    source: str | Path,
    recipes: Sequence[str | Recipe],
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
) -> tuple[Result, ...]:
    """`quantize` into several outputs from one read of the source; each has the bytes that `quantize` gives alone.

    Several outputs are folders inside `output_dir`, by default the current one, named for scheme and layout; `push_to`
    then holds `{scheme}` and perhaps `{layout}`, as in "me/name-{scheme}-{layout}".
    """
    limits = limits or Limits()
    wanted = [as_recipe(r) for r in recipes]
    opened = open_within(str(source), subfolder, limits)
    orders = make_orders(wanted, opened.label, output_dir)
    places = open_destinations(push_to, wanted, private, branch, limits)
    made = [replace(order, destination=place) for order, place in zip(orders, places, strict=True)]
    return quantize_all(opened, made, limits, restart, report or _silent, lambda plan: check_engines(plan, targets))


def plan(
    source: str | Path,
    recipe: str | Recipe = "W4A16",
    *,
    subfolder: str | None = None,
    targets: Sequence[str] = (),
) -> Plan:
    """What `quantize` would do with the same words, from headers alone; raises what it raises before that."""
    return plan_many(source, (recipe,), subfolder=subfolder, targets=targets)[0]


def plan_many(
    source: str | Path,
    recipes: Sequence[str | Recipe],
    *,
    subfolder: str | None = None,
    targets: Sequence[str] = (),
    before_tuning: bool = False,
) -> tuple[Plan, ...]:
    """The plans of what `quantize_many` would make; `before_tuning`: once its codes and scales were tuned."""
    wanted = [as_recipe(r) for r in recipes]
    make_orders(wanted, "", None)  # refuses what has no names
    opened = open_source(str(source), subfolder)
    checkpoint = _read(opened, wanted)
    return tuple(check_engines(make_plan(checkpoint, r, before_tuning=before_tuning), targets) for r in wanted)


def propose(
    source: str | Path,
    recipes: Sequence[str | Recipe],
    space: str,
    *,
    reserve: float | None = None,
    recorded: bool = False,
    subfolder: str | None = None,
    targets: Sequence[str] = (),
) -> "Fit":
    """Which of these recipes have weights that fit into `space`, "4x80G" or "512G", with the share `reserve` left free,
    and a mixture that fills what is left. `recorded`: the source is a folder as of `plan_headers`. From headers alone.

    Raises BadOption, and what planning raises if no recipe can be planned.
    """
    from shardq.fit import find_fit, parse_space

    wanted = [as_recipe(r) for r in recipes]
    room = parse_space(space, reserve)
    if recorded:
        checkpoint = read_dump(Path(source))
    else:
        opened = open_source(str(source), subfolder)
        checkpoint = _read(opened, wanted)
    return find_fit(checkpoint, wanted, room, lambda plan: check_engines(plan, targets))


def plan_headers(folder: str | Path, recipe: str | Recipe = "W4A16", *, targets: Sequence[str] = ()) -> Plan:
    """The plan of a checkpoint of which only a folder with config.json and headers.json.gz ({shard: {tensor: [dtype,
    shape]}}) or an index is at hand. With an index alone, shapes and bytes are unknown."""
    return check_engines(make_plan(read_dump(Path(folder)), as_recipe(recipe)), targets)


def verify(
    result: str | Path,
    *,
    deep: bool = False,
    source: str | Path | None = None,
    importance: str | Path | None = None,
) -> "Verification":
    """Check a finished output, a folder or "org/name[@revision]", against its ledger, index, headers and configuration;
    and what others made, a quantized checkpoint or GGUF files, which has no ledger, for what its headers and
    configuration tell.

    `deep` also takes the hash of each shard and unpacks every module; with `source` the error figures are recomputed
    from the original weights and copies are compared byte for byte (what a tuning replaced with the ledger's hash, and
    what it scaled not at all), and of GGUF files every byte, for which
    `importance` is the file that they were made with, if any. Of a repo only headers and records are read unless `deep`
    or `source` is given. Raises VerifyFailed when nothing can be checked.
    """
    from shardq.foreign import is_foreign, verify_foreign
    from shardq.gguf_foreign import is_foreign_gguf, verify_foreign_gguf
    from shardq.outputs import open_result

    if importance is not None and source is None:
        raise BadOption("--importance is for what is compared with a --source: give both, or none")
    opened = open_result(str(result))
    if is_foreign(opened) or is_foreign_gguf(opened):
        is_gguf = not is_foreign(opened)
        if source is not None or (deep and not is_gguf):
            options = "--source has" if is_gguf else "--deep and --source have"
            raise BadOption(f"{result} has no records of shardq: {options} nothing to compare with")
        return verify_foreign_gguf(opened, str(result), deep) if is_gguf else verify_foreign(opened, str(result))
    from shardq.importance import load_importance
    from shardq.verification import verify_output  # brings numpy

    weighed = None if importance is None else load_importance(importance)
    return verify_output(str(result), deep, open_source(str(source)) if source is not None else None, weighed)


def audit(
    result: str | Path,
    *,
    source: str | Path | None = None,
    subfolder: str | None = None,
    sample: int = 200,
    seed: int | None = None,
    max_traffic_bytes: int | None = 10**9,
    dry_run: bool = False,
    importance: str | Path | None = None,
    tuned: str | Path | None = None,
) -> "Audit":
    """Derive `sample` random tensors of a finished output again from its source, and compare the bytes.

    `result`: a folder or "org/name[@revision]". `source` (and a `subfolder` of it): what it was made of, by default the
    repo that its records name. No more than `max_traffic_bytes` are read of both, None: no limit; of large tensors
    blocks are compared then. `importance` and `tuned`: the file, and the folder of tuned codes, that it was made with.
    `seed` chooses the tensors, by default the fingerprint does. `dry_run` only plans.
    Differences are among the problems of the Audit; raises BadOption, BadTuned and VerifyFailed when it cannot be made.
    """
    from shardq.auditing import Question, audit_result  # brings numpy
    from shardq.importance import load_importance
    from shardq.outputs import open_result
    from shardq.tuned import load_tuned

    weighed = None if importance is None else load_importance(importance)
    codes = None if tuned is None else load_tuned(tuned)
    question = Question(sample, seed, max_traffic_bytes, dry_run, weighed, codes)
    named = None if source is None else str(source)
    return audit_result(open_result(str(result)), str(result), named, subfolder, question)


def run_manifest(manifest: str | Path, *, once: bool = False) -> "list[Row]":
    """Make everything that a manifest, a TOML file, asks for and that is not up to date: as `shardq batch`.

    What became of each output is in the rows, failures too. `once`: one attempt for each source, and no waiting.
    Raises BadOption for the manifest, and what making a recipe raises; BatchLocked, NotWritable, DiskFull.
    """
    from shardq.batch.driver import Silence, run_batch
    from shardq.batch.manifest import read_manifest

    return run_batch(read_manifest(Path(manifest)), once, Silence())


def inspect(source: str | Path, *, subfolder: str | None = None) -> "Inspection | GgufInspection":
    """Roles, schemes, layout and bits per weight of a repo or folder, from headers alone; of GGUF files, or a folder
    without other weights that holds them, each model's architecture, file type, types of tensors and bits per weight.
    """
    from shardq.gguf.headers import holds_gguf
    from shardq.gguf_inspection import inspect_gguf
    from shardq.inspection import inspect_source

    opened = open_source(str(source), subfolder)
    return inspect_gguf(opened) if holds_gguf(opened.files()) else inspect_source(opened)


def report(result: str | Path, other: str | Path | None = None, *, seconds: float | None = None) -> str:
    """One page of HTML about a finished output, a folder or "org/name[@revision]", or about two side by side: sizes,
    bits per weight, errors by layer, module and tensor, schemes, what is kept and why, engines, provenance. It needs
    nothing from elsewhere.

    `seconds`: what making the result took, for the page; records do not say it. Reads records and headers. Raises
    VerifyFailed where one is unfinished or no output of shardq, SourceUnreadable, HubAccess, HubTransfer.
    """
    from shardq.html_report.facts import read_facts
    from shardq.html_report.page import draw_comparison, draw_report

    first = read_facts(str(result))
    return draw_report(first, seconds) if other is None else draw_comparison(first, read_facts(str(other)))


def _read(source: Source, recipes: Sequence[Recipe]) -> Checkpoint:
    """The headers of a source, and for a GGUF file the texts that go into it."""
    checkpoint = read_checkpoint(source)
    if not any(r.gguf for r in recipes):
        return checkpoint
    from shardq.gguf.model_files import needed_texts

    return needed_texts(checkpoint, source, recipes)


def _silent(step: Progress) -> None:
    """Report nothing."""
