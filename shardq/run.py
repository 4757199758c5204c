"""Make quantized checkpoints in folders: plan, run and publish, or resume, or answer that they are done."""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from shardq.budget import ByteBudget
from shardq.checkpoint import Checkpoint
from shardq.checkpoint_record import decode_checkpoint, encode_checkpoint
from shardq.destinations.base import Destination
from shardq.errors import RecipeChanged
from shardq.executors.base import Executor
from shardq.executors.inline import InlineExecutor
from shardq.files.atomic import write_atomic
from shardq.files.safetensors import tensor_bytes
from shardq.headers import read_checkpoint, read_headers
from shardq.lane import Lane
from shardq.ledger import LEDGER, Errors, decode_ledger
from shardq.limits import Limits, Memory
from shardq.lock import FolderLock
from shardq.onepass import OnePass
from shardq.pipeline import Pipeline
from shardq.plans import Plan, make_plan
from shardq.progress import Report
from shardq.publish import Published, is_complete, publish, recorded_identity
from shardq.push import check_push, prepare_push, push_folder, still_stored
from shardq.recipe import Recipe
from shardq.scale_choice import choose_scales
from shardq.seldom import load_parts
from shardq.signals import StopFlag, raise_on_signal
from shardq.sources.base import Source
from shardq.staging import PROVENANCE, Staging, changed_message, check_folder
from shardq.supply import source_paths
from shardq.tasks import Workplace

ENTRY: Final = "shardq.worker:start"


@dataclass(frozen=True, slots=True)
class Result:
    """What a call of `quantize` did."""

    output: Path  # the folder; with a destination and without keep_local nothing is left in it
    fingerprint: str
    already_done: bool  # folder or destination were complete; no weight was read
    quantized: int  # source tensors
    copied: int
    dropped: int  # left out of the output
    source_bytes: int
    output_bytes: int
    errors: Errors | None  # over all quantized weights; None when already done
    seconds: float
    warnings: tuple[str, ...]  # what is odd but harmless about the checkpoint
    pushed_to: str | None = None  # the destination, None without one
    pushed_commit: str | None = None
    unusual: tuple[tuple[str, float], ...] = ()  # weights hurt more than others of their scheme, with relative errors
    scales: str = ""  # how they were chosen, in a line; empty when already done
    zeroed: tuple[tuple[str, int], ...] = ()  # weights of which groups are left with nothing but zeros, and how many


@dataclass(frozen=True, slots=True)
class Order:
    """One output that is wanted."""

    recipe: Recipe
    out: Path
    destination: Destination | None = None
    renew: bool = False  # what was made of the same source, but with other weights or another recipe, is discarded


@dataclass(frozen=True, slots=True)
class Prepared:
    """An order after a look at what is there already."""

    order: Order
    staging: Staging
    recorded: dict[str, Any] | None  # identity that the folder records
    done: dict[str, Any] | None  # the same if the folder is finished
    plan: Plan
    restart: bool  # discard what is there


def quantize_to_folder(
    source: Source,
    recipe: Recipe,
    out: Path,
    limits: Limits,
    restart: bool,
    report: Report,
    destination: Destination | None = None,
) -> Result:
    """`quantize_all` of one order."""
    return quantize_all(source, (Order(recipe, out, destination),), limits, restart, report, lambda plan: plan)[0]


