"""The destination's part in a run: what is there already, and a finished folder that is only to be uploaded."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Final

from shardq.card import make_card, read_source_card
from shardq.destinations.base import Destination, StoredFile
from shardq.errors import OutputOccupied
from shardq.ledger import merge
from shardq.plans import Plan
from shardq.sources.base import Source
from shardq.staging import CONFIG, PROVENANCE, Progressed, Staging

WEIGHTS: Final = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


def prepare_push(plan: Plan, source: Source, destination: Destination) -> str | None:
    """Make sure that the destination exists and will take the output; its commit if it holds it already.

    Raises HubAccess, HubTransfer, OutputOccupied.
    """
    destination.prepare()
    destination.check(len(plan.files), make_card(plan, {}, merge(()), read_source_card(plan, source)))
    record = destination.provenance()
    if record is None:
        weights = sorted(n for n in destination.names() if n == CONFIG or n.endswith(WEIGHTS))
        if weights:
            raise OutputOccupied(
                f"{destination.label} holds something else ({', '.join(weights[:4])}{', ...' if weights[4:] else ''}): "
                "choose another repo or --branch, or empty it"
            )
        return None
    if record.get("identity") != plan.identity():
        return None  # an older output: the commit replaces it
    try:
        files = [StoredFile(name, f["size"], f["sha256"]) for name, f in record["files"].items()]
    except (KeyError, TypeError, AttributeError):  # not as we write it: to be replaced
        return None
    return destination.head() if len(files) == len(plan.files) and destination.holds(files, {}) else None


def still_stored(before: Progressed, destination: Destination, staging: Staging) -> Progressed:
    """What an earlier run has uploaded, without what the server has forgotten since: uploads that no commit names may
    be collected as garbage. Such a file is uploaded again if it is still here, and made again otherwise."""
    files = [StoredFile(name, before.sealed[name][1], before.sealed[name][0]) for name in sorted(before.uploaded)]
    gone = before.uploaded - destination.stored(files) if files else frozenset[str]()
    lost = {name for name in gone if not staging.find(name).exists()}
    sealed = {name: v for name, v in before.sealed.items() if name not in lost}
    return replace(before, sealed=sealed, uploaded=before.uploaded - gone)


def push_folder(folder: Path, destination: Destination) -> str:
    """Upload a finished output folder with one commit; returns it. Raises HubAccess, HubTransfer."""
    record = json.loads((folder / PROVENANCE).read_bytes())
    files = [StoredFile(name, f["size"], f["sha256"]) for name, f in record["files"].items()]
    for file in files:
        destination.upload(folder / file.name, file, _silent)
    small = {name: (folder / name).read_bytes() for name in record["others"]}
    identity = record["identity"]
    return destination.commit(files, small, f"{identity['recipe.preset']} of {identity['source.label']}")


def _silent(_count: int) -> None:
    """Count nothing."""
