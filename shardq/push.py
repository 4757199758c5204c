"""The destination's part in a run: what is there already, and a finished folder that is only to be uploaded."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from shardq.card import make_card, read_source_card
from shardq.destinations.base import Destination, StoredFile
from shardq.errors import OutputOccupied
from shardq.files.atomic import reading
from shardq.ledger import merge
from shardq.plans import Plan
from shardq.signals import raise_on_signal
from shardq.sources.base import Source
from shardq.staging import CONFIG, PROVENANCE, Progressed, Staging

WEIGHTS: Final = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


def prepare_push(identity: Mapping[str, Any], destination: Destination) -> str | None:
    """Make sure that the destination exists and may be written; its commit if it holds the output of `identity`.

    Raises HubAccess, HubTransfer, OutputOccupied.
    """
    destination.prepare()
    record = destination.provenance()
    if record is None or not _is_ours(record):
        weights = sorted(n for n in destination.names() if n == CONFIG or n.endswith(WEIGHTS))
        if weights:
            raise OutputOccupied(
                f"{destination.label} holds something else ({', '.join(weights[:4])}{', ...' if weights[4:] else ''}): "
                "choose another repo or --branch, or empty it"
            )
        return None
    if record["identity"] != identity:
        return None  # an older output: the commit replaces it
    expected = {CONFIG} & set(record.get("others", (CONFIG,)))
    whole = destination.holds(_files(record), {}) and expected <= set(destination.names())
    return destination.head() if whole else None


def check_push(plan: Plan, source: Source, destination: Destination) -> None:
    """Ask whether the destination will take the output of a plan. Raises HubAccess, HubTransfer."""
    destination.check(len(plan.files), make_card(plan, {}, merge(()), read_source_card(plan, source), (), None))


def still_stored(before: Progressed, destination: Destination, staging: Staging, keep_local: bool) -> Progressed:
    """What an earlier run has uploaded, without what the server has forgotten since: uploads that no commit names may
    be collected as garbage. Such a file is uploaded again if it is still here, and made again otherwise. With
    `keep_local` all that is not here is made again. Raises HubAccess, HubTransfer."""
    files = [StoredFile(name, before.sealed[name][1], before.sealed[name][0]) for name in sorted(before.uploaded)]
    gone = before.uploaded - destination.stored(files) if files else frozenset[str]()
    needed = before.uploaded if keep_local else gone
    lost = {name for name in needed if not staging.find(name).exists()}
    sealed = {name: v for name, v in before.sealed.items() if name not in lost}
    return replace(before, sealed=sealed, uploaded=before.uploaded - gone - lost)


def push_folder(folder: Path, destination: Destination) -> str:
    """Upload a finished output folder with one commit; returns it.

    Raises HubAccess, HubTransfer, SourceUnreadable, ChecksumMismatch for a file that is not as it was written,
    Interrupted, Terminated.
    """
    with raise_on_signal(f"stopped; {folder} is complete: run the same command again to resume its upload"):
        record = json.loads((folder / PROVENANCE).read_bytes())
        small: dict[str, bytes] = {}
        for name in record["others"]:
            with reading(folder / name):
                small[name] = (folder / name).read_bytes()
        files = _files(record)
        for file in files:
            destination.upload(folder / file.name, file, _silent)
        identity = record["identity"]
        return destination.commit(files, small, f"{identity['recipe.preset']} of {identity['source.label']}")


def _files(record: Mapping[str, Any]) -> list[StoredFile]:
    return [StoredFile(name, f["size"], f["sha256"]) for name, f in record["files"].items()]


def _is_ours(record: Mapping[str, Any]) -> bool:
    """True if this can be the shardq.json of an output, and not some other program's file of that name."""
    try:
        _files(record)
    except (KeyError, TypeError, AttributeError):
        return False
    return isinstance(record.get("identity"), dict)


def _silent(_count: int) -> None:
    """Count nothing."""