def quantize_all(
    source: Source,
    orders: Sequence[Order],
    limits: Limits,
    restart: bool,
    report: Report,
    check: Callable[[Plan], object],
) -> tuple[Result, ...]:
    """Make quantized checkpoints of `source`, one for each order, or finish what was begun, from one read of it.

    Each is what a run for it alone would make, and may be finished by one. With a destination every finished file is
    uploaded and, without `limits.keep_local`, deleted here; all of them appear there with one commit at the end.
    `check` may refuse a plan. Raises any ShardqError; all refusals come before the first weight is read.
    """
    began = time.perf_counter()
    results: dict[int, Result] = {}
    prepared: dict[int, Prepared] = {}
    checkpoint: Checkpoint | None = None
    for number, order in enumerate(orders):
        staging = Staging(order.out)
        check_folder(order.out, source_folder(source))
        recorded = None if restart or staging.journal.exists() else recorded_identity(order.out)
        done = _settle(staging, recorded)
        if done and limits.delete_source and _has_eaten(done, source, order.recipe):
            results[number] = _eaten(done, order, began)
            continue
        checkpoint = checkpoint or _checkpoint(source, staging, limits, restart)
        if order.recipe.gguf:
            from shardq.gguf.model_files import needed_texts

            checkpoint = needed_texts(checkpoint, source, [order.recipe])
        plan = make_plan(checkpoint, order.recipe)
        check(plan)
        outdated = _is_outdated(order, staging, recorded, done, plan, source)
        if outdated:
            recorded = done = None
        prepared[number] = Prepared(order, staging, recorded, done, plan, restart or outdated)
    network = source.remote or any(o.destination for o in orders)
    if plans := tuple(p.plan for p in prepared.values() if not p.done):
        limits.share_memory(OnePass(plans), source.remote, network)
    left: dict[int, Prepared] = {}
    for number, p in prepared.items():
        found = _look(p, source, limits, restart, began)
        if found:
            results[number] = found
        else:
            left[number] = p
    if left:
        made = _run(tuple(left.values()), source, limits, network, report)
        for (number, p), got in zip(left.items(), made, strict=True):
            result = _result(p.plan, p.order.out, False, got.errors, began, p.order.destination, got.commit)
            results[number] = replace(result, unusual=got.unusual, zeroed=got.zeroed)
    return tuple(results[number] for number in range(len(orders)))


def _eaten(done: Mapping[str, Any], order: Order, began: float) -> Result:
    """A finished output whose source is deleted, pushed if that is wanted and not done."""
    destination, commit = order.destination, None
    if destination:
        commit = prepare_push(done, destination) or push_folder(order.out, destination)
    return _result_from_records(order.out, began, destination, commit)


def _look(p: Prepared, source: Source, limits: Limits, restart: bool, began: float) -> Result | None:
    """The result of an order that is finished here or at its destination; None when there is work to do."""
    destination, out = p.order.destination, p.order.out
    commit = _ask_destination(p.plan, source, destination, restart, p.order.renew) if destination else None
    if commit and not limits.keep_local:
        _clear(p)
    if p.done and destination and not commit:
        commit = push_folder(out, destination)
    if p.done or (commit and not limits.keep_local):
        return _result(p.plan, out, True, None, began, destination, commit)
    return None


def _settle(staging: Staging, recorded: dict[str, Any] | None) -> dict[str, Any] | None:
    """The identity of a folder that is finished, cleared of what a crash at the very end has left; None otherwise."""
    if recorded is None or not is_complete(staging.out):
        return None
    if staging.work.exists():
        with FolderLock(staging.work / "lock"):
            staging.remove()
    return recorded


def _is_outdated(
    order: Order,
    staging: Staging,
    recorded: Mapping[str, Any] | None,
    done: Mapping[str, Any] | None,
    plan: Plan,
    source: Source,
) -> bool:
    """True if what is in the folder is to be discarded. Raises RecipeChanged where that was not asked for, or where
    it is of another source; an unfinished run is refused later, under its lock."""
    if done == plan.identity():
        newer = _newer_shard(plan, source, (order.out / PROVENANCE).stat().st_mtime)
        if newer and not order.renew:
            raise RecipeChanged(_newer_message(str(order.out), newer))
        return newer is not None
    identity = recorded or (staging.begun_identity() if order.renew else None)
    if identity and identity != plan.identity():
        if order.renew and identity.get("source.label") == plan.checkpoint.label:
            return True
        raise RecipeChanged(changed_message(order.out, identity, plan.identity()))
    return False


