"""Our bytes against those of each format's own library; golden/*/PROVENANCE.md says how they were made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

from shardq.arena import Arena
from shardq.figures import FIGURES
from shardq.kernels import KernelSet
from shardq.layouts import LAYOUTS, find_layout
from shardq.layouts.base import Layout
from shardq.quantizers.buffers import take_buffers
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.rtn import quantize_rows
from shardq.schemes import Scheme

Pack = Callable[..., dict[str, NDArray[Any]]]
GOLDEN: Final = Path(__file__).with_name("golden")
FAMILY: Final = ("auto_round", "auto_round/gptqmodel", "gptq", "gptq_v2")
CASES: Final = sorted(p for name in FAMILY for p in GOLDEN.glob(f"{name}/*.safetensors"))
CUTS: Final = [(1 << 20, 1 << 20), (32, 1 << 20), (64, 1 << 20), (1 << 20, 32), (32, 64)]  # tile rows, slab rows


def load_file_keys(path: Path) -> list[str]:
    with safe_open(path, "np") as f:
        return list(f.keys())


def scheme_of_case(case: Path) -> Scheme:
    return Scheme(f"int{case.stem[-1]}", group_size=32, symmetric=case.stem.startswith("sym"))


def layout_of_case(case: Path) -> Layout:
    return find_layout(":".join(case.parent.relative_to(GOLDEN).parts))


def quantized_weight(scheme: Scheme, kernels: KernelSet) -> Quantized:
    """Our codes for the golden weight."""
    weight = load_file(GOLDEN / "weight.safetensors")["weight"]
    rows, columns = weight.shape
    arena = Arena()
    arena.reset(1 << 20)
    stats = np.empty((rows, FIGURES))
    part, bad = quantize_rows(weight, "BF16", scheme, take_buffers(arena, rows, columns, scheme), stats, kernels)
    assert bad == 0
    assert part.zeros is not None
    return Quantized(part.codes.copy(), part.scales.copy(), part.zeros.copy())


def test_every_layout_has_golden_files_with_their_provenance() -> None:
    for layout in LAYOUTS:
        if layout.name == "fake":  # nobody's format: test_fake.py has torch compute what it holds
            continue
        folder = GOLDEN / layout.name.partition(":")[0].replace("-", "_")  # a packing alone has its layout's
        assert sum(len(load_file_keys(p)) for p in folder.rglob("*.safetensors")) >= 12, layout.name
        assert (folder / "PROVENANCE.md").exists(), layout.name


@pytest.mark.parametrize(("tile", "slab"), CUTS, ids=lambda n: "whole" if n > 96 else str(n))
@pytest.mark.parametrize("case", CASES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_packed_bytes_equal_the_peers(case: Path, tile: int, slab: int, kernels: KernelSet, pack_whole: Pack) -> None:
    scheme = scheme_of_case(case)
    ours = pack_whole(layout_of_case(case), scheme, quantized_weight(scheme, kernels), tile=tile, slab=slab)
    theirs = load_file(case)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype, name
        assert ours[name].shape == theirs[name].shape, name
        assert ours[name].tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize("case", CASES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_the_peers_bytes_unpack_to_our_codes(case: Path, kernels: KernelSet) -> None:
    scheme = scheme_of_case(case)
    ours, theirs = quantized_weight(scheme, kernels), load_file(case)
    read = layout_of_case(case).unpack(theirs, scheme, kernels)
    assert np.array_equal(read.codes, ours.codes)
    assert np.array_equal(read.scales, ours.scales)
    assert np.array_equal(read.zeros, ours.zeros)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_packing_alone_is_what_its_layout_chooses(bits: int, kernels: KernelSet, pack_whole: Pack) -> None:
    scheme = Scheme(f"int{bits}", group_size=32, symmetric=True)
    own, alone = (
        pack_whole(find_layout(name), scheme, quantized_weight(scheme, kernels))
        for name in ("auto_round", "auto_round:auto_gptq")
    )
    assert {k: v.tobytes() for k, v in own.items()} == {k: v.tobytes() for k, v in alone.items()}
    asymmetric = Scheme(f"int{bits}", group_size=32, symmetric=False)
    assert find_layout("auto_round:auto_gptq").refuse(asymmetric, asymmetric, 64, 64)  # cannot say a zero point of 0
