"""Peak memory of a run against shard size and tensor size. See README.md here.

Usage: python bench/memory.py [--scale 1.0] [--json FILE]
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from checkpoints import write_plain
from process_tree import measure

WORKERS: Final = 2
TENSOR_BYTES: Final = 32 << 20
SHARD_MIB: Final = (128, 512, 2048)  # of tensors of 32 MiB
TENSOR_MIB: Final = (8, 64, 512, 2048)  # one to a shard, two shards


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the sizes; the largest needs 5 GB of disk")
    parser.add_argument("--work", type=Path, help="folder for checkpoints and outputs; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="shardq-bench-", dir=args.work) as work:
        print(f"{WORKERS} workers, W4A16\n")
        print("| shard MiB | tensor MiB | RSS MB | PSS MB | anon+shmem MB |\n| --- | --- | --- | --- | --- |")
        for mib in SHARD_MIB:
            size = int(mib * args.scale) << 20
            found[f"shard {size >> 20} MiB"] = _peak(Path(work), max(1, size // TENSOR_BYTES), TENSOR_BYTES)
        for mib in TENSOR_MIB:
            size = int(mib * args.scale) << 20
            found[f"tensor {size >> 20} MiB"] = _peak(Path(work), 1, size)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


def _peak(work: Path, tensors: int, tensor_bytes: int) -> dict[str, int]:
    """Peak of a run over two shards."""
    with tempfile.TemporaryDirectory(dir=work) as here:
        source = write_plain(Path(here, "model"), 2, tensors, tensor_bytes)
        quantize = (sys.executable, "-P", "-m", "shardq.cli", "quantize", str(source), "-q", "--parallel", str(WORKERS))
        peak = measure((*quantize, "-o", str(Path(here, "out"))), {}, Path(here, "log")).peak
    cells = (peak.rss_bytes, peak.pss_bytes, peak.anon_shmem_bytes)
    shard = tensors * tensor_bytes >> 20
    print(f"| {shard} | {tensor_bytes >> 20} | " + " | ".join(f"{c / 1e6:.0f}" for c in cells) + " |", flush=True)
    return dataclasses.asdict(peak)


if __name__ == "__main__":
    main()
