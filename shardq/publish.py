"""Makes the finished shards a checkpoint: side files, card, ledger, index and configuration, all at once.

Everything is first written into the staging folder; the last step renames it into the output folder, config.json last,
so that no half-done folder loads.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardq.card import README, make_card, make_command, read_source_card
from shardq.config_json import dump
from shardq.destinations.base import Destination, StoredFile
from shardq.files.atomic import sync_folder, sync_way, write_atomic, writing
from shardq.final_config import final_config
from shardq.ggml import GGML, tensor_bytes
from shardq.html_report.grid import find_grids
from shardq.html_report.picture import PICTURE, draw_picture, main_grid
from shardq.html_report.rows import read_rows
from shardq.lane import Finished
from shardq.ledger import LEDGER, Errors, damaged, encode_ledger, make_ledger, merge, stand_out, tensor_errors
from shardq.plans import Plan
from shardq.scale_choice import choose_scales
from shardq.side_files import select_side_files
from shardq.sources.base import Source
from shardq.staging import CONFIG, PROVENANCE, Staging
from shardq.version import VERSION


@dataclass(frozen=True, slots=True)
class Published:
    """What came of an output."""

    errors: Errors  # over all quantized weights
    unusual: tuple[tuple[str, float], ...]  # see ledger.stand_out
    zeroed: tuple[tuple[str, int], ...]  # see ledger.damaged
    commit: str | None  # of the destination


def publish(
    plan: Plan,
    source: Source,
    staging: Staging,
    finished: Finished,
    destination: Destination | None,
    keep_local: bool,
) -> "Published":
    """Write what is missing, commit everything to the destination if there is one, and move everything into place
    unless it is to be there only.

    May be repeated after a crash.
    """
    errors = tensor_errors(plan, finished.done)
    total = merge(errors.values())
    extra = {} if plan.gguf else dict(_side_files(plan, source))
    ledger = make_ledger(plan, errors)
    rows = read_rows(ledger, _sizes(plan))
    shown = main_grid(find_grids(rows))
    card = make_card(plan, errors, total, read_source_card(plan, source), rows, shown[0] if shown else None)
    extra[README] = card.encode()
    if shown:
        extra[PICTURE] = draw_picture(*shown)
    if plan.recipe.fold:
        from shardq.fold import FOLD, pack_fold

        extra[FOLD] = pack_fold(plan.recipe.fold)
    extra[LEDGER] = encode_ledger(ledger)
    configs = {} if plan.gguf else dict(_configs(plan))
    extra[PROVENANCE] = dump(_provenance(plan, finished, total, [*extra, PROVENANCE, *configs]))
    extra |= configs
    commit = None
    if destination:
        files = [StoredFile(name, size, sha256) for name, (sha256, size) in finished.sealed.items()]
        commit = destination.commit(files, extra, f"{plan.recipe.preset} of {plan.checkpoint.label}")
        if not keep_local:
            staging.abandon()
            return Published(total, stand_out(plan, errors), damaged(errors), commit)
    for name, data in extra.items():
        write_atomic(staging.ready / name, data)
    order = [*extra, *reversed([f.name for f in plan.files])] if plan.gguf else [*finished.sealed, *extra]
    for name in order[:-1]:
        _move(staging, name)
    for folder in {(staging.out / name).parent for name in order}:
        with writing(folder):
            sync_way(folder, staging.out)
    _move(staging, order[-1])  # config.json, or a GGUF's first part: without it nothing loads
    with writing(staging.out):
        sync_folder(staging.out)
    staging.remove()
    return Published(total, stand_out(plan, errors), damaged(errors), commit)


def _sizes(plan: Plan) -> Mapping[str, int]:
    """Bytes of each tensor of the output."""
    if plan.gguf:
        return {t.name: tensor_bytes(GGML[t.type], t.shape) for t in plan.gguf.tensors}
    return {name: end - begin for f in plan.files for name, (begin, end) in f.offsets.items()}


def _configs(plan: Plan) -> Iterator[tuple[str, bytes]]:
    """What loaders of safetensors read beside them, config.json last."""
    block = plan.layout.config_block(plan.recipe.scheme, plan.choices(), VERSION)
    for name, content in plan.layout.config_files(block).items():
        yield name, dump(content)
    if plan.checkpoint.index_name:
        yield plan.checkpoint.index_name, dump(_index(plan))
    yield CONFIG, final_config(plan, block).encode()


def _side_files(plan: Plan, source: Source) -> Mapping[str, bytes]:
    return {f.name: source.read(f.name, 0, f.size_bytes) for f in select_side_files(plan.checkpoint.side_files)}


def _provenance(plan: Plan, finished: Finished, total: Errors, others: Iterable[str]) -> dict[str, Any]:
    return {
        "format": 1,
        "shardq": VERSION,
        "fingerprint": plan.fingerprint,
        "command": make_command(plan),
        "identity": plan.identity(),
        "scales": choose_scales(plan).describe(),
        "errors": {
            "relative": total.relative,
            "max": total.max_error,
            "weights": total.weights,
            "cosine": total.cosine,
            "saturated_share": total.saturated_share,
            "zeroed_groups": total.figures.zeroed_groups,
        },
        "files": {name: {"sha256": sha, "size": size} for name, (sha, size) in sorted(finished.sealed.items())},
        "others": sorted(others),  # every other file that is written
    }


def _index(plan: Plan) -> dict[str, Any]:
    """Totals counted from the headers that were written."""
    weight_map = {name: f.name for f in plan.files for name in f.specs}
    data = sum(end - begin for f in plan.files for begin, end in f.offsets.values())
    parameters = sum(t.numel for t in plan.weights.tensors.values())
    return {
        "metadata": {"total_parameters": parameters, "total_size": data},
        "weight_map": dict(sorted(weight_map.items())),
    }


def _move(staging: Staging, name: str) -> None:
    source, target = staging.ready / name, staging.out / name
    with writing(target):
        if source.exists():  # else an interrupted publish has moved it
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.parent != staging.out:
                sync_way(target.parent, staging.out)  # a power cut that takes the folder takes the file
            os.replace(source, target)


def recorded_identity(out: Path) -> dict[str, Any] | None:
    """What an output folder says that it was made of; None without a readable record."""
    try:
        identity: dict[str, Any] = json.loads((out / PROVENANCE).read_bytes())["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return identity


def is_complete(out: Path) -> bool:
    """True if all weight files that an output folder records are there in their size, and its configuration."""
    try:
        record = json.loads((out / PROVENANCE).read_bytes())
        there = all((out / n).stat().st_size == f["size"] for n, f in record["files"].items())
        return there and (CONFIG not in record["others"] or (out / CONFIG).exists())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
