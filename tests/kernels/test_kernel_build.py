"""The built module: its version, its symbols, and that it lets other threads run."""

import importlib.metadata
import shutil
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from shardq.kernels import KernelSet, _native
from shardq.version import VERSION

TREE = Path(__file__).parents[2]
MACHINE_FLAGS = {"avx2": ("-march=x86-64-v3",), "avx512": ("-march=x86-64-v4",)}


def test_native_version_is_that_of_the_package() -> None:
    assert _native.__version__ == VERSION
    try:
        installed = importlib.metadata.version("shardq")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("shardq runs from the tree; its installed version cannot be compared")
    assert _native.__version__ == installed


def test_objects_of_instruction_sets_hold_no_weak_symbol(kernels: KernelSet, tmp_path: Path) -> None:
    """The linker may keep one copy of a weak function for all sets: the one that needs the newest processor.

    Compiled without optimization, so that nothing is inlined away.
    """
    compiler, lister = shutil.which("c++"), shutil.which("nm")
    source = TREE / "kernels" / "native" / "isa" / f"{kernels.name}.cpp"
    if compiler is None or lister is None or not source.exists():
        pytest.skip("needs a source tree, a C++ compiler and nm")
    target = tmp_path / "set.o"
    flags = ("-std=c++17", "-O0", *MACHINE_FLAGS.get(kernels.name, ()))
    subprocess.run([compiler, *flags, "-c", str(source), "-o", str(target)], check=True)
    listing = subprocess.run([lister, "--format=posix", str(target)], capture_output=True, text=True, check=True).stdout
    kinds = {line.split()[1] for line in listing.splitlines()}
    assert not kinds & set("WVwvu"), listing
    assert f"{kernels.name}_table" in listing


def test_kernels_run_without_the_gil(kernels: KernelSet) -> None:
    """While one thread is inside a long kernel call, this one goes on counting."""
    data = np.ones(600_000_000, np.uint8)  # zeros would be one page over and over, and soon done
    inside = threading.Event()
    span: list[float] = []

    def work() -> None:
        inside.set()
        began = time.perf_counter()
        kernels.checksum(data)
        span.extend((began, time.perf_counter()))

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    ticks = []
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    thread.join()
    began, ended = span
    during = [tick for tick in ticks if began + 0.1 * (ended - began) < tick < ended - 0.1 * (ended - began)]
    assert ended - began > 0.01
    assert len(during) >= 3
