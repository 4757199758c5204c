"""shardq beside `cp -r` of the same checkpoint, and beside auto-round: time, CPU time, memory. See README.md here.

Usage: python bench/pipeline.py [--gb 2.7] [--reps 3] [--checkpoint FOLDER] [--source fp8] [--auto-round VENV]
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from checkpoints import write_qwen3
from process_tree import Measured, measure_again
from tables import warm, work_folder

QUANTIZE: Final = (sys.executable, "-P", "-m", "shardq.cli", "quantize")
HEADINGS: Final = ("run", "n", "wall s", "x cp", "CPU s", "CPU s/GB", "RSS MB", "PSS MB", "anon+shmem MB", "output GB")


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to make an output folder."""

    name: str
    command: tuple[str, ...]  # the output folder's path comes last
    env: Mapping[str, str]
    reps: int


def main() -> None:
    """Run every contender in turn, `--reps` times, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.7, help="size of the checkpoint to make, in 1e9 bytes")
    parser.add_argument("--checkpoint", type=Path, help="an existing checkpoint to use in its place")
    parser.add_argument("--source", choices=["bf16", "fp8"], default="bf16", help="fp8: quantize it to FP8_BLOCK first")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--parallel", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--auto-round", type=Path, metavar="VENV", help="virtual environment that has auto-round")
    parser.add_argument("--auto-round-reps", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder for checkpoint and outputs; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write every single figure to this file")
    args = parser.parse_args()
    with work_folder(args.work) as work:
        source = args.checkpoint or write_qwen3(work / f"qwen3-{args.gb:g}gb", args.gb)
        if args.source == "fp8":
            source = _in_fp8(source, work / f"{source.name}-fp8")
        contenders = list(_contenders(source, args.scheme, args.parallel, args.reps))
        if args.auto_round:
            contenders.append(_auto_round(args.auto_round, source, args.scheme, args.auto_round_reps))
        gigabytes = sum(p.stat().st_size for p in source.glob("*.safetensors")) / 1e9
        print(f"{gigabytes:.3f} GB in {len(list(source.glob('*.safetensors')))} shards, {os.cpu_count()} cores")
        found, outputs = _race(contenders, source, work)
    _print_table(found, outputs, gigabytes)
    if args.json:
        runs = {name: [dataclasses.asdict(m) for m in ms] for name, ms in found.items()}
        args.json.write_text(json.dumps({"source_gb": gigabytes, "runs": runs, "output_bytes": outputs}, indent=2))


def _in_fp8(source: Path, folder: Path) -> Path:
    """The same checkpoint with FP8 weights and a scale for each block of 128 by 128. Reused if it exists."""
    if not (folder / "config.json").exists():
        subprocess.run([*QUANTIZE, str(source), "-q", "--scheme", "FP8_BLOCK", "-o", str(folder)], check=True)
        (folder / "README.md").unlink()  # reading a model card is a cost that other checkpoints do not have
    return folder


def _contenders(source: Path, scheme: str, parallel: Sequence[int], reps: int) -> list[Contender]:
    quantize = (*QUANTIZE, str(source), "-q", "--scheme", scheme)
    return [
        Contender("cp -r", ("cp", "-r", str(source)), {}, reps),
        *(Contender(f"shardq -j{n}", (*quantize, "--parallel", str(n), "-o"), {}, reps) for n in parallel),
    ]


def _auto_round(venv: Path, source: Path, scheme: str, reps: int) -> Contender:
    """Its model-free mode with the setting that is fastest on two cores: eager, two shards at a time, a thread each."""
    command = (
        str(venv / "bin" / "auto-round"), "--model_free", "--model", str(source), "--scheme", scheme,
        "--format", "auto_round", "--device_map", "cpu", "--disable_torch_compile", "--output_dir",
    )  # fmt: skip
    env = {
        "AR_MODEL_FREE_SHARD_PARALLELISM": "2", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    return Contender("auto-round -j2", command, env, reps)


def _race(
    contenders: Sequence[Contender], source: Path, work: Path
) -> tuple[dict[str, list[Measured]], dict[str, int]]:
    """Interleaved, so that a change of the machine's mood meets all alike; the source is in the page cache for all."""
    found: dict[str, list[Measured]] = {c.name: [] for c in contenders}
    outputs: dict[str, int] = {}
    out = work / "out"
    for rep in range(max(c.reps for c in contenders)):
        for c in (c for c in contenders if rep < c.reps):
            warm(source)
            found[c.name].append(measure_again((*c.command, str(out)), out, c.env, work / "log"))
            outputs[c.name] = sum(p.stat().st_size for p in out.rglob("*.safetensors"))
            shutil.rmtree(out)
            os.sync()
    return found, outputs


def _print_table(found: Mapping[str, Sequence[Measured]], outputs: Mapping[str, int], gigabytes: float) -> None:
    cp_s = _median(found["cp -r"], lambda m: m.wall_s)
    print("| " + " | ".join(HEADINGS) + " |")
    print("| " + " | ".join("---" for _ in HEADINGS) + " |")
    for name, ms in found.items():
        wall_s, cpu_s = _median(ms, lambda m: m.wall_s), _median(ms, lambda m: m.cpu_s)
        cells = [
            name, str(len(ms)), f"{wall_s:.2f}", f"{wall_s / cp_s:.2f}", f"{cpu_s:.2f}", f"{cpu_s / gigabytes:.3f}",
            f"{_median(ms, lambda m: m.peak.rss_bytes) / 1e6:.0f}",
            f"{_median(ms, lambda m: m.peak.pss_bytes) / 1e6:.0f}",
            f"{_median(ms, lambda m: m.peak.anon_shmem_bytes) / 1e6:.0f}",
            f"{outputs[name] / 1e9:.3f}",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |")


def _median(ms: Sequence[Measured], figure: Callable[[Measured], float]) -> float:
    return statistics.median(figure(m) for m in ms)


if __name__ == "__main__":
    main()
