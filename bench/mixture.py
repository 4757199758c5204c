"""How long the choice of a mixture takes, what memory, and how much of it is proven. See README.md.

python bench/mixture.py [--items N] [--json FILE]
"""

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from shardq.layouts import find_layout
from shardq.mixture import Item, Option
from shardq.mixture_choice import choose
from shardq.mixture_file import Matrix, group_matrices, layer_config_text, make_items, parse_options
from shardq.schemes import parse_scheme

OPTIONS: Final = tuple(Option(name, None) for name in ("W2A16G64", "W4A16", "W8A16"))
BITS: Final = (2.25, 4.125, 8.125)  # of a weight, scales included
TARGET: Final = 4.5
SHAPES: Final = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (2048, 7168), (7168, 2048))


@dataclass(frozen=True, slots=True)
class Timed:
    """One problem."""

    problem: str
    items: int
    seconds: float  # CPU; of `choose`, or of all from modules to the file
    peak_mb: float  # of the process
    before_mb: float  # of the process with no more than the items, or the modules and their damages
    average_bits: float
    gap: float  # 0: proven


def _item(number: int, weights: int, damages: Sequence[float], bits: Sequence[int] | None = None) -> Item:
    costs = tuple(bits or [int(b * weights) for b in BITS])
    return Item(f"model.layers.{number}.w", "w", (), weights, OPTIONS, costs, tuple(damages))


def _damages(r: random.Random, weights: int) -> list[float]:
    """About a quarter for each bit more, as rounding has it, beside a sensitivity of several orders of magnitude."""
    scale = weights * math.exp(r.gauss(0, 1.5))
    return [scale * 4.0**-b * math.exp(r.gauss(0, 0.2)) for b in (2, 4, 8)]


def real(count: int) -> list[Item]:
    """Matrices of six shapes, as models have them."""
    r = random.Random(1)
    sizes = [math.prod(r.choice(SHAPES)) for _ in range(count)]
    return [_item(i, w, _damages(r, w)) for i, w in enumerate(sizes)]


def ragged(count: int) -> list[Item]:
    """No two matrices of one size."""
    r = random.Random(2)
    sizes = [r.randrange(10**6, 10**8) for _ in range(count)]
    return [_item(i, w, _damages(r, w)) for i, w in enumerate(sizes)]


def equal(count: int) -> list[Item]:
    """All alike: any choice of the right number of items is the best."""
    return [_item(i, 2048 * 7168, [16.0, 1.0, 0.01]) for i in range(count)]


def correlated(count: int) -> list[Item]:
    """Damage that is worth the bits, almost: the hard case of the literature (strongly correlated)."""
    r = random.Random(3)
    items = []
    for i in range(count):
        bits = sorted(r.randrange(1, 10**9) for _ in BITS)
        items.append(_item(i, 10**8, [2e9 - b + r.randrange(10**5) for b in bits], bits))
    return items


PROBLEMS: Final[Mapping[str, Callable[[int], list[Item]]]] = {
    "six shapes": real,
    "no two sizes alike": ragged,
    "all alike": equal,
    "strongly correlated": correlated,
}


def dense(count: int) -> list[Matrix]:
    """Modules of layers without experts: attention and a network, seven in each."""
    shapes = {f"self_attn.{n}_proj": (r, 4096) for n, r in (("q", 4096), ("k", 1024), ("v", 1024), ("o", 4096))}
    shapes |= {"mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096), "mlp.down_proj": (4096, 14336)}
    named = ((f"model.layers.{k}.{n}", shape) for k in range(-(-count // 7)) for n, shape in shapes.items())
    return [Matrix(name, shape, "BF16") for name, shape in named][:count]


def experts(count: int) -> list[Matrix]:
    """Modules of 384 experts a layer."""
    shapes = {"gate_proj": (2048, 7168), "up_proj": (2048, 7168), "down_proj": (7168, 2048)}
    layers = range(-(-count // (3 * 384)))
    named = ((f"model.layers.{k}.mlp.experts.{e}.{n}", n) for k in layers for e in range(384) for n in shapes)
    return [Matrix(name, shapes[n], "BF16") for name, n in named][:count]


MODELS: Final[Mapping[str, Callable[[int], list[Matrix]]]] = {"modules, dense": dense, "modules, experts": experts}


def whole(matrices: Sequence[Matrix], damages: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """From modules to the text of the file; the average and the gap."""
    layout = find_layout("auto_round")
    options = parse_options("W2A16G64,W4A16,W8A16", layout)
    groups = group_matrices(matrices, {"model_type": "llama"})
    items = make_items(groups, options, damages, layout, layout.settle(parse_scheme("W4A16").scheme))
    found = choose(items, TARGET)
    assert found.bits <= found.budget_bits
    assert layer_config_text(items, found)
    return found.average_bits, found.gap


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure(problem: str, count: int) -> Timed:
    """One problem in this process."""
    if problem in MODELS:
        r = random.Random(4)
        matrices = MODELS[problem](count)
        damages = {m.module: tuple(_damages(r, math.prod(m.shape))) for m in matrices}
        before, begin = _peak_mb(), time.process_time()
        average, gap = whole(matrices, damages)
    else:
        items = PROBLEMS[problem](count)
        before, begin = _peak_mb(), time.process_time()
        found = choose(items, TARGET)
        assert found.bits <= found.budget_bits
        average, gap = found.average_bits, found.gap
    return Timed(problem, count, time.process_time() - begin, _peak_mb(), before, average, gap)


def main() -> None:
    """Measure every problem in a process of its own, and print a table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--items", type=int, nargs="+", default=[200, 20_000, 1_000_000])
    options.add_argument("--problem", choices=(*PROBLEMS, *MODELS), help="only this one, as a line of JSON")
    options.add_argument("--json", type=Path)
    args = options.parse_args()
    if args.problem:
        print(json.dumps(asdict(measure(args.problem, args.items[0]))))
        return
    print("| problem | items | CPU s | peak MB | of them before | average bits | gap |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    found = []
    for count in args.items:
        for problem in (*PROBLEMS, *MODELS):
            command = [sys.executable, __file__, "--problem", problem, "--items", str(count)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            t = Timed(**json.loads(out))
            found.append(asdict(t))
            gap = f"{t.gap:.1e}" if t.gap else "proven"
            figures = f"{t.seconds:.2f} | {t.peak_mb:.0f} | {t.before_mb:.0f} | {t.average_bits:.6f} | {gap}"
            print(f"| {t.problem} | {t.items} | {figures} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