def _ask_destination(plan: Plan, source: Source, destination: Destination, restart: bool, renew: bool) -> str | None:
    """Make sure that the destination will take the output; its commit if it holds it already."""
    commit = prepare_push(plan.identity(), destination)
    if commit and not restart:
        newer = None if source.commit else _newer_shard(plan, source, destination.changed_at_s())
        if newer is None:
            return commit
        if not renew:
            raise RecipeChanged(_newer_message(destination.label, newer))
    check_push(plan, source, destination)
    return None


def _clear(p: Prepared) -> None:
    """Remove what a run of this plan has left here that crashed after its commit; what is of another plan stays, unless
    it is outdated."""
    staging = p.staging
    if not staging.work.exists():
        staging.leave()
        return
    with FolderLock(staging.work / "lock"):
        if p.restart or staging.is_of(p.plan.identity()):
            staging.abandon()


def _run(todo: Sequence[Prepared], source: Source, limits: Limits, network: bool, report: Report) -> list[Published]:
    """Everything that these still need, from where an earlier run stopped; errors, and commit if pushed, of each."""
    work = OnePass(tuple(p.plan for p in todo))
    memory = limits.share_memory(work, source.remote, network)
    with ExitStack() as held:
        for p in sorted(todo, key=lambda p: not p.staging.journal.exists()):  # those that may be refused come first
            begun = p.staging.journal.exists()
            p.staging.make()
            held.enter_context(FolderLock(p.staging.work / "lock"))
            if begun and len(todo) > 1 and not p.restart:
                p.staging.refuse_other(p.plan.identity())
        lanes = [_open_lane(number, p, source, limits, held) for number, p in enumerate(todo)]
        with StopFlag() as stop:
            run_lanes(work, source, lanes, limits, memory, report, stop)
        folders = ", ".join(str(p.staging.work) for p in todo)
        state = f"all shards are done, kept in {folders}: run the same command again to resume"
        stop.heed(state)
        with raise_on_signal(f"stopped; {state}"):
            return [
                publish(p.plan, source, p.staging, lane.finished, p.order.destination, limits.keep_local)
                for p, lane in zip(todo, lanes, strict=True)
            ]


def run_lanes(
    work: OnePass,
    source: Source,
    lanes: Sequence[Lane],
    limits: Limits,
    memory: Memory,
    report: Report,
    stop: StopFlag,
) -> None:
    """Everything that the lanes of a pass still need. Raises what Pipeline.run does."""
    home = lanes[0].staging
    parts = tuple(str(lane.staging.part) for lane in lanes)
    keeps = memory.task_bytes is None or memory.task_bytes >= limits.parallel * work.largest_task_bytes
    paths = source_paths(work, source, home)
    workplace = Workplace(paths, parts, keeps, limits.log, str(home.src), str(home.lent))
    if limits.parallel > 1:
        load_parts(task for plan in work.plans for task in plan.tasks)
    run = Pipeline(work, source, lanes, limits, memory.slots, report)
    try:
        with make_executor(limits.parallel, workplace, memory.task_bytes) as executor:
            run.run(executor, stop)
    finally:
        run.close()


def _open_lane(number: int, p: Prepared, source: Source, limits: Limits, held: ExitStack) -> Lane:
    """An output with what an earlier run did of it; its journal is closed with `held`."""
    destination = p.order.destination
    label = destination.label if destination else None
    journal, before = p.staging.open(p.plan, source_stamps(p.plan, source), p.restart, label)
    held.callback(journal.close)
    if limits.delete_source:
        write_atomic(p.staging.source_record, encode_checkpoint(p.plan.checkpoint))
    uploader = None
    if destination:
        from shardq.uploader import Uploader

        uploader = Uploader(destination)
        before = still_stored(before, destination, p.staging, limits.keep_local)
        before = p.staging.check_settled(before, p.plan, journal)
    return Lane(number, p.plan, p.staging, journal, before, uploader, label)


def make_executor(parallel: int, workplace: Workplace, task_bytes: int | None) -> Executor:
    """Worker processes; a single worker works in the calling process."""
    if parallel == 1:
        return InlineExecutor(ENTRY, workplace)
    from shardq.executors.processes import ProcessExecutor  # brings multiprocessing

    return ProcessExecutor(ENTRY, workplace, parallel, ByteBudget(task_bytes))


