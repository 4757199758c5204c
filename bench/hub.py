"""shardq from a Hub on loopback, staged and streamed, beside the same checkpoint in a folder: CPU time and memory.

Usage: python bench/hub.py [--gb 1.3] [--reps 3] [--checkpoint FOLDER] [--parallel 2] [--json FILE]

The Hub is the tests' own, in another process whose time does not count; without TLS.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from checkpoints import write_qwen3
from process_tree import Measured, measure_again

FAKE_HUB: Final = Path(__file__).parents[1] / "tests" / "sources" / "fake_hub.py"
REPO: Final = "bench/model"
HEADINGS: Final = ("run", "n", "wall s", "CPU s", "CPU s/GB", "RSS MB", "anon+shmem MB")


def main() -> None:
    """Run every way in turn, `--reps` times, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.3, help="size of the checkpoint to make, in 1e9 bytes")
    parser.add_argument("--checkpoint", type=Path, help="an existing checkpoint to use in its place")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write every single figure to this file")
    parser.add_argument("--serve", type=Path, metavar="FOLDER", help="only be the Hub, until the end of stdin")
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    with tempfile.TemporaryDirectory(prefix="shardq-bench-") as temporary:
        work = Path(temporary)
        source = args.checkpoint or write_qwen3(work / f"qwen3-{args.gb:g}gb", args.gb)
        gigabytes = sum(p.stat().st_size for p in source.glob("*.safetensors")) / 1e9
        print(f"{gigabytes:.3f} GB in {len(list(source.glob('*.safetensors')))} shards, {os.cpu_count()} cores")
        serve_it = [sys.executable, __file__, "--serve", str(source)]
        with subprocess.Popen(serve_it, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            found = _race(source, server.stdout.readline().strip(), work, args, server.pid)
            server.communicate()
    _print_table(found, gigabytes)
    if args.json:
        runs = {name: [dataclasses.asdict(m) for m in ms] for name, ms in found.items()}
        args.json.write_text(json.dumps({"source_gb": gigabytes, "runs": runs}, indent=2))


def serve(folder: Path) -> None:
    """Be the Hub until stdin ends, after a line with its address."""
    spec = importlib.util.spec_from_file_location("fake_hub", FAKE_HUB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_hub"] = module
    spec.loader.exec_module(module)
    hub = module.FakeHub()
    repo = module.Repo()
    repo.commit({p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()})
    hub.repos[REPO] = repo
    print(hub.url, flush=True)
    sys.stdin.read()
    hub.close()


def _race(source: Path, url: str, work: Path, args: argparse.Namespace, server: int) -> dict[str, list[Measured]]:
    quantize = (sys.executable, "-P", "-m", "shardq.cli", "quantize", "-q", "--parallel", str(args.parallel))
    ways = {
        "folder": (str(source),),
        "Hub": (REPO,),
        "Hub --stream": (REPO, "--stream"),
    }
    env = {"HF_ENDPOINT": url, "HF_HOME": str(work / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    found: dict[str, list[Measured]] = {name: [] for name in ways}
    out = work / "out"
    for _ in range(args.reps):
        for name, words in ways.items():
            command = (*quantize, *words, "-o", str(out))
            found[name].append(measure_again(command, out, env, work / "log", [server]))
            shutil.rmtree(out)
            os.sync()
    return found


def _print_table(found: dict[str, list[Measured]], gigabytes: float) -> None:
    print("| " + " | ".join(HEADINGS) + " |")
    print("| " + " | ".join("---" for _ in HEADINGS) + " |")
    for name, ms in found.items():
        cpu_s = _median([m.cpu_s for m in ms])
        cells = [
            name, str(len(ms)), f"{_median([m.wall_s for m in ms]):.2f}", f"{cpu_s:.2f}", f"{cpu_s / gigabytes:.3f}",
            f"{_median([m.peak.rss_bytes for m in ms]) / 1e6:.0f}",
            f"{_median([m.peak.anon_shmem_bytes for m in ms]) / 1e6:.0f}",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |")


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main()
