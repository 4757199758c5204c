"""Speed of the kernels of ggml's blocks beside ggml's own function, on every instruction set. See README.md here.

Usage: python bench/ggml_kernels.py --ggml libggml-base.so [--types Q4_K Q6_K ...] [--data plain zeros ...]
       [--importance] [--dtype F32] [--repeats 15]

One thread, CPU time, best of the repeats; ggml and the kernel sets take turns on the same weights. A cell is how many
times faster a set is than ggml.
"""

import argparse
import ctypes
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shardq.ggml import GGML
from shardq.kernels import load, sets
from shardq.kernels.contract_blocks import BLOCK_FORMATS

ROWS: Final = 32
COLS: Final = 4096
SUBNORMAL: Final = np.float32(1e-40)
TINY: Final = np.float32(1e-17)  # below what ggml searches, of six types
LEAST_S: Final = 0.004  # a turn: the clock of a shared machine is coarse
Floats = NDArray[np.float32]
Call = Callable[[], object]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml", type=Path, required=True, help="ggml's library with ggml_quantize_chunk")
    parser.add_argument("--types", nargs="+", choices=BLOCK_FORMATS, default=list(BLOCK_FORMATS))
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--importance", action="store_true")
    parser.add_argument("--dtype", choices=("F32", "BF16"), default="F32", help="of the weights that kernels get")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    quantize = _ggml(args.ggml)
    names = [row.name for row in sets() if row.usable and row.name != "reference"]
    print("| type | weights | ggml MB/s | " + " | ".join(names) + " |\n" + "| --- " * (3 + len(names)) + "|")
    importance = np.random.default_rng(1).gamma(1.0, 1.0, COLS).astype(np.float32) if args.importance else None
    for name in args.types:
        for data in args.data:
            w = DATA[data](np.random.default_rng(0))
            mine = w if args.dtype == "F32" else (w.view(np.uint32) >> 16).astype(np.uint16)
            calls = _calls(quantize, name, names, (w, mine), args.dtype, importance)
            best_s = _best(calls, args.repeats)
            ratios = " | ".join(f"{best_s['ggml'] / best_s[n]:.1f}" for n in names)
            print(f"| {name} | {data} | {w.nbytes / best_s['ggml'] / 1e6:.0f} | {ratios} |", flush=True)


def _plain(rng: np.random.Generator) -> Floats:
    """As bf16 has them."""
    w = (rng.standard_normal((ROWS, COLS)) * 0.02).astype(np.float32)
    return (w.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _some(rng: np.random.Generator, share: float, block: int, factor: np.float32) -> Floats:
    """Plain ones, a share of whose blocks is multiplied."""
    w = _plain(rng).reshape(ROWS, -1, block)
    w[rng.random(w.shape[:2]) < share] *= factor
    return w.reshape(ROWS, COLS)


DATA: Final[Mapping[str, Callable[[np.random.Generator], Floats]]] = {
    "plain": _plain,
    "30 % zero blocks of 32": lambda rng: _some(rng, 0.3, 32, np.float32(0)),
    "30 % zero blocks of 256": lambda rng: _some(rng, 0.3, 256, np.float32(0)),
    "30 % subnormal blocks of 32": lambda rng: _some(rng, 0.3, 32, SUBNORMAL),
    "all subnormal": lambda rng: _plain(rng) * SUBNORMAL,
    "all tiny": lambda rng: _plain(rng) * TINY,
    "all zero": lambda rng: _some(rng, 1.1, COLS, np.float32(0)),
}


def _ggml(path: Path) -> Callable[..., int]:
    library = ctypes.CDLL(str(path))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    found: Callable[..., int] = quantize
    return found


def _calls(
    quantize: Callable[..., int],
    name: str,
    names: list[str],
    weights: tuple[Floats, NDArray[np.generic]],
    dtype: str,
    importance: Floats | None,
) -> dict[str, Call]:
    """What is timed, by its name; all must write the same bytes."""
    theirs, mine = weights
    form = BLOCK_FORMATS[name]
    expected, out = np.zeros((2, ROWS, COLS // form.cols * form.size_bytes), np.uint8)
    pointer = None if importance is None else importance.ctypes.data
    calls: dict[str, Call] = {
        "ggml": lambda: quantize(GGML[name].id, theirs.ctypes.data, expected.ctypes.data, 0, ROWS, COLS, pointer)
    }
    calls["ggml"]()
    for kernels in map(load, names):
        calls[kernels.name] = lambda k=kernels: k.quantize_blocks(mine, dtype, name, importance, out)
        calls[kernels.name]()
        assert np.array_equal(out, expected), f"{name} of {kernels.name} has other bytes"
    return calls


def _best(calls: Mapping[str, Call], repeats: int) -> dict[str, float]:
    """CPU time of one call of each."""
    best_s = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            count, begin_s = 0, time.thread_time()
            while (spent_s := time.thread_time() - begin_s) < LEAST_S:
                call()
                count += 1
            best_s[name] = min(best_s[name], spent_s / count)
    return best_s


if __name__ == "__main__":
    main()
