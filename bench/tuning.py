"""What tuning is worth, and what it takes: SmolLM2-135M off its grid, tuned block by block, beside auto-round's own way
through the whole model. See README.md here.

python bench/tuning.py [--auto-round VENV] [--only SETTING ...] [--ways WAY ...] [--seed N] [--work FOLDER]
                       [--json FILE]

It needs what bench/quality.py needs, and judges as it does. Data, seed and steps are the same for both; one thread.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from process_tree import Measured, measure
from quality import ENV, SHARDQ, Judge
from smollm2 import make_smollm2
from tables import print_rows, work_folder

HERE: Final = Path(__file__).parent
SAMPLE_CHARACTERS: Final = 1200  # some 300 tokens: no sample is too short
SIGNROUND: Final = ("--iters", "20", "--nsamples", "16", "--seqlen", "256", "--batch-size", "4")
BAR_RATIO: Final = 1.03  # of KL to auto-round's
RTN: Final = "RTN"
TEXT: Final = "text"  # stands for the file of samples


@dataclass(frozen=True, slots=True)
class Setting:
    """A scheme in a layout, what tunes it, and the KL that it may have at the most."""

    scheme: tuple[str, ...]
    peer: tuple[str, ...]  # of auto-round; empty: it does not take part
    ways: Mapping[str, tuple[str, ...]]  # options of `shardq tune` by what the table calls them
    bars: Mapping[str, float]  # largest ratio to round-to-nearest's KL
    packed: bool = False  # `shardq dequantize` makes weights of it


LEARNED: Final = {"signround": ("--algorithm", "signround", "--dataset", TEXT, *SIGNROUND)}
GPTQ: Final = {
    "gptq, 4096 random ids": ("--algorithm", "gptq", "--dataset", "random", "--nsamples", "64", "--seqlen", "64"),
    "gptq, self": ("--algorithm", "gptq", "--dataset", "self", "--nsamples", "128", "--seqlen", "64"),
    "gptq, text": ("--algorithm", "gptq", "--dataset", TEXT, "--nsamples", "26", "--seqlen", "256"),
}
AWQ: Final = {
    "awq, 64 random ids": ("--algorithm", "awq", "--dataset", "random", "--nsamples", "1", "--seqlen", "64"),
    "awq, text": ("--algorithm", "awq", "--dataset", TEXT, "--nsamples", "26", "--seqlen", "256"),
}
# Ratios of the tables of section 5 of the reference: GPTQ .277, .183, .178 and AWQ .259, .233 beside .569; at 3 bits
# .934, .585, .570 and 1.060, .963 beside 1.982; at 2 bits, groups of 64, AWQ 5.32 beside 6.66; of 32, GPTQ 2.41, 1.73,
# 1.48 beside 4.72.
SETTINGS: Final[Mapping[str, Setting]] = {
    "W4G128": Setting(
        ("--scheme", "W4A16", "--format", "fake"), ("--scheme", "W4A16", "--format", "fake"),
        {**LEARNED, **GPTQ, **AWQ},
        dict(zip([*GPTQ, *AWQ], (0.487, 0.322, 0.313, 0.455, 0.409), strict=True)),
    ),
    "W2G64": Setting(
        ("--scheme", "W2A16G64", "--format", "fake"), ("--scheme", "W2A16G64", "--format", "fake"),
        {**LEARNED, **GPTQ, **AWQ}, {"awq, 64 random ids": 0.799},
    ),
    "W4G64 compressed-tensors": Setting(
        ("--scheme", "W4A16", "--group-size", "64", "--format", "compressed-tensors"),
        ("--scheme", "W4A16", "--group_size", "64", "--format", "llm_compressor"), LEARNED, {}, packed=True,
    ),
    "W3G128": Setting(
        ("--scheme", "W3A16", "--format", "fake"), (), {**GPTQ, **AWQ},
        dict(zip([*GPTQ, *AWQ], (0.471, 0.295, 0.288, 0.535, 0.486), strict=True)),
    ),
    "W2G32": Setting(
        ("--scheme", "W2A16G32", "--format", "fake"), (), GPTQ, dict(zip(GPTQ, (0.511, 0.367, 0.314), strict=True))
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    setting: str
    contender: str
    kl: float
    ppl: float
    ratio: float  # of KL to that of round-to-nearest
    cpu_s: float
    peak_bytes: int  # what cannot be dropped, of all processes


class Bench:
    """The source, the samples, and the judge."""

    def __init__(self, work: Path, auto_round: Path | None, seed: int, ways: Sequence[str]) -> None:
        self._work, self._auto_round, self._seed, self._ways = work, auto_round, str(seed), ways
        self._source = make_smollm2(work / "smollm2")
        self._samples = work / "samples.json"
        text = (HERE / "texts" / "calibration.txt").read_text(encoding="utf-8")
        parts = [text[i : i + SAMPLE_CHARACTERS] for i in range(0, len(text) - SAMPLE_CHARACTERS, SAMPLE_CHARACTERS)]
        self._samples.write_text(json.dumps([{"text": part} for part in parts]), encoding="utf-8")
        self._judge = Judge(self._source)

    def measure(self, name: str) -> Iterator[Row]:
        """All contenders of a setting, round-to-nearest first."""
        base = 0.0
        for contender, command in self._commands(SETTINGS[name]).items():
            with tempfile.TemporaryDirectory(dir=self._work) as temporary:
                out = Path(temporary, "out")
                took = measure([*command, str(out)], ENV, Path(temporary, "log"))
                row = self._row(name, contender, out, took, base)
            base = base or row.kl
            print(_line(row), flush=True)
            yield row

    def _commands(self, setting: Setting) -> dict[str, list[str]]:
        """What makes each; the folder to make is to be added."""
        source, samples = str(self._source), str(self._samples)
        found = {RTN: [*SHARDQ, "quantize", source, *setting.scheme, "--rtn", "--parallel", "1", "-o"]}
        for way, options in setting.ways.items():
            words = [samples if o == TEXT else o for o in (*options, "--seed", self._seed)]
            found[way] = [*SHARDQ, "tune", source, *setting.scheme, *words, "--parallel", "1", "-o"]
        if self._auto_round and setting.peer:
            words = ["--" + o[2:].replace("-", "_") if o.startswith("--") else o for o in SIGNROUND]
            words += ["--seed", self._seed]
            command = [str(self._auto_round / "bin" / "auto-round"), "--model", source, *setting.peer]
            command += ["--device_map", "cpu", "--disable_torch_compile", "--dataset", samples]
            found["auto-round"] = [*command, *words, "--output_dir"]
        return {way: command for way, command in found.items() if way == RTN or not self._ways or way in self._ways}

    def _row(self, name: str, contender: str, out: Path, took: Measured, base: float) -> Row:
        (config,) = out.rglob("config.json")  # auto-round makes a folder in the folder
        folder = config.parent
        if SETTINGS[name].packed:
            plain = out.with_name("plain")
            measure([*SHARDQ, "dequantize", str(folder), "-o", str(plain)], ENV, out.with_name("log"))
            folder = plain
        score = self._judge.score(folder, 0.0, 0.0)
        peak = took.peak.anon_shmem_bytes
        return Row(name, contender, score.kl, score.ppl, score.kl / base if base else 1.0, took.cpu_s, peak)


def _line(row: Row) -> str:
    figures = f"{row.kl:.3f} | {row.ratio:.3f} | {row.ppl:.0f} | {row.cpu_s:.0f} | {row.peak_bytes / 1e9:.2f}"
    return f"| {row.setting} | {row.contender} | {figures} |"


def judge_bars(rows: Sequence[Row]) -> Iterator[str]:
    """What misses its bar, and what stands beside auto-round."""
    for name in dict.fromkeys(row.setting for row in rows):
        own = {row.contender: row for row in rows if row.setting == name}
        for way, bar in SETTINGS[name].bars.items():
            if way in own and own[way].ratio > bar:
                yield f"{name}, {way}: {own[way].ratio:.3f} of round-to-nearest's KL, expected {bar} or less"
        if "auto-round" in own and "signround" in own:
            ours, theirs = own["signround"], own["auto-round"]
            kl, cpu = ours.kl / theirs.kl, ours.cpu_s / theirs.cpu_s
            verdict = "missed" if kl > BAR_RATIO or cpu > 1 else "met"
            yield f"{name}: KL {kl:.3f} of auto-round's, CPU time {cpu:.2f}; {BAR_RATIO} and 1: {verdict}"


def main() -> None:
    """All settings unless the command line chooses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--auto-round", type=Path, metavar="VENV", help="environment with auto-round 0.16.1")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--ways", nargs="+", default=[], metavar="WAY", help="of those in the table, beside RTN")
    parser.add_argument("--seed", type=int, default=42, help="of samples, and of what is sampled")
    parser.add_argument("--work", type=Path, help="keep the model here")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    columns = ("setting", "codes", "KL", "x RTN", "ppl", "CPU s", "peak GB")
    with work_folder(args.work) as work:
        bench = Bench(work, args.auto_round, args.seed, args.ways)
        print_rows(columns, args.only, bench.measure, judge_bars, args.json)


if __name__ == "__main__":
    sys.exit(main())
