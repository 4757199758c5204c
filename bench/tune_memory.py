"""Peak memory of tuning a checkpoint block by block, against its imports alone and the size of a block, and that of
auto-round on the same checkpoint and texts. See README.md here.

Usage: python bench/tune_memory.py --tokenizer FOLDER [--auto-round VENV] [--gb 3] [--json FILE]
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from checkpoints import write_llama
from process_tree import Measured, measure

TEXT: Final = Path(__file__).parent / "texts" / "calibration.txt"
SAMPLES, TOKENS, SAMPLE_CHARACTERS = 8, 128, 1500
CAP_BYTES: Final = 2 << 30  # that each process of ours may write to; of address space torch takes more
IMPORTS: Final = "import shardq.tune.driver, shardq.tune.blocks, transformers.models.llama.modeling_llama"
DATA: Final = ("--nsamples", str(SAMPLES), "--seqlen", str(TOKENS))
OURS: Final[Mapping[str, tuple[str, ...]]] = {
    "opt-rtn": ("--algorithm", "opt-rtn"),
    "gptq": ("--algorithm", "gptq"),
    "awq": ("--algorithm", "awq"),
    "signround": ("--algorithm", "signround", "--iters", "2", "--batch-size", str(SAMPLES)),
}
# What a block and activations take without any tuning: of a batch, with the way back, or of samples one by one.
PASS: Final = """
import sys
from shardq.tune.freeing import return_freed_memory
return_freed_memory()
import torch
from shardq.sources import open_source
from shardq.tune.blocks import BlockModel
source, dtype, samples, tokens, back = sys.argv[1:6]
with BlockModel.open(open_source(source), dtype=getattr(torch, dtype)) as model:
    batch = model.embed(torch.arange(int(samples) * int(tokens)).reshape(int(samples), -1))
    with model.block(0) as block:
        if back == "back":
            made = model.run(block, batch.moved(batch.hidden.clone().requires_grad_()), 0)
            (made.float() - batch.hidden.float()).square().mean().backward()
        else:
            model.advance(block, batch, 0)
"""
PASSES: Final[Mapping[str, tuple[str, str, int]]] = {  # type, way, and blocks that the weights are
    "signround": ("bfloat16", "back", 1),
    "others": ("float32", "forward", 2),
}
PEER: Final[Mapping[str, tuple[str, ...]]] = {
    "opt-rtn": ("--iters", "0", "--disable_opt_rtn", "--disable_model_free"),  # its search takes minutes for a block
    "signround": ("--iters", "2", "--batch_size", str(SAMPLES)),
}
PEER_ENV: Final = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, slots=True)
class Contender:
    """One run, whose output folder comes last in its command."""

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    cap_bytes: int | None
    passing: str = ""  # of PASSES, the one whose activations it has


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a checkpoint whose tokenizer is taken")
    parser.add_argument("--gb", type=float, default=3.0, help="size of the checkpoint to make, in 1e9 bytes")
    parser.add_argument("--algorithms", nargs="+", choices=list(OURS), default=list(OURS))
    parser.add_argument("--auto-round", type=Path, metavar="VENV", help="virtual environment that has auto-round")
    parser.add_argument("--work", type=Path, help="folder for the checkpoint and outputs; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shardq-bench-", dir=args.work) as temporary:
        work = Path(temporary)
        source, texts = write_llama((args.work or work) / "source", args.gb, args.tokenizer), _write_texts(work)
        block_bytes, all_bytes = _sizes(source)
        print(f"{all_bytes / 1e9:.3f} GB, blocks of {block_bytes / 1e6:.1f} MB; {SAMPLES} samples of {TOKENS} tokens")
        print(
            "| run | wall s | CPU s | RSS MB | PSS MB | anon+shmem MB | largest process MB | above imports, in blocks "
            "| and activations |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        found: dict[str, Measured] = {}
        for c in _contenders(source, texts, args.algorithms, args.auto_round):
            found[c.name] = _run(c, work)
            _print(c, found, block_bytes)
    if args.json:
        args.json.write_text(json.dumps({name: dataclasses.asdict(m) for name, m in found.items()}, indent=2))


def _contenders(source: Path, texts: Path, algorithms: Sequence[str], peer: Path | None) -> Iterator[Contender]:
    """The imports alone come first."""
    yield Contender("imports", (sys.executable, "-P", "-c", IMPORTS), {}, CAP_BYTES)
    for name in ("signround",) * ("signround" in algorithms) + ("others",) * (set(algorithms) != {"signround"}):
        dtype, way, _ = PASSES[name]
        words = (str(source), dtype, str(SAMPLES), str(TOKENS), way)
        yield Contender(_pass_name(name), (sys.executable, "-P", "-c", PASS, *words), {}, CAP_BYTES)
    tune = (sys.executable, "-P", "-m", "shardq.cli", "tune", str(source), "-q", "--scheme", "W4A16", *DATA)
    for name in algorithms:
        command = (*tune, "--dataset", str(texts), "--parallel", "1", *OURS[name], "-o")
        yield Contender(f"shardq {name}", command, {}, CAP_BYTES, name if name in PASSES else "others")
    for name in (n for n in algorithms if peer and n in PEER):
        command = (
            str(peer) + "/bin/auto-round", "--model", str(source), "--scheme", "W4A16", "--format", "auto_round", *DATA,
            "--dataset", str(texts), "--device_map", "cpu", "--disable_torch_compile", *PEER[name], "--output_dir",
        )  # fmt: skip
        yield Contender(f"auto-round {name}", command, PEER_ENV, None)


def _run(contender: Contender, work: Path) -> Measured:
    with tempfile.TemporaryDirectory(dir=work) as here:
        command, log = (*contender.command, f"{here}/out"), Path(here, "log")
        return measure(command, contender.env, log, cap_bytes=contender.cap_bytes)


def _pass_name(name: str) -> str:
    return f"no tuning, activations of {name}"


def _print(contender: Contender, found: Mapping[str, Measured], block_bytes: int) -> None:
    run, imports = found[contender.name], next(iter(found.values()))
    above = (run.peak.largest_bytes - imports.peak.largest_bytes) / block_bytes
    left = ""
    if contender.passing:
        passed = found[_pass_name(contender.passing)]
        activations = (passed.peak.largest_bytes - imports.peak.largest_bytes) / block_bytes
        left = f"{above - activations + PASSES[contender.passing][2]:.1f}"
    peak = run.peak
    sizes = (peak.rss_bytes, peak.pss_bytes, peak.anon_shmem_bytes, peak.largest_bytes)
    cells = " | ".join(f"{b / 1e6:.0f}" for b in sizes)
    print(f"| {contender.name} | {run.wall_s:.0f} | {run.cpu_s:.0f} | {cells} | {above:.1f} | {left} |", flush=True)


def _write_texts(work: Path) -> Path:
    """As many texts as samples, each of more tokens than a sample has, in a form that both read."""
    text, path = TEXT.read_text(), work / "texts.jsonl"
    parts = (text[at : at + SAMPLE_CHARACTERS] for at in range(0, SAMPLES * SAMPLE_CHARACTERS, SAMPLE_CHARACTERS))
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    return path


def _sizes(source: Path) -> tuple[int, int]:
    """Bytes of a block, and of all weights."""
    config = json.loads((source / "config.json").read_text())
    all_bytes = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    ends = 2 * 2 * config["vocab_size"] * config["hidden_size"]
    return (all_bytes - ends) // config["num_hidden_layers"], all_bytes


if __name__ == "__main__":
    main()
