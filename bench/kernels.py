"""Speed of every kernel on every instruction set: python bench/kernels.py [--json] [--schemes | --searches] [--rows N]
[--cols N].

CPU-seconds of one thread per GB of bf16 weights, best of the repeats, on a tile that fits a level-2 cache. The kernel
sets take turns, and memcpy with them: on a shared machine only ratios inside one run mean anything.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle

import numpy as np

from shardq.figures import FIGURES
from shardq.importance_vectors import Means
from shardq.kernels import KernelSet, load, sets
from shardq.layouts import find_layout
from shardq.quantizers.buffers import Buffers, buffer_shapes
from shardq.quantizers.rtn import quantize_rows
from shardq.schemes import parse_scheme
from shardq.search import AUTO_ROUND, Search, default_search

GB = 1e9
BYTES_PER_WEIGHT = 2
LARGEST = {"e2m1": 6.0, "e4m3fn": 448.0, "int8": 127.5}
FP4 = "NVFP4A16"  # the scheme that reaches farthest
SCHEMES = (  # as --scheme takes them; the quantizer as a worker calls it
    "W4A16@auto_round",
    "W4A16@compressed-tensors",
    "W4A16_ASYM@auto_round",
    "W4A16_ASYM@compressed-tensors",
    "W8A8@compressed-tensors",
    "FP8_DYNAMIC@compressed-tensors",
    "FP8_BLOCK@compressed-tensors",
    "MXFP4@compressed-tensors",
    "MXFP4@auto_round",
    "MXFP6A16@compressed-tensors",
    "MXFP8@compressed-tensors",
    "MXINT4@auto_round",
    f"{FP4}@compressed-tensors",
    "NVFP4_E5M3@auto_round",
)
SEARCHED = (  # with importance, and the search that is best for each
    "W2A16G32@auto_round",
    "W3A16@auto_round",
    "W4A16@auto_round",
    "W4A16@compressed-tensors",
    "W8A8@compressed-tensors",
    "W4A16_ASYM@auto_round",
    "4BIT@mlx",
    "MXFP4@compressed-tensors",
    "MXFP8@compressed-tensors",
    "NVFP4A16@compressed-tensors",
    "NVFP4A16@mlx",
    "NVFP4_E5M3@auto_round",
)
CENTERED = (
    "W2A16G32@auto_round",
    "W4A16@auto_round",
    "W4A16_ASYM@auto_round",
    "4BIT@mlx",
    "NVFP4A16@compressed-tensors",
)  # with means of inputs
CALLS_PER_TURN = 4  # the first brings the tile into the cache
OUT_TILES = 24
AMAX = 0.1  # of a matrix of which the tile is part
REFERENCE_TURNS = 1  # the reference is slow
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel on one set."""

    kernel: str
    set_name: str
    call: Call


@dataclass(frozen=True, slots=True)
class Timing:
    """Best CPU time of a case."""

    kernel: str
    set_name: str
    cpu_s_per_gb: float  # of bf16 source weights
    gb_per_s: float  # the inverse
    memcpy_ratio: float  # time over that of memcpy of the bf16 tile

    @property
    def ns_per_weight(self) -> float:
        """The same for one weight, as searches are told."""
        return self.cpu_s_per_gb * BYTES_PER_WEIGHT


