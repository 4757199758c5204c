"""Scheme by scheme: shardq beside auto-round's model-free mode and llm-compressor's model_free_ptq, CPU time of whole
runs on one checkpoint. See README.md here.

Usage: python bench/peers.py --auto-round VENV --llm-compressor VENV [--gb 0.2] [--checkpoint FOLDER]
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from checkpoints import write_qwen3
from process_tree import measure_again

from kernels import FP4

# What shardq is asked for, and what the peers call it; an empty name: they do not have it in this mode.
ROWS: Final = (
    ("W4A16@auto_round", "W4A16", ""),
    ("W4A16@compressed-tensors", "", "W4A16"),
    ("W8A8@compressed-tensors", "", "W8A8"),
    ("FP8_DYNAMIC@compressed-tensors", "", "FP8_DYNAMIC"),
    ("FP8_BLOCK@compressed-tensors", "", "FP8_BLOCK"),
    ("MXFP4@auto_round", "MXFP4", ""),
    ("MXFP8@auto_round", "MXFP8", ""),
    ("MXFP4A16@compressed-tensors", "", "MXFP4A16"),
    (f"{FP4}@compressed-tensors", "", FP4),
)
COMPRESSOR: Final = """
import sys
from llmcompressor import model_free_ptq
model_free_ptq(sys.argv[1], sys.argv[3], scheme=sys.argv[2], ignore=["lm_head", "re:.*embed.*"], device="cpu")
"""
PEER_ENV: Final = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to make an output folder, whose path comes last in the command."""

    name: str
    command: tuple[str, ...]
    reps: int


def main() -> None:
    """Run every row with every tool that has it, and print CPU-seconds per GB and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.2, help="size of the checkpoint to make, in 1e9 bytes")
    parser.add_argument("--checkpoint", type=Path, help="an existing checkpoint to use in its place")
    parser.add_argument("--reps", type=int, default=3, help="of shardq; the peers run once")
    parser.add_argument("--auto-round", type=Path, metavar="VENV", help="virtual environment that has auto-round")
    parser.add_argument("--llm-compressor", type=Path, metavar="VENV", help="virtual environment that has it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shardq-bench-") as temporary:
        work = Path(temporary)
        source = args.checkpoint or write_qwen3(work / "source", args.gb)
        source_bytes = sum(p.stat().st_size for p in source.glob("*.safetensors"))
        print(f"{source_bytes / 1e9:.3f} GB, {os.cpu_count()} cores; CPU-seconds per GB, whole runs with start-up")
        print("| output | shardq | auto-round | llm-compressor | ratio |\n| --- | --- | --- | --- | --- |")
        for row in ROWS:
            found = {
                c.name: _run(c, source_bytes, work)
                for c in _contenders(row, source, args.auto_round, args.llm_compressor, args.reps)
            }
            own = found["shardq"]
            peers = [found.get(name) for name in ("auto-round", "llm-compressor")]
            cells = [row[0], f"{own:.2f}", *("" if p is None else f"{p:.1f}" for p in peers)]
            ratios = " ".join(f"{p / own:.0f}" for p in peers if p is not None)
            print("| " + " | ".join([*cells, ratios]) + " |", flush=True)


def _contenders(
    row: tuple[str, str, str], source: Path, auto_round: Path | None, compressor: Path | None, reps: int
) -> Iterator[Contender]:
    ours, theirs, others = row
    quantize = (sys.executable, "-P", "-m", "shardq.cli", "quantize", str(source), "-q", "--scheme", ours)
    yield Contender("shardq", (*quantize, "--parallel", "2", "-o"), reps)
    if auto_round and theirs:
        command = (
            str(auto_round / "bin" / "auto-round"), "--model_free", "--model", str(source), "--scheme", theirs,
            "--format", "auto_round", "--device_map", "cpu", "--disable_torch_compile", "--disable_opt_rtn",
            "--output_dir",
        )  # fmt: skip
        yield Contender("auto-round", command, 1)
    if compressor and others:
        command = (str(compressor / "bin" / "python"), "-c", COMPRESSOR, str(source), others)
        yield Contender("llm-compressor", command, 1)


def _run(contender: Contender, source_bytes: int, work: Path) -> float:
    """Median CPU-seconds per GB of source."""
    seconds: list[float] = []
    out = work / "out"
    for _ in range(contender.reps):
        seconds.append(measure_again((*contender.command, str(out)), out, PEER_ENV, work / "log").cpu_s)
        shutil.rmtree(out)
    return statistics.median(seconds) / source_bytes * 1e9


if __name__ == "__main__":
    main()
