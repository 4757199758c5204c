"""The built module: its version, its symbols, and that it lets other threads run."""

import importlib.metadata
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from shardq.kernels import KernelSet, _native

TREE = Path(__file__).parents[2]


def test_native_version_is_that_of_the_package() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", _native.__version__)
    project = TREE / "pyproject.toml"
    if project.exists():
        assert f'version = "{_native.__version__}"' in project.read_text()
    try:
        installed = importlib.metadata.version("shardq")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("shardq runs from the tree; its installed version cannot be compared")
    assert _native.__version__ == installed


def test_objects_of_instruction_sets_hold_no_weak_symbol(tmp_path: Path) -> None:
    """The linker may keep one copy of a weak function for all sets: the one that needs the newest processor."""
    compiler, lister, sources = shutil.which("c++"), shutil.which("nm"), TREE / "kernels" / "native" / "isa"
    if compiler is None or lister is None or not sources.exists():
        pytest.skip("needs a source tree, a C++ compiler and nm")
    source = tmp_path / "probe.cpp"
    source.write_text("#if defined(__x86_64__)\nX86\n#elif defined(__aarch64__)\nARM\n#endif\n")
    machine = subprocess.run([compiler, "-E", "-P", str(source)], capture_output=True, text=True, check=True).stdout.strip()
    flags = {"X86": {"baseline": [], "avx2": ["-march=x86-64-v3"]}, "ARM": {"baseline": [], "neon": []}}
    for name, march in flags.get(machine, {"baseline": []}).items():
        target = tmp_path / f"{name}.o"
        command = [compiler, "-std=c++17", "-O1", "-c", *march, str(sources / f"{name}.cpp"), "-o", str(target)]
        subprocess.run(command, check=True)
        listing = subprocess.run([lister, "-C", str(target)], capture_output=True, text=True, check=True).stdout
        kinds = {line.split()[-2] if len(line.split()) < 3 else line.split()[1] for line in listing.splitlines()}
        assert not kinds & {"W", "V", "w", "v", "u"}, listing
        assert f"{name}_table" in listing


def test_kernels_run_without_the_gil(kernels: KernelSet) -> None:
    """While one thread is inside a long kernel call, this one goes on counting."""
    data = np.zeros(400_000_000, np.uint8)
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
