"""Several outputs from one read, beside each of them alone, in CPU time. See README.md.

python bench/many.py [--checkpoint DIR | --gb N] [--parallel N] [--reps N] [--json FILE]
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from checkpoints import write_qwen3
from process_tree import Measured, measure

from kernels import FP4

SCHEMES: Final = ("W4A16@gptq", "MXFP4", "W4A16@awq", FP4)
BAR: Final = 1.6  # of the dearest alone, besides writing and hashing all outputs
TOGETHER: Final = "together"
WRITES: Final = "all outputs, only written and hashed"
WRITE: Final = """
import hashlib, os, sys
block = os.urandom(8 << 20)
for number, size in enumerate(map(int, sys.argv[2:])):
    digest = hashlib.sha256()
    fd = os.open(os.path.join(sys.argv[1], str(number)), os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, size)
    for at in range(0, size, len(block)):
        part = memoryview(block)[: min(len(block), size - at)]
        os.pwrite(fd, part, at)
        digest.update(part)
    os.fsync(fd)
    os.close(fd)
"""


def main() -> None:
    """Measure, and print a table and the ratio."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--checkpoint", type=Path)
    options.add_argument("--gb", type=float, default=2.7)
    options.add_argument("--parallel", type=int, default=1)
    options.add_argument("--reps", type=int, default=1)
    options.add_argument("--schemes", nargs="+", default=SCHEMES)
    options.add_argument("--json", type=Path)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as work:
        source = args.checkpoint or write_qwen3(Path(work) / "source", args.gb)
        found, sizes = _race(source, args.schemes, args.parallel, args.reps, Path(work))
    gigabytes = sum(p.stat().st_size for p in source.glob("*.safetensors")) / 1e9 if args.checkpoint else args.gb
    print("| what | CPU s | CPU s/GB | wall s | output GB |\n| --- | --- | --- | --- | --- |")
    for name, ms in found.items():
        out = sum(sizes[name]) if name in sizes else sum(map(sum, sizes.values()))
        wall_s = statistics.median(m.wall_s for m in ms)
        print(f"| {name} | {_cpu_s(ms):.2f} | {_cpu_s(ms) / gigabytes:.3f} | {wall_s:.2f} | {out / 1e9:.3f} |")
    dearest = max(args.schemes, key=lambda s: _cpu_s(found[s]))
    writes_s, dearest_s = _cpu_s(found[WRITES]), _cpu_s(found[dearest])
    own_s = writes_s * sum(sizes[dearest]) / sum(map(sum, sizes.values()))
    less_s = _cpu_s(found[TOGETHER]) - writes_s
    print(f"\ntogether, less its writes: {less_s / dearest_s:.2f} of {dearest} alone with its own (bar: {BAR}), "
          f"{less_s / (dearest_s - own_s):.2f} of it without them; "
          f"of all alone: {_cpu_s(found[TOGETHER]) / sum(_cpu_s(found[s]) for s in args.schemes):.2f}")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({n: [asdict(m) for m in ms] for n, ms in found.items()}, indent=2))


def _race(
    source: Path, schemes: Sequence[str], parallel: int, reps: int, work: Path
) -> tuple[dict[str, list[Measured]], dict[str, list[int]]]:
    """Interleaved, so that a change of the machine's mood meets all alike. Also the sizes of each output's shards."""
    quantize = (sys.executable, "-P", "-m", "shardq.cli", "quantize", str(source), "-q", "--parallel", str(parallel))
    chosen = {s: ("--scheme", s) for s in schemes}
    chosen[TOGETHER] = tuple(w for s in schemes for w in ("--scheme", s))
    found: dict[str, list[Measured]] = {name: [] for name in chosen}
    sizes: dict[str, list[int]] = {}
    for _ in range(reps):
        for name, words in chosen.items():
            subprocess.run(["cat", *source.glob("*.safetensors")], stdout=subprocess.DEVNULL, check=True)  # warm
            out = work / "out"
            found[name].append(measure((*quantize, *words, "-o", str(out)), {}, work / "log"))
            if name != TOGETHER:
                sizes[name] = [p.stat().st_size for p in out.rglob("*.safetensors")]
            shutil.rmtree(out)
        found.setdefault(WRITES, []).append(_write([s for own in sizes.values() for s in own], work))
    return found, sizes


def _write(sizes: Sequence[int], work: Path) -> Measured:
    """Files of these sizes, written and hashed by nothing else than that."""
    out = work / "written"
    out.mkdir()
    measured = measure((sys.executable, "-c", WRITE, str(out), *map(str, sizes)), {}, work / "log")
    shutil.rmtree(out)
    return measured


def _cpu_s(ms: Sequence[Measured]) -> float:
    return statistics.median(m.cpu_s for m in ms)


if __name__ == "__main__":
    main()