def _checkpoint(source: Source, staging: Staging, limits: Limits, restart: bool) -> Checkpoint:
    """The source's headers; those of the first run where its shards are being deleted on the way, but for shards that
    are there and are others now: the identity of the run then tells."""
    eaten = limits.delete_source and not restart and staging.source_record.exists() and source.commit is None
    recorded = decode_checkpoint(staging.source_record.read_bytes()) if eaten else None
    if recorded is None or recorded.label != source.label:
        return read_checkpoint(source)
    files = {f.name: f for f in source.files()}
    headers = read_headers(source, [files[s.name] for s in recorded.shards if s.name in files])
    shards = (
        replace(s, size_bytes=files[s.name].size_bytes, header_sha256=headers[s.name].sha256) if s.name in files else s
        for s in recorded.shards
    )
    return replace(recorded, shards=tuple(shards))


def source_folder(source: Source) -> Path | None:
    """The folder that a local source reads."""
    if source.remote or not (files := source.files()):
        return None
    path = source.local_path(files[0].name)
    return None if path is None else Path(str(path).removesuffix(files[0].name))


def source_stamps(plan: Plan, source: Source) -> dict[str, int]:
    """When each shard of a folder was last changed, in ns: equal headers need not mean equal weights."""
    if source.commit is not None or source.remote:
        return {}
    paths = ((s.name, source.local_path(s.name)) for s in plan.checkpoint.shards)
    return {name: path.stat().st_mtime_ns for name, path in paths if path}


def _newer_shard(plan: Plan, source: Source, made_s: float) -> str | None:
    """A shard of a source folder that was written after an output: a finished one does not answer for it."""
    return next((name for name, at_ns in source_stamps(plan, source).items() if at_ns > made_s * 1e9), None)


def _newer_message(where: str, shard: str) -> str:
    return (
        f"{where} is finished, but source shard {shard} was written after it: use --restart to quantize again, or "
        "choose another --output-dir or --push-to"
    )


def _has_eaten(done: Mapping[str, Any], source: Source, recipe: Recipe) -> bool:
    """True if a finished run of this recipe has deleted shards of this source, which cannot be planned again. A power
    cut may have brought some of them back."""
    there = {f.name for f in source.files()}
    if done["source.label"] != source.label or all(s[0] in there for s in done["source.shards"]):
        return False
    from shardq.outputs import is_of_recipe

    return is_of_recipe(done, recipe)


def _result_from_records(out: Path, began: float, destination: Destination | None, commit: str | None) -> Result:
    """What `_result` would say about a finished folder."""
    record = json.loads((out / PROVENANCE).read_bytes())
    entries = decode_ledger((out / LEDGER).read_bytes())["tensors"].values()
    outcomes = Counter(e["outcome"] for e in entries)
    return Result(
        output=out,
        fingerprint=record["fingerprint"],
        already_done=True,
        quantized=outcomes["quantized"],
        copied=outcomes["copied"],
        dropped=outcomes["dropped"],
        source_bytes=sum(tensor_bytes(e["dtype"], e["shape"]) for e in entries),
        output_bytes=sum(f["size"] for f in record["files"].values()),
        errors=None,
        seconds=time.perf_counter() - began,
        warnings=(),
        pushed_to=destination.label if destination else None,
        pushed_commit=commit,
    )


def _result(
    plan: Plan,
    out: Path,
    already: bool,
    errors: Errors | None,
    began: float,
    destination: Destination | None,
    commit: str | None,
) -> Result:
    actions = Counter(d.action for d in plan.decisions)
    return Result(
        output=out,
        fingerprint=plan.fingerprint,
        already_done=already,
        quantized=actions["quantize"],
        copied=actions["copy"],
        dropped=actions["drop"],
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        errors=errors,
        seconds=time.perf_counter() - began,
        warnings=plan.warnings,
        scales=choose_scales(plan).text,
        pushed_to=destination.label if destination else None,
        pushed_commit=commit,
    )
