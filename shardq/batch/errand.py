"""What the process of one model does: all outputs that are wanted, from one read of the source.

A process of its own, so that what kills it (memory, a fault in native code) ends one model and not the batch.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection

from shardq.batch.manifest import Entry, take_layers
from shardq.batch.schedule import BUG
from shardq.batch.state import Trouble
from shardq.destinations import open_destination
from shardq.errors import Interrupted, ShardqError
from shardq.executors.child import die_with_caller
from shardq.files.atomic import write_atomic, writing
from shardq.gguf.model_files import needed_texts
from shardq.headers import read_checkpoint
from shardq.limits import Limits
from shardq.mixing import mix
from shardq.opening import check_engines, open_within
from shardq.pace import Pace
from shardq.plans import Plan, make_plan
from shardq.progress import Progress
from shardq.run import Order, quantize_all
from shardq.sources import Source

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Errand:
    """One model, or what is left to make of it."""

    source: str
    commit: str | None  # the source's, where it has any
    subfolder: str | None
    entries: tuple[Entry, ...]
    limits: Limits


@dataclass(frozen=True, slots=True)
class Made:
    """What became of an entry."""

    label: str
    pushed_commit: str | None = None
    trouble: Trouble | None = None


Message = Progress | tuple[Made, ...]


def serve_errand(pipe: connection.Connection, errand: Errand) -> None:
    """Main function of the process: sends its steps, and at the end what became of each entry."""
    os.setsid()  # Ctrl-C is for the batch, which passes it on
    die_with_caller()
    if errand.limits.log:
        errand.limits.log.apply()
    try:
        made = run_errand(errand, pipe.send)
    except ShardqError as error:
        made = tuple(_failed(e, error) for e in errand.entries)
    except Exception as error:  # a bug of ours ends this model only
        logger.exception("a bug in shardq: %s", errand.source)
        trouble = Trouble(BUG, f"a bug in shardq, {type(error).__name__}: {error}; the log has a traceback")
        made = tuple(Made(e.label, trouble=trouble) for e in errand.entries)
    pipe.send(made)


def run_errand(errand: Errand, report: Callable[[Progress], None]) -> tuple[Made, ...]:
    """Make all outputs; one whose plan is refused does not keep the others from being made.

    Raises ShardqError for what concerns all of them.
    """
    text = f"{errand.source}@{errand.commit}" if errand.commit else errand.source
    source = open_within(text, errand.subfolder, errand.limits)
    entries = [_choose(e, source) if e.mixture else e for e in errand.entries]
    try:
        return _make(entries, source, errand.limits, report)
    except Interrupted:
        raise
    except ShardqError:
        refused = _find_refused(entries, source) if len(entries) > 1 else {}
        if not refused or len(refused) == len(entries):
            raise
    left = [e for e in entries if e.label not in refused]
    return (*refused.values(), *_make(left, source, errand.limits, report))


def _choose(e: Entry, source: Source) -> Entry:
    """Choose the mixture of an entry, and write it beside its folder. Raises as `mix`."""
    assert e.mixture
    m = e.mixture
    mixed = mix(source, e.recipe, m.options, m.target_bits, m.ignore_scale_bits)
    with writing(e.layers):
        e.layers.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(e.layers, mixed.text.encode())
    return take_layers(e)


def _make(
    entries: Sequence[Entry], source: Source, limits: Limits, report: Callable[[Progress], None]
) -> tuple[Made, ...]:
    pace = Pace(limits.max_rate_bytes_s)  # of all uploads
    orders = [
        Order(e.recipe, e.out, open_destination(e.repo, e.private, pace=pace) if e.repo else None, renew=True)
        for e in entries
    ]
    results = quantize_all(source, orders, limits, False, report, lambda plan: _check(plan, entries))
    return tuple(Made(e.label, r.pushed_commit) for e, r in zip(entries, results, strict=True))


def _check(plan: Plan, entries: Sequence[Entry]) -> None:
    for e in entries:
        if e.recipe is plan.recipe:
            check_engines(plan, e.targets)


def _find_refused(entries: Sequence[Entry], source: Source) -> dict[str, Made]:
    """The entries of which nothing can be planned."""
    checkpoint = read_checkpoint(source)
    refused: dict[str, Made] = {}
    for e in entries:
        try:
            check_engines(make_plan(needed_texts(checkpoint, source, [e.recipe]), e.recipe), e.targets)
        except ShardqError as error:
            refused[e.label] = _failed(e, error)
    return refused


def _failed(e: Entry, error: ShardqError) -> Made:
    return Made(e.label, trouble=Trouble(type(error).__name__, str(error)))
