"""Whether matrices can be cut over several devices, as vLLM and SGLang cut them.

Which way each is cut is in cuts.py. Source: vLLM 0.32 `linear.py`, `fp8_utils.validate_fp8_block_shape`,
`marlin_utils`; SGLang has the same code.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from shardq.serving.cuts import Cut
from shardq.serving.served import Module, Served

WORD_BITS: Final = 32


def heads(served: Served, tp: int) -> list[str]:
    """Numbers of attention heads that tp does not divide; fewer key-value heads than tp are copied."""
    text = served.config.get("text_config")
    config: Mapping[str, Any] = {**(text if isinstance(text, dict) else {}), **served.config}
    found = []
    count = config.get("num_attention_heads")
    if isinstance(count, int) and count % tp:
        found.append(f"num_attention_heads {count}")
    kv = config.get("num_key_value_heads")
    if isinstance(kv, int) and kv > 0 and (kv % tp if kv >= tp else tp % kv):
        found.append(f"num_key_value_heads {kv}")
    return found


def rows(served: Served, tp: int) -> list[str]:
    """Matrices whose rows do not divide."""
    return [
        f"{m.name} [{m.rows}, {m.columns}]" for m in _cut(served, "rows") if m.rows % tp and not _copied(served, m, tp)
    ]


def columns(served: Served, tp: int) -> list[str]:
    """Matrices whose columns do not divide."""
    return [f"{m.name} [{m.rows}, {m.columns}]" for m in _cut(served, "columns") if m.columns % tp]


def groups(served: Served, tp: int) -> list[str]:
    """Matrices of which a device would get a part of a group."""
    found = []
    for m in _cut(served, "columns"):
        size = m.stored.group_columns if m.stored and m.stored.group_rows == 1 else 0
        if size > 0 and m.columns % tp == 0 and m.columns // tp % size:
            found.append(f"{m.name}: {m.columns} / {tp} columns in groups of {size}")
    return found


def words(served: Served, tp: int) -> list[str]:
    """Packed matrices of which a device would get a part of a word of codes or zero points."""
    found = []
    for m in served.quantized:
        if m.stored is None or m.stored.kind != "int" or f"{m.name}.qweight" not in served.tensors:
            continue
        side = {"rows": m.rows, "columns": m.columns, "none": 0}[m.cut]
        if side % tp == 0 and side // tp * m.stored.bits % WORD_BITS and not _copied(served, m, tp):
            found.append(f"{m.name}: {side} / {tp} codes of {m.stored.bits} bits")
    return found


def blocks(served: Served, tp: int) -> list[str]:
    """Block-scaled matrices of which a device would get a part of a block. On one device too: members of a fused matrix
    that end inside a block and are not its last."""
    last = {group[-1].name for group in served.groups}
    merged = {m.name for group in served.groups for m in group}
    found = []
    for m in served.quantized:
        if m.stored is None or m.stored.group_rows <= 1:
            continue
        cut = m.cut
        tall, wide = m.rows, m.columns
        if cut == "columns" and tp > 1 and wide % tp == 0 and wide // tp % m.stored.group_columns:
            found.append(f"{m.name}: {wide} / {tp} columns in blocks of {m.stored.group_columns}")
        if cut == "rows" and tp > 1 and tall % tp == 0 and not _copied(served, m, tp):
            if tall // tp % m.stored.group_rows:
                found.append(f"{m.name}: {tall} / {tp} rows in blocks of {m.stored.group_rows}")
        elif m.name in merged and m.name not in last and tall % m.stored.group_rows:
            found.append(f"{m.name}: {tall} rows in blocks of {m.stored.group_rows}")
    return found


def _cut(served: Served, cut: Cut) -> Iterator[Module]:
    return (m for m in served.modules.values() if m.cut == cut and m.role in ("linear", "small", "mtp"))


def _copied(served: Served, m: Module, tp: int) -> bool:
    """Key and value heads that are fewer than devices are copied to several of them, not cut further."""
    text = served.config.get("text_config")
    kv = {**(text if isinstance(text, dict) else {}), **served.config}.get("num_key_value_heads")
    return m.segment in ("k_proj", "v_proj", "wk", "wv") and isinstance(kv, int) and kv < tp
