"""Makes the golden files of this folder: `PYTHONPATH=.. python make_golden_gguf.py GGUF_SPLIT`, with the built tool of
llama.cpp.

Needs shardq and gguf==0.19.0. See PROVENANCE.md.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
from gguf_made import ALL_VALUES, CASES, MEGABYTES, SOME_TENSORS, SPLIT_BYTES, written_by_gguf

HERE = Path(__file__).parent


def main(tool: str) -> None:
    for name, (pairs, specs) in CASES.items():
        written_by_gguf(gguf, HERE / f"{name}.gguf", pairs, specs)
    written_by_gguf(gguf, HERE / "converter.gguf", ALL_VALUES, SOME_TENSORS, split_max_size=SPLIT_BYTES)
    types = {kind.name: [int(kind), *sizes] for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    (HERE / "ggml_types.json").write_text(json.dumps(types, indent=1) + "\n")
    (HERE / "gguf_split.json").write_text(json.dumps(split(tool), indent=1) + "\n")


def split(tool: str) -> dict[str, dict[str, dict[str, object]]]:
    """Options -> part -> its size and header."""
    found: dict[str, dict[str, dict[str, object]]] = {}
    for options in ("--split-max-size 1M", "--split-max-size 2M --no-tensor-first-split", "--split-max-size 5M"):
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder, "whole.gguf")
            written_by_gguf(gguf, whole, ALL_VALUES, MEGABYTES)
            subprocess.run([tool, *options.split(), whole, Path(folder, "part")], check=True, capture_output=True)
            found[options] = {
                path.name: {
                    "size_bytes": path.stat().st_size,
                    "header": path.read_bytes()[: gguf.GGUFReader(path).data_offset].hex(),
                }
                for path in sorted(Path(folder).glob("part*"))
            }
    return found


if __name__ == "__main__":
    main(sys.argv[1])
