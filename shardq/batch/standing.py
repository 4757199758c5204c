"""How an entry's standing follows from what it was, what the Hub says now, and what an attempt gave."""

import time
from dataclasses import replace

from shardq.batch.manifest import Model
from shardq.batch.schedule import Patience, kind_of
from shardq.batch.state import Standing, Trouble, now_text
from shardq.batch.up_to_date import Look, identify


def first_standing(before: Standing | None, model: Model, look: Look, patience: Patience) -> Standing:
    """Where an entry stands after a look at it.

    A failure that source and recipe decide stays one until either changes, or shardq's version. Any other is tried
    again; one that may pass not before its time.
    """
    found = _look_at(before, model, look, patience)
    return before if before and replace(found, changed=before.changed) == before else found


def _look_at(before: Standing | None, model: Model, look: Look, patience: Patience) -> Standing:
    commit, recipe = look.commit, identify(look.entry.recipe)
    same = before is not None and (before.commit, before.recipe) == (commit, recipe)
    now = Standing(
        "waiting", model.source, commit, model.subfolder, recipe, str(look.entry.out), look.pushed_commit,
        changed=now_text(), collection=before.collection if before else None,
    )  # fmt: skip
    if look.error:
        trouble = Trouble(type(look.error).__name__, str(look.error))
        attempts = before.attempts if before and before.state == "waiting" else 0
        return next_standing(replace(now, attempts=attempts), trouble, kind_of(trouble.type) == "passing", patience)
    if look.done:
        return replace(now, state="done", seconds=before.seconds if before else 0.0)
    if before is None or not same:
        return now
    if before.state == "failed":
        return before if before.error and kind_of(before.error.type) == "settled" else now
    if before.state == "waiting":
        return replace(now, attempts=before.attempts, next_try=before.next_try, error=before.error)
    return now


def next_standing(
    before: Standing, trouble: Trouble | None, passing: bool, patience: Patience, stopped: bool = False
) -> Standing:
    """Where an entry stands after an attempt. `stopped`: the batch was, which is no failure of the entry."""
    now = replace(before, changed=now_text(), error=trouble, next_try=None)
    if trouble is None:
        return replace(now, state="done", attempts=0)
    if stopped:
        return replace(now, state="waiting", error=None)
    if not passing:
        return replace(now, state="failed", attempts=before.attempts + 1)
    wait_s = patience.wait_s(before.attempts + 1)
    return replace(now, state="waiting", attempts=before.attempts + 1, next_try=time.time() + wait_s)
