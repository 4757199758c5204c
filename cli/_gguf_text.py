"""GGUF models as `shardq inspect` shows them."""

from typing import TYPE_CHECKING, Any

from shardq.cli._console import Console, print_json, print_pairs, print_section, show_bytes

if TYPE_CHECKING:
    from shardq.gguf_inspection import GgufInspection, InspectedModel


def show_gguf(console: Console, found: "GgufInspection") -> None:
    """A paragraph and a table for each model, or one JSON document."""
    if console.as_json:
        print_json(
            {
                "source": found.label,
                "commit": found.commit,
                "models": [_describe(m) for m in found.models],
                "warnings": list(found.warnings),
            }
        )
        return
    print_pairs([("source", found.label), ("commit", found.commit or "")])
    for m in found.models:
        files = "1 file" if m.parts == 1 else f"{m.files} of {m.parts} parts"
        print_section(
            (m.name, ""),
            [
                ("name", m.title or ""),
                ("architecture", m.architecture or "not told"),
                ("file type", m.file_type or "not told"),
                ("tensors", f"{m.tensors} in {files}, {show_bytes(m.size_bytes)}"),
                ("parameters", f"{m.parameters:,}"),
                ("bits per weight", f"{m.bits_per_weight:.3f}"),
            ],
        )
        print_section(("type", "tensors", "bytes"), ((t.type, t.tensors, t.size_bytes) for t in m.types))
    console.warn(found.warnings)


def _describe(m: "InspectedModel") -> dict[str, Any]:
    return {
        "name": m.name,
        "title": m.title,
        "architecture": m.architecture,
        "file_type": m.file_type,
        "files": m.files,
        "parts": m.parts,
        "tensors": m.tensors,
        "bytes": m.size_bytes,
        "parameters": m.parameters,
        "bits_per_weight": m.bits_per_weight,
        "types": {t.type: {"tensors": t.tensors, "bytes": t.size_bytes} for t in m.types},
    }
