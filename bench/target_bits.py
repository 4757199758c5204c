"""What a mixture for a size is worth: KL of `--target-bits` beside uniform schemes of that size. See README.md here.

    python bench/target_bits.py [--only CASE ...] [--work FOLDER] [--json FILE]

The model, the text and the judge are those of quality.py, and so are the packages that it needs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from quality import HERE, IDS, RTN, Bench, Setting, run_bench

from shardq.cli._statistics import SUFFIX as STATISTICS
from shardq.cli._tuning import DAMAGES

BELOW: Final = 0.005  # of a target that the average may stay below it


@dataclass(frozen=True, slots=True)
class Case:
    """A target, what may be mixed for it, and uniform schemes of about that size."""

    target: float
    layout: tuple[str, ...]
    options: tuple[str, ...]
    uniform: tuple[str, ...]  # by size, around the target
    bar: float = 1.0  # largest ratio to KL of uniform quantization


INTEGERS: Final = ("W2A16G64", "W3A16G64", "W4A16G64", "W8A16G64")
AUTO_ROUND: Final = ("--format", "auto_round")
SINGLE: Final = ("--target", "transformers")  # no server that runs q, k and v as one, so that they may differ
MLX: Final = ("--format", "mlx", "--target", "mlx", "--ignore", "model.embed_tokens")
# In MLX a uniform scheme has just the size of the target; elsewhere the nearest ones lie on either side.
CASES: Final[Mapping[str, Case]] = {
    "fused 3.5": Case(3.5, AUTO_ROUND, INTEGERS, ("W3A16G64", "W3A16G32"), 0.8),
    "single 3.5": Case(3.5, (*AUTO_ROUND, *SINGLE), INTEGERS, ("W3A16G64", "W3A16G32"), 0.8),
    "MLX 3.5": Case(3.5, MLX, (*INTEGERS, "W3A16"), ("W3A16G64",), 0.8),  # groups of 128 where these divide columns
    "fused 4.5": Case(4.5, AUTO_ROUND, INTEGERS, ("W4A16G64", "W4A16G32")),
    "MLX 4.5": Case(4.5, MLX, INTEGERS, ("W4A16G64",)),
    "MX 5": Case(5.0, AUTO_ROUND, ("MXFP4", "MXFP8"), ("MXFP4", "MXFP8")),
}


TEXT: Final = str(HERE / "texts" / "calibration.txt")
NEAREST: Final = ("--algorithm", "rtn", "--nsamples", "16", "--seqlen", "256", "--dataset")
AUTO: Final = ("--search", "auto")
BY_SCORES, BY_IDS, BY_TEXT = "mixture", "mixture, random ids", "mixture, text"  # what a choice is made by


@dataclass(frozen=True, slots=True)
class Scales:
    """How all schemes of a part of the table get their scales."""

    uniform: tuple[str, ...]  # words of `quantize`
    mixtures: Mapping[str, tuple[str, ...]]  # row -> the command, and its words
    importance: Path | None = None  # lies beside each output already


def find_scales(bench: Bench) -> dict[str, Scales]:
    """All parts of the table."""
    ids = (*AUTO, "--importance", str(bench.ids[0]))
    text = (*AUTO, "--calibrate", TEXT)
    by_rtn = {
        BY_SCORES: ("quantize", "--search", "none"),
        BY_IDS: ("tune", *NEAREST, "random"),
        BY_TEXT: ("tune", *NEAREST, TEXT),
    }
    by_ids = {BY_SCORES: ("quantize", *ids), BY_IDS: ("quantize", *AUTO, "--calibrate", "random")}
    return {
        RTN: Scales(("--search", "none"), by_rtn),
        f"auto, {IDS} random ids": Scales(ids, by_ids, bench.ids[0]),
        "auto, text": Scales(text, {BY_TEXT: ("quantize", *text)}),
    }


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    case: str
    scales: str
    scheme: str
    bits: float  # written for a weight of a Linear layer
    kl: float
    ratio: float | None  # to a uniform scheme of as many bits; of mixtures alone


def compare(bench: Bench, name: str) -> list[Row]:
    """Uniform schemes and mixtures, by each kind of scales."""
    return [row for scales, way in find_scales(bench).items() for row in compare_scales(bench, name, scales, way)]


def compare_scales(bench: Bench, name: str, scales: str, way: Scales) -> list[Row]:
    """Uniform schemes, then mixtures with the same importance, which the first of all runs makes."""
    case, rows = CASES[name], list[Row]()
    for scheme in case.uniform:
        setting = Setting(("--scheme", scheme, *case.layout), packed=True)
        score = bench.run(setting, way.uniform, "quantize", way.importance, {STATISTICS: scales})
        rows.append(Row(name, scales, scheme, score.bits, score.kl, None))
        print(_line(rows[-1]), flush=True)
    uniform, options = tuple(rows), ",".join(case.options)
    setting = Setting(("--target-bits", str(case.target), "--options", options, *case.layout), packed=True)
    for mixture, (command, *words) in way.mixtures.items():
        figures = " ".join((scales, mixture, options, *case.layout))  # the same for another target
        score = bench.run(setting, words, command, way.importance, {STATISTICS: scales, DAMAGES: figures})
        rows.append(Row(name, scales, mixture, score.bits, score.kl, score.kl / expect(uniform, score.bits)))
        print(_line(rows[-1]), flush=True)
    return rows


def expect(uniform: Sequence[Row], bits: float) -> float:
    """KL of a uniform scheme of so many bits: its logarithm is taken for a straight line between two sizes."""
    for a, b in pairwise(uniform):
        if a.bits <= bits <= b.bits:
            share = (bits - a.bits) / (b.bits - a.bits)
            return math.exp((1 - share) * math.log(a.kl) + share * math.log(b.kl))
    return uniform[0].kl


def judge_bars(rows: Sequence[Row]) -> list[str]:
    """What misses: the bar, or the target's size."""
    missed = []
    for row in rows:
        case = CASES[row.case]
        if row.ratio is not None and row.ratio > case.bar:
            missed.append(f"{row.case}, {row.scales}: {row.ratio:.3f}, expected {case.bar} or less")
        if row.ratio is not None and not case.target * (1 - BELOW) <= row.bits <= case.target:
            missed.append(
                f"{row.case}, {row.scales}: {row.bits:.4f} bits, expected at most {BELOW:.1%} below the target"
            )
    return missed


def _line(row: Row) -> str:
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
    return f"| {row.case} | {row.scales} | {row.scheme} | {row.bits:.4f} | {row.kl:.3f} | {ratio} |"


def main() -> None:
    """All cases unless the command line chooses."""
    columns = ("case", "scales", "scheme", "bits", "KL", "x uniform")
    run_bench(__doc__, CASES, CASES, columns, compare, judge_bars)


if __name__ == "__main__":
    main()
