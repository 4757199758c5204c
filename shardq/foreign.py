"""Check a quantized checkpoint that others made: no ledger, so headers, index and configuration are all there is."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from shardq.companions import find_companions
from shardq.errors import CheckpointIncomplete, CorruptShard, SourceUnreadable, UnknownDtype, UnsupportedSource
from shardq.headers import read_checkpoint
from shardq.ledger import LEDGER
from shardq.serving.believed import METHODS, ct_groups
from shardq.serving.served import Module, Served, find_block, read_served, tensors_of
from shardq.sources.base import Source
from shardq.staging import CONFIG, PROVENANCE
from shardq.verified import Verification

MAX_CONFIG_BYTES: Final = 1 << 26
STALE: Final = ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json")
SHOWN: Final = 20  # problems of one kind before "and N more"


def is_foreign(source: Source) -> bool:
    """True for a source without records of shardq whose config.json, if it can be read, says that it is quantized."""
    names = {f.name for f in source.files()}
    if PROVENANCE in names or LEDGER in names or CONFIG not in names:
        return False
    config = _config(source)
    return config is not None and bool(find_block(config))


def verify_foreign(source: Source, where: str) -> Verification:
    """What headers, index and configuration tell; problems come back, and verdicts of engines follow from `served`.

    Checked: the index against the shards both ways, that every weight has its scales, zero points and their shapes, and
    that the configuration can be read. Raises HubAccess and HubTransfer.
    """
    config = _config(source) or {}
    try:
        checkpoint = read_checkpoint(source)
    except (CheckpointIncomplete, CorruptShard, UnknownDtype, SourceUnreadable, UnsupportedSource) as e:
        empty = read_served({}, config)
        return Verification(where, source.commit, 0, 0, False, 0, (str(e),), empty, foreign=True)
    served = read_served(tensors_of(checkpoint.tensors.values()), config)
    lone = [c for c in find_companions(checkpoint.tensors.values()) if not c.paired]
    problems = [
        *_some(f"{c.name} has no partner: a part of a {c.kind} weight is missing" for c in lone),
        *_some(_shape_problems(served)),
        *_config_problems(served),
    ]
    notes = [*checkpoint.warnings, *_stale(source, served)]
    return Verification(
        where, source.commit, len(checkpoint.shards), len(checkpoint.tensors), False, 0, tuple(problems), served,
        tuple(notes), foreign=True,
    )  # fmt: skip


def _config(source: Source) -> Mapping[str, Any] | None:
    file = next((f for f in source.files() if f.name == CONFIG), None)
    if file is None or file.size_bytes > MAX_CONFIG_BYTES:
        return None
    try:
        value = json.loads(source.read(CONFIG, 0, file.size_bytes))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _shape_problems(served: Served) -> Iterator[str]:
    """Scales and zero points whose shapes do not go with their codes."""
    for m in served.quantized:
        for leaf, expected in _expected(m, served).items():
            found = served.tensors.get(f"{m.name}.{leaf}")
            if found is not None and tuple(found[1]) not in expected:
                shapes = " or ".join(str(list(s)) for s in expected)
                yield f"{m.name}.{leaf} is {list(found[1])}: expected {shapes} beside [{m.rows}, {m.columns}]"


def _expected(m: Module, served: Served) -> Mapping[str, tuple[tuple[int, ...], ...]]:
    """Shapes that the companions of a two-dimensional weight may have."""
    assert m.stored is not None
    size = m.stored.group_columns
    groups = -(-m.columns // size) if size > 0 else 1
    if f"{m.name}.qweight" in served.tensors:
        zeros = (groups, m.rows * m.stored.bits // 32)
        return {"scales": ((groups, m.rows),), "qzeros": (zeros,), "g_idx": ((m.columns,), (0,))}
    if f"{m.name}.scales" in served.tensors or size == 0:  # stacks, or one scale for all
        return {}
    if m.stored.group_rows > 1:
        grid = (-(-m.rows // m.stored.group_rows), groups)
        return {"weight_scale": (grid,), "weight_scale_inv": (grid,)}
    lines: tuple[tuple[int, ...], ...] = ((m.rows, groups),) if groups > 1 else ((m.rows, 1), (m.rows,))
    return {"weight_scale": lines, "weight_scale_inv": lines}


def _config_problems(served: Served) -> Iterator[str]:
    block, method = served.block, served.method
    if not method:
        yield f"{CONFIG} has a quantization_config without quant_method"
        return
    if method == "compressed-tensors":
        if not isinstance(block.get("config_groups"), dict) or not ct_groups(block):
            yield f"{CONFIG}: quantization_config has no config_groups"
        for group in ct_groups(block):
            if not isinstance(group.get("weights"), dict) or not isinstance(group.get("targets"), list):
                yield f"{CONFIG}: a group of config_groups has no weights or no targets"
    if method in ("gptq", "awq", "auto-round"):
        for key in ("bits", "group_size"):
            if not isinstance(block.get(key, block.get({"bits": "w_bit", "group_size": "q_group_size"}[key])), int):
                yield f"{CONFIG}: quantization_config has no {key}"
    if method in {*METHODS.values(), "mlx"} and not served.quantized:
        yield f"{CONFIG} says {method}, but no tensor is quantized"


def _stale(source: Source, served: Served) -> Iterator[str]:
    """Older configuration files that say something else: some readers prefer them."""
    for file in source.files():
        if file.name not in STALE or file.size_bytes > MAX_CONFIG_BYTES:
            continue
        try:
            value = json.loads(source.read(file.name, 0, file.size_bytes))
        except (ValueError, RecursionError):
            yield f"{file.name} is not JSON."
            continue
        if isinstance(value, dict) and any(k in served.block and served.block[k] != v for k, v in value.items()):
            yield f"{file.name} differs from quantization_config in {CONFIG}; some readers prefer it."


def _some(problems: Iterator[str]) -> list[str]:
    found = list(problems)
    more = [f"and {len(found) - SHOWN} more of this kind"] if len(found) > SHOWN else []
    return found[:SHOWN] + more