def group_cases(kernels: KernelSet, src: np.ndarray, group: int) -> list[Case]:
    """The kernels that know groups, 4 bit."""
    rows, cols = src.shape
    shape = (rows, -(-cols // group))
    codes, zeros = np.zeros(src.shape, np.uint8), np.zeros(shape, np.uint8)
    scales, low, high = np.zeros((3, *shape), np.float32)
    x, stats = np.zeros(src.shape, np.float32), np.zeros((rows, FIGURES))
    kernels.rtn_int(src, "BF16", 4, group, False, codes, scales, zeros)
    kernels.widen(src, "BF16", x)
    steps = np.zeros((shape[1], rows), np.uint16)
    calls: dict[str, Call] = {
        "group_minmax": lambda: kernels.group_minmax(x, group, low, high),
        "rtn_int sym": lambda: kernels.rtn_int(src, "BF16", 4, group, True, codes, scales, zeros),
        "rtn_int asym": lambda: kernels.rtn_int(src, "BF16", 4, group, False, codes, scales, zeros),
        "narrow_columns": lambda: kernels.narrow_columns(scales, steps, 0),
        "sum_errors": lambda: kernels.sum_errors(stats),
        "dequantize_int": lambda: kernels.dequantize_int(codes, scales, zeros, group, x),
        "error_int": lambda: kernels.error_int(src, "BF16", 4, codes, scales, zeros, group, stats),
        "error_values": lambda: kernels.error_values(src, "BF16", x, group, stats),
        "rtn_error_int sym": lambda: kernels.rtn_error_int(src, "BF16", 4, group, True, codes, scales, zeros, stats),
        "rtn_error_int asym": lambda: kernels.rtn_error_int(src, "BF16", 4, group, False, codes, scales, zeros, stats),
    }
    return [Case(f"{name} g{group}", kernels.name, call) for name, call in calls.items()]


def scales_of(most: np.ndarray, element: str, powers: bool) -> np.ndarray:
    """Scales from the largest magnitudes of groups: the quotient, or the power of two at or above it."""
    scales = most / np.float32(LARGEST[element])
    return np.exp2(np.ceil(np.log2(scales))) if powers else scales


def scaled_cases(kernels: KernelSet, src: np.ndarray, element: str, group: int, powers: bool) -> list[Case]:
    """The kernels of symmetric elements."""
    shape = (src.shape[0], -(-src.shape[1] // group))
    most, codes = np.zeros(shape, np.float32), np.zeros(src.shape, np.uint8)
    values, stats = np.zeros(src.shape, np.float32), np.zeros((src.shape[0], FIGURES))
    kernels.group_absmax(src, "BF16", group, most)
    scales = scales_of(most, element, powers)
    calls: dict[str, Call] = {
        "encode": lambda: kernels.encode_scaled(src, "BF16", element, group, scales, codes),
        "decode": lambda: kernels.decode_scaled(codes, element, scales, group, values),
        "error": lambda: kernels.error_scaled(src, "BF16", element, codes, scales, group, stats),
    }
    label = f"{element}{' 2^n' if powers else ''} g{group}"
    return [Case(f"{name} {label}", kernels.name, call) for name, call in calls.items()]


def affine_cases(kernels: KernelSet, src: np.ndarray, group: int) -> list[Case]:
    """The kernels of affine codes, 4 bit."""
    shape = (src.shape[0], -(-src.shape[1] // group))
    low, high = np.zeros((2, *shape), np.float32)
    codes, stats = np.zeros(src.shape, np.uint8), np.zeros((src.shape[0], FIGURES))
    kernels.group_range(src, "BF16", group, low, high)
    scales = (high - low) / np.float32(15)
    zeros = np.rint(-low / scales)
    calls: dict[str, Call] = {
        "group_absmax": lambda: kernels.group_absmax(src, "BF16", group, high),
        "group_range": lambda: kernels.group_range(src, "BF16", group, low, high),
        "round_add": lambda: kernels.encode_affine(src, "BF16", 4, group, scales, zeros, "round_add", codes),
        "add_round": lambda: kernels.encode_affine(src, "BF16", 4, group, scales, zeros, "add_round", codes),
        "subtract": lambda: kernels.encode_affine(src, "BF16", 4, group, scales, low, "subtract", codes),
        "error zero": lambda: kernels.error_affine(src, "BF16", 4, codes, scales, zeros, group, "zero", stats),
        "error bias": lambda: kernels.error_affine(src, "BF16", 4, codes, scales, low, group, "bias", stats),
    }
    return [Case(f"{name} g{group}", kernels.name, call) for name, call in calls.items()]


def scheme_case(kernels: KernelSet, src: np.ndarray, words: str) -> Case:
    """Everything that quantizing a tile needs: extremes, scales, codes, error."""
    name, _, layout = words.partition("@")
    scheme = find_layout(layout).settle(parse_scheme(name).scheme)
    buffers = Buffers(*(np.zeros(shape, kind) for shape, kind in buffer_shapes(*src.shape, scheme)))
    stats = np.zeros((src.shape[0], FIGURES))
    amax = None if scheme.reach == "group" else AMAX
    return Case(words, kernels.name, lambda: quantize_rows(src, "BF16", scheme, buffers, stats, kernels, amax))


def search_case(
    kernels: KernelSet, src: np.ndarray, words: str, search: Search | None = None, centered: bool = False
) -> Case:
    """Everything that quantizing a tile with searched scales needs; the scheme's best search unless told, and with
    means of inputs where it is `centered`."""
    name, _, layout = words.partition("@")
    scheme = find_layout(layout).settle(parse_scheme(name).scheme)
    buffers = Buffers(*(np.zeros(shape, kind) for shape, kind in buffer_shapes(*src.shape, scheme)))
    stats = np.zeros((src.shape[0], FIGURES))
    importance = (np.random.default_rng(1).standard_normal(src.shape[1]) ** 2 + 1e-4).astype(np.float32)
    amax = None if scheme.reach == "group" else AMAX
    best = search or default_search(scheme, weighted=True)
    chosen = replace(best, centered=True) if best and centered else best
    means = Means(importance, np.sqrt(importance)) if centered else None
    label = f"{words} {search.rule if search else 'search'}{' centered' if means else ''}"
    return Case(
        label,
        kernels.name,
        lambda: quantize_rows(
            src, "BF16", scheme, buffers, stats, kernels, amax, search=chosen, importance=importance, means=means
        ),
    )


def search_cases(kernels: KernelSet, src: np.ndarray) -> list[Case]:
    """Schemes with searched scales."""
    grid = search_case(kernels, src, "W4A16@auto_round", AUTO_ROUND)
    centered = [search_case(kernels, src, words, centered=True) for words in CENTERED]
    return [*(search_case(kernels, src, words) for words in SEARCHED), *centered, grid]


def packing_cases(kernels: KernelSet, src: np.ndarray, bits: int) -> list[Case]:
    """Bit streams, and the transposition of their words."""
    rows, cols = src.shape
    codes = (src & ((1 << bits) - 1)).astype(np.uint8)
    words = np.zeros((rows, -(-cols * bits // 32)), np.uint32)
    turned = np.zeros((words.shape[1], rows), np.uint32)
    calls: dict[str, Call] = {
        "pack_bits": lambda: kernels.pack_bits(codes, bits, words),
        "unpack_bits": lambda: kernels.unpack_bits(words, bits, codes),
        "transpose_u32": lambda: kernels.transpose_u32(words, turned, 0),
    }
    return [Case(f"{name} {bits}", kernels.name, call) for name, call in calls.items()]


def column_cases(kernels: KernelSet, src: np.ndarray, bits: int, out: np.ndarray) -> list[Case]:
    """Packed columns of a matrix larger than a level-2 cache, a tile at a time, as the product writes them.

    `out` holds OUT_TILES tiles side by side; each call takes the next, so that its lines left the cache long ago.
    """
    rows, cols = src.shape
    codes = (src & ((1 << bits) - 1)).astype(np.uint8)
    words = np.zeros((rows, cols * bits // 32), np.uint32)
    place = out.reshape(-1)[: words.shape[1] * rows * OUT_TILES].reshape(words.shape[1], rows * OUT_TILES)
    starts, one_pass_starts = cycle(range(0, place.shape[1], rows)), cycle(range(0, place.shape[1], rows))

    def in_two_steps() -> None:
        kernels.pack_bits(codes, bits, words)
        kernels.transpose_u32(words, place, next(starts))

    calls: dict[str, Call] = {
        "pack, transpose": in_two_steps,
        "pack_columns": lambda: kernels.pack_columns(codes, bits, place, next(one_pass_starts)),
    }
    return [Case(f"{name} {bits} far", kernels.name, call) for name, call in calls.items()]


def plain_cases(kernels: KernelSet, src: np.ndarray) -> list[Case]:
    """The kernels that know neither groups nor bits."""
    out, data = np.zeros(src.shape, np.float32), src.view(np.uint8).reshape(-1)
    calls: dict[str, Call] = {
        "widen": lambda: kernels.widen(src, "BF16", out),
        "checksum": lambda: kernels.checksum(data),
    }
    return [Case(name, kernels.name, call) for name, call in calls.items()]


def native_cases(kernels: KernelSet, src: np.ndarray, out: np.ndarray) -> list[Case]:
    """Every kernel of one set; `out` is room for the words of OUT_TILES tiles of 8 bits."""
    cases = plain_cases(kernels, src)
    for bits in (3, 4, 8):
        cases += column_cases(kernels, src, bits, out)
    for bits in (2, 3, 4, 8):
        cases += packing_cases(kernels, src, bits)
    for group in (32, 128):
        cases += group_cases(kernels, src, group)
    for group in (16, 32, 128, src.shape[1]):
        cases += affine_cases(kernels, src, group)
        for element in LARGEST:
            cases += scaled_cases(kernels, src, element, group, False)
    for element in ("e2m1", "e4m3fn"):
        cases += scaled_cases(kernels, src, element, 32, True)
    return cases


def reference_cases(src: np.ndarray) -> list[Case]:
    """rtn_int in torch on one thread."""
    import torch

    torch.set_num_threads(1)
    return [case for case in group_cases(load("reference"), src, 128) if case.kernel.startswith("rtn_int")]


def measure(cases: list[Case], size_gb: float, repeats: int) -> list[Timing]:
    """Best thread CPU time of each case; the first case is memcpy."""
    best_s = [float("inf")] * len(cases)
    for turn in range(repeats):
        for i, case in enumerate(cases):
            if turn >= REFERENCE_TURNS and case.set_name == "reference":
                continue
            for _ in range(CALLS_PER_TURN):
                begin = time.thread_time()
                case.call()
                spent_s = time.thread_time() - begin
                if spent_s > 0:  # the clock of a shared machine may stand still
                    best_s[i] = min(best_s[i], spent_s)
    return [
        Timing(case.kernel, case.set_name, seconds / size_gb, size_gb / seconds, seconds / best_s[0])
        for case, seconds in zip(cases, best_s, strict=True)
    ]


def text_of(timing: Timing) -> str:
    """What a cell of the table holds."""
    return f"{timing.cpu_s_per_gb:.4f} ({timing.memcpy_ratio:.1f}) {timing.ns_per_weight:6.2f}"


def table(timings: list[Timing]) -> str:
    """One line per kernel, one column pair per set."""
    names = list(dict.fromkeys(t.set_name for t in timings))
    lines = [f"{'CPU-s per GB (x memcpy) ns/weight':36}" + "".join(f"{name:>26}" for name in names)]
    for kernel in dict.fromkeys(t.kernel for t in timings):
        found = {t.set_name: t for t in timings if t.kernel == kernel}
        texts = (text_of(found[n]) if n in found else "" for n in names)
        lines.append(f"{kernel:36}" + "".join(f"{text:>26}" for text in texts))
    return "\n".join(lines)


def record(timing: Timing) -> dict[str, str | float]:
    """A timing as JSON."""
    return {
        "kernel": timing.kernel,
        "set": timing.set_name,
        "cpu_s_per_gb": timing.cpu_s_per_gb,
        "gb_per_s": timing.gb_per_s,
        "ns_per_weight": timing.ns_per_weight,
        "memcpy_ratio": timing.memcpy_ratio,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--schemes", action="store_true", help="whole schemes only")
    parser.add_argument("--searches", action="store_true", help="whole schemes with searched scales only")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args()
    weights = (np.random.default_rng(0).standard_normal((options.rows, options.cols)) * 0.02).astype(np.float32)
    src = (weights.view(np.uint32) >> 16).astype(np.uint16)
    copy, out = np.empty_like(src), np.zeros(src.size // 4 * OUT_TILES, np.uint32)
    cases = [Case("memcpy", "numpy", lambda: np.copyto(copy, src))]
    for row in sets():
        if row.usable and row.name != "reference":
            kernels = load(row.name)
            searches = search_cases(kernels, src)
            schemes = [scheme_case(kernels, src, words) for words in SCHEMES]
            some = searches if options.searches else schemes + searches
            cases += some if options.schemes or options.searches else native_cases(kernels, src, out) + some
    cases += [] if options.schemes or options.searches else reference_cases(src)
    timings = measure(cases, src.nbytes / GB, options.repeats)
    if options.json:
        print(json.dumps({"rows": options.rows, "cols": options.cols, "timings": [record(t) for t in timings]}))
    else:
        print(table(timings))


if __name__ == "__main__":
    main()
