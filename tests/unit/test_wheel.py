"""The wheel: what is in it, and that it works from an empty folder with nothing of the source tree at hand."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("scikit_build_core", "nanobind")
SOURCES = {".cpp", ".h", ".inl", ".txt", ".c", ".cmake"}
LIMIT_S = 280
Run = Callable[..., str]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from this tree: with the build tools at hand if they are, else in an environment of its own. Its kernels
    are not optimized, which would take most of the time: those of the other tests are."""
    folder = tmp_path_factory.mktemp("wheel")
    here = all(importlib.util.find_spec(name) for name in TOOLS)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    options = ["--no-build-isolation"] if here else []
    build = f"--config-settings=build-dir={folder / 'build'}"
    _finish([*command, *options, build, "--config-settings=cmake.define.SHARDQ_OPTIMIZE=-O0", str(ROOT)])
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of executables of a new environment with this wheel; dependencies come from that of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    _finish([*command, "--no-deps", "--no-index", str(wheel)])
    # After the wheel: pip would take a shardq that it sees there for this one. A .pth line adds the folder behind the
    # new one, and runs none of its own .pth files (an editable install's).
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    """run("python", "-c", ...): stdout of a command of the new environment, in an empty folder."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("SHARDQ_")}

    def command(name: str, *words: str) -> str:
        return _finish([str(installed / name), *words], tmp_path, env)

    return command


def _finish(command: Sequence[str], folder: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=folder, env=env, check=False, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = [PurePosixPath(n) for n in zipfile.ZipFile(wheel).namelist()]
    tops = {n.parts[0] for n in names}
    version = wheel.name.split("-")[1]
    assert tops == {"shardq", f"shardq-{version}.dist-info"}
    inside = [n for n in names if n.parts[0] == "shardq"]
    assert [n for n in inside if n.suffix in SOURCES] == []
    assert {n.suffix for n in inside} <= {".py", ".pyi", ".so", ".toml", ".typed", ".md", ".json", ".css", ".js"}
    wanted = (
        "py.typed",
        "families.toml",
        "folds.toml",
        "serving/table/general.toml",
        "cli/__main__.py",
        "kernels/__init__.py",
        "kernels/_native.pyi",
        "html_report/style.css",
        "html_report/script.js",
        "worker.py",
    )
    assert {PurePosixPath("shardq", w) for w in wanted} <= set(inside)
    assert len([n for n in inside if n.suffix == ".so"]) == 1


def test_installed_wheel_is_what_runs(run: Run, installed: Path) -> None:
    places = run("python", "-c", "import shardq, shardq.cli, shardq.kernels as k; print(shardq.__file__, k.__file__)")
    assert all(Path(p).is_relative_to(installed.parent) for p in places.split())
    assert run("shardq", "--version").split()[0] == "shardq"
    assert run("shardq", "--version") == run("python", "-P", "-m", "shardq.cli", "--version")


def test_installed_wheel_quantizes(run: Run, tmp_path: Path) -> None:
    result = json.loads(run("shardq", "quantize", "demo", "--parallel", "2", "-o", "out", "--json", "-q"))
    assert result["counts"]["quantized"] > 0
    assert (tmp_path / "out" / "config.json").exists()
    found = json.loads(run("shardq", "verify", "--deep", "out", "--json"))
    assert found["problems"] == []


def test_every_usable_kernel_set_is_native(run: Run) -> None:
    names = run("python", "-c", "from shardq.kernels import sets; print(*(s.name for s in sets() if s.usable))").split()
    assert "baseline" in names
    for name in names:
        if name != "reference":
            assert run("python", "-c", f"from shardq.kernels import load; print(load({name!r}).name)").strip() == name
