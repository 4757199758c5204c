"""What llama.cpp makes of the checkpoints of gguf_files_made, as digests.

LLAMA_CPP=... PYTHONPATH=../../unit:../../oracles python make_golden_gguf_files.py [CASE...]
"""

import json
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import gguf_files_made as made
import gguf_peer as peer

from shardq.files.gguf_read import read_gguf

HERE = Path(__file__).parent
DIGITS = 16  # of the digest of a tensor; a whole file has all 64


def summary(path: Path, tensors: dict[str, dict[str, str]]) -> dict[str, str]:
    """A file's digests; those of its tensors, by type, go into `tensors`."""
    data, header = path.read_bytes(), read_gguf(path)
    for tensor in header.tensors:
        found = sha256(data[tensor.begin : tensor.end]).hexdigest()[:DIGITS]
        known = tensors.setdefault(tensor.name, {}).setdefault(tensor.type, found)
        if found != known:
            tensors[tensor.name][f"{tensor.type} {path.stem}"] = found
    return {
        "file": sha256(data).hexdigest(),
        "header": sha256(data[: header.header_bytes_len]).hexdigest()[:DIGITS],
        "types": " ".join(tensor.type for tensor in header.tensors),
    }


def words(row: made.Wanted, whole: Path) -> dict[str, Any]:
    """What the quantizer is told."""
    own = {key: getattr(row, key) for key in ("pure", "output_type", "embedding_type", "overrides", "requantize")}
    if row.imatrix:
        shapes = {tensor.name: tensor.shape[::-1] for tensor in read_gguf(whole).tensors}
        own["imatrix"] = made.divided(made.importance(shapes), row.imatrix)
    return own


def main(*names: str) -> None:
    for name in names or made.FILES:
        files: dict[str, Any] = {}
        tensors: dict[str, dict[str, str]] = {}
        with tempfile.TemporaryDirectory() as parent:
            folder = made.write(made.FILES[name], Path(parent))
            whole = peer.convert(folder, Path(parent, "whole.gguf"), made.FILES[name].case.pre)
            for row in made.wanted(name):
                out = Path(parent, f"{row.name}.gguf")
                try:
                    peer.quantize(whole, out, peer.FILE_TYPES[row.file_type], **words(row, whole))
                except RuntimeError as error:
                    files[row.name] = {"refused": str(error).splitlines()[-1].split(": ", 1)[-1]}
                    continue
                files[row.name] = summary(out, tensors)
                out.unlink()
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in files.items()]
        rows = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in tensors.items()]
        text = '{"files": {\n' + ",\n".join(lines) + '\n}, "tensors": {\n' + ",\n".join(rows) + "\n}}\n"
        (HERE / f"{name}.json").write_text(text, encoding="utf-8")
        print(name, {key: value["refused"] for key, value in files.items() if "refused" in value})


if __name__ == "__main__":
    main(*sys.argv[1:])
