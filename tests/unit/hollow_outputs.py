"""Finished outputs of plans whose weights nobody has: records and headers as a run would write them, holes for weights,
errors that are made up."""

import random
from pathlib import Path

from shardq.config_json import dump
from shardq.figures import Figures
from shardq.lane import Finished
from shardq.ledger import LEDGER, Errors, encode_ledger, make_ledger, merge
from shardq.plans import Plan
from shardq.publish import _configs, _provenance
from shardq.staging import PROVENANCE


def write_hollow(plan: Plan, folder: Path) -> dict[str, Errors]:
    """Write it; returns the errors of each quantized tensor."""
    errors = {d.tensor.name: _errors(d.tensor.name, d.tensor.numel) for d in plan.decisions if d.scheme}
    folder.mkdir()
    for file in plan.files:
        with (folder / file.name).open("wb") as out:
            out.write(file.header)
            out.truncate(file.size_bytes)
    sealed = {f.name: ("0" * 64, f.size_bytes) for f in plan.files}
    others = dict(_configs(plan)) | {LEDGER: encode_ledger(make_ledger(plan, errors))}
    finished = Finished({}, sealed)
    record = dump(_provenance(plan, finished, merge(errors.values()), [*others, PROVENANCE]))
    for name, data in (others | {PROVENANCE: record}).items():
        (folder / name).write_bytes(data)
    return errors


def _errors(name: str, weights: int) -> Errors:
    draw = random.Random(name)
    share = 0.08 + 0.05 * draw.random() ** 3 + (0.04 if "v_proj" in name or ".0." in name else 0)
    squared = weights * 4e-4
    return Errors(
        Figures(share**2 * squared, squared, 0.01, share**2 * squared, weights // 50, int(draw.random() > 0.999)),
        weights,
    )
