"""GGUF files straight from a checkpoint beside llama.cpp's two steps, its converter and then its quantizer: time, CPU
time, memory, disk, and whether both wrote the same bytes. See README.md here.

Usage: python bench/gguf_files.py --peer PYTHON --llama-cpp FOLDER (--checkpoint FOLDER | --tokenizer FOLDER [--gb 2])
       [--types q4_k_m q8_0 ...] [--reps 3] [--peer-reps 1] [--json FILE]
"""

import argparse
import dataclasses
import filecmp
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from checkpoints import write_llama
from process_tree import Measured, measure_again
from tables import warm, work_folder

from shardq.gguf.file_types import find_file_type

HEADINGS: Final = (
    "type", "run", "n", "wall s", "CPU s", "CPU s/GB", "x shardq", "PSS MB", "anon+shmem MB", "written MB", "same",
)  # fmt: skip
QUANTIZE: Final = """
import ctypes, sys
import llama_cpp
number, threads, source, out = sys.argv[1:]
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype, parameters.nthread = int(number), int(threads)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters)))
"""
ENV: Final = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Runs:
    """One way to make one file, as often as it was run."""

    name: str
    measured: list[Measured] = field(default_factory=list)
    written_bytes: int = 0  # of files, those in between as well
    same: str = ""

    def median(self, figure: Callable[[Measured], float]) -> float:
        """Of a figure of its runs."""
        return statistics.median(figure(m) for m in self.measured)


@dataclass(frozen=True, slots=True)
class Bench:
    """What all runs have in common."""

    source: Path
    work: Path
    peer: Path
    llama_cpp: Path
    parallel: int

    def run(self, command: Sequence[str], out: Path) -> Measured:
        """With the source in the page cache."""
        warm(self.source)
        measured = measure_again((*command, str(out)), out, ENV, self.work / "log")
        os.sync()
        return measured

    def convert(self, out: Path) -> Measured:
        """The whole checkpoint as one BF16 file."""
        script = str(self.llama_cpp / "convert_hf_to_gguf.py")
        return self.run((str(self.peer), script, str(self.source), "--outtype", "bf16", "--outfile"), out)

    def quantize(self, whole: Path, name: str, out: Path) -> Measured:
        """That file as one of another type."""
        kind = find_file_type(name)
        assert kind, name
        return self.run((str(self.peer), "-c", QUANTIZE, str(kind.number), str(self.parallel), str(whole)), out)

    def shardq(self, name: str, out: Path) -> Measured:
        """The checkpoint as a file of that type."""
        words = (sys.executable, "-P", "-m", "shardq.cli", "quantize", str(self.source), "-q")
        return self.run((*words, "--scheme", f"gguf:{name}", "--parallel", str(self.parallel), "-o"), out)


def main() -> None:
    """Run both in turn for every type, and print medians."""
    args = _parse()
    with work_folder(args.work) as work:
        source = args.checkpoint or write_llama(work / f"llama-{args.gb:g}gb", args.gb, args.tokenizer)
        size = sum(p.stat().st_size for p in source.glob("*.safetensors"))
        bench = Bench(source, work, args.peer, args.llama_cpp, args.parallel)
        print(f"{size / 1e9:.3f} GB in {len(list(source.glob('*.safetensors')))} shards, {os.cpu_count()} cores")
        print("| " + " | ".join(HEADINGS) + " |\n| " + " | ".join("---" for _ in HEADINGS) + " |")
        found = {}
        for name in args.types:
            found[name] = _race(bench, name, args.reps, args.peer_reps)
            _print_rows(name, found[name], size / 1e9)
    if args.json:
        figures = {name: [dataclasses.asdict(run) for run in runs] for name, runs in found.items()}
        args.json.write_text(json.dumps({"source_bytes": size, "types": figures}, indent=2))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer", type=Path, required=True, help="python that has llama-cpp-python and what its converter needs"
    )
    parser.add_argument(
        "--llama-cpp", type=Path, required=True, help="folder of the same version's convert_hf_to_gguf.py"
    )
    parser.add_argument("--checkpoint", type=Path, help="an existing checkpoint")
    parser.add_argument("--tokenizer", type=Path, help="a checkpoint whose tokenizer a made one gets")
    parser.add_argument("--gb", type=float, default=2, help="size of the checkpoint to make, in 1e9 bytes")
    parser.add_argument("--types", nargs="+", default=["q4_k_m"], help="file types, as behind gguf:")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--peer-reps", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=2, help="workers of shardq, threads of the quantizer")
    parser.add_argument("--work", type=Path, help="folder for checkpoint and outputs; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write every single figure to this file")
    args = parser.parse_args()
    if not (args.checkpoint or args.tokenizer):
        parser.error("give --checkpoint, or --tokenizer for one that is made")
    return args


def _race(bench: Bench, name: str, reps: int, peer_reps: int) -> list[Runs]:
    """Both in turn, so that a change of the machine's mood meets them alike."""
    whole, theirs, ours = bench.work / "whole.gguf", bench.work / "theirs.gguf", bench.work / "ours"
    steps = [Runs(run) for run in ("shardq", "convert", "quantize")]
    mine, convert, quantize = steps
    same = True
    sizes = (0, 0, 0)
    for rep in range(max(reps, peer_reps)):
        if rep < peer_reps:
            convert.measured.append(bench.convert(whole))
            quantize.measured.append(bench.quantize(whole, name, theirs))
            whole_bytes = whole.stat().st_size
            whole.unlink()
        if rep < reps:
            mine.measured.append(bench.shardq(name, ours))
            (made,) = ours.glob("*.gguf")
            same &= filecmp.cmp(made, theirs, shallow=False)
            sizes = (sum(p.stat().st_size for p in ours.iterdir()), whole_bytes, theirs.stat().st_size)
            shutil.rmtree(ours)
    theirs.unlink()
    told = ("yes" if same else "NO", "", "")
    return [dataclasses.replace(s, written_bytes=n, same=t) for s, n, t in zip(steps, sizes, told, strict=True)]


def _print_rows(name: str, steps: Sequence[Runs], gigabytes: float) -> None:
    """One for shardq, one for each of the two steps, one for both."""
    rows = [_figures(run) for run in steps]
    both = [a + b for a, b in zip(rows[1][:2], rows[2][:2], strict=True)]
    peaks = [max(a, b) for a, b in zip(rows[1][2:4], rows[2][2:4], strict=True)]
    rows.append([*both, *peaks, rows[1][4] + rows[2][4]])
    names = [*(s.name for s in steps), "both steps"]
    for run, row in zip(names, rows, strict=True):
        wall_s, cpu_s, pss, anon, written = row
        counts = [len(s.measured) for s in steps if s.name == run] or [len(steps[1].measured)]
        cells = [
            name, run, str(counts[0]), f"{wall_s:.2f}", f"{cpu_s:.2f}", f"{cpu_s / gigabytes:.2f}",
            f"{cpu_s / rows[0][1]:.2f}", f"{pss / 1e6:.0f}", f"{anon / 1e6:.0f}", f"{written / 1e6:.0f}",
            steps[0].same if run == "shardq" else "",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)


def _figures(run: Runs) -> list[float]:
    return [
        run.median(lambda m: m.wall_s),
        run.median(lambda m: m.cpu_s),
        run.median(lambda m: m.peak.pss_bytes),
        run.median(lambda m: m.peak.anon_shmem_bytes),
        run.written_bytes,
    ]


if __name__ == "__main__":
    main()
