"""Single experts in codes, in transformers (5.23.0) with compressed-tensors (0.20.0) and the linear experts of
llm-compressor (0.14.0.1), which reads those of gpt-oss, and those of others without transformers' conversions: what we
write is called as what it writes, and answers like the model with the weights that we read back."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import pytest
import test_engine_encoded as beside
from safetensors import safe_open

encoded, source, quantized, rebuilt = beside.encoded, beside.source, beside.quantized, beside.rebuilt  # its fixtures

pytestmark = [pytest.mark.oracle, pytest.mark.slow, pytest.mark.timeout(600)]

Make = Callable[..., Path]
Answers = Mapping[Path, Mapping[str, Any]]
FP32: Final = 1e-5  # relative error of the logits; 3.7e-7 was measured
# In BF16, where it takes the product with the sigmoid last: 0.0081 was measured. Where activations are quantized too,
# and a token may take another expert, 0.023 of integers, 0.05 of FP8 in groups and 0.104 of FP8 in tokens.
BF16, ACTIVATIONS = 0.03, 0.2
# scheme -> the largest error of gpt-oss in BF16; None where transformers wants zero points decoded while it loads them
GPT_OSS: Final[Mapping[str, float | None]] = MappingProxyType(
    {
        "W4A16": BF16,
        "W4A16-ASYM": None,
        "W8A16": BF16,
        "MXFP4A16": BF16,
        "NVFP4A16": BF16,
        "W8A8": ACTIVATIONS,
        "FP8_DYNAMIC": ACTIVATIONS,
        "FP8_BLOCK": ACTIVATIONS,
        "MXFP8": ACTIVATIONS,
    }
)
FP8_LAYOUT: Final = ("FP8_BLOCK@fp8", "MXFP8@fp8")
# Experts of others; but for the first, transformers alone cannot convert them, or computes them wrong.
OTHERS: Final = ("W4A16", "W4A16-ASYM", "W8A8", "FP8_BLOCK", "MXFP8", "NVFP4A16")
SAME_BYTES: Final = ("MXFP4A16", "MXFP8")  # of others it computes some codes in BF16
DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "howto" / "quantized_sources.md"
ROUTERS: Final = {"qwen3_moe": "gate", "gpt_oss": "router", "deepseek_v3": "gate"}
CASES: Final = [
    *(("gpt_oss", f"{scheme}@compressed-tensors") for scheme in GPT_OSS),
    *(("gpt_oss", scheme) for scheme in FP8_LAYOUT),
    *((kind, f"{scheme}@compressed-tensors") for kind in ("qwen3_moe", "deepseek_v3") for scheme in OTHERS),
]


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    for package in ("transformers", "compressed_tensors", "llmcompressor"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed here; `nox -s engine_transformers` installs it")


@pytest.fixture(scope="module")
def decoded(installed: None, quantized: Make, run_engine: Any) -> Answers:
    answers: Answers = run_engine("llm_compressor_decoded", [quantized(kind, "native", s) for kind, s in CASES])
    return answers


@pytest.fixture(scope="module")
def expected(installed: None, rebuilt: Make, run_engine: Any) -> Answers:
    answers: Answers = run_engine("transformers_fp32", [rebuilt(*case) for case in CASES])
    return answers


def _sound_logits(answer: Mapping[str, Any]) -> Any:
    """Those of a model that got all its tensors, and no others."""
    assert "refused" not in answer, answer["refused"]
    assert answer["missing"] == []
    return answer["logits"]


@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_tokens_are_those_of_the_weights_that_we_read_back(
    kind: str, scheme: str, decoded: Answers, expected: Answers, quantized: Make, rebuilt: Make, models: Any
) -> None:
    """The other side is transformers' own code for stacks of experts, gate and up in turns."""
    found, twin = decoded[quantized(kind, "native", scheme)], expected[rebuilt(kind, scheme)]
    error = models.relative_error(_sound_logits(found), _sound_logits(twin))
    print(f"\n{kind} {scheme}: relative error of logits {error:.1e}, {found['tokens']}")
    assert error <= FP32
    assert found["tokens"] == twin["tokens"]


def test_gpt_oss_as_a_user_loads_it(quantized: Make, rebuilt: Make, run_engine: Any, models: Any) -> None:
    schemes = {f"{s}@compressed-tensors": bound for s, bound in GPT_OSS.items() if bound is not None}
    found = run_engine("llm_compressor", [quantized("gpt_oss", "native", s) for s in schemes])
    twins = run_engine("transformers", [rebuilt("gpt_oss", s) for s in schemes])
    for scheme, bound in schemes.items():
        ours, twin = found[quantized("gpt_oss", "native", scheme)], twins[rebuilt("gpt_oss", scheme)]
        error = models.relative_error(_sound_logits(ours), twin["logits"])
        print(f"\n{scheme}: relative error of logits {error:.4f}, {ours['tokens']}")
        assert error <= bound, scheme
        if bound == BF16:
            assert ours["tokens"] == twin["tokens"], scheme


@pytest.mark.parametrize("scheme", ["W4A16@auto_round", "W8A16@auto_round"])
def test_auto_round_with_these_experts(
    scheme: str, quantized: Make, rebuilt: Make, run_engine: Any, models: Any
) -> None:
    """With experts of its own it mixes up gate and up."""
    if find_spec("auto_round") is None:
        pytest.skip("auto_round is not installed here; `nox -s engine_auto_round` installs it")
    folder, twin = quantized("gpt_oss", "native", scheme), rebuilt("gpt_oss", scheme)
    found = run_engine("llm_compressor_auto_round", [folder])[folder]
    expected = run_engine("transformers", [twin])[twin]
    error = models.relative_error(_sound_logits(found), expected["logits"])
    print(f"\n{scheme}: relative error of logits {error:.4f}, {found['tokens']}")
    assert error <= BF16
    assert found["tokens"] == expected["tokens"]


def test_the_documented_lines_load_it(quantized: Make, tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(from llmcompressor.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "name-W4A16").symlink_to(quantized("gpt_oss", "native", "W4A16@compressed-tensors"))
    script += "print(model.model.layers[1].mlp.experts[3].gate_proj)"
    told = _run([sys.executable, "-P", "-c", script], tmp_path)
    assert "Linear(in_features=256, out_features=384, bias=True)" in told
    assert "LOAD REPORT" not in told


def test_verify_names_this_way(quantized: Make, models: Any) -> None:
    folder = quantized("gpt_oss", "native", "W4A16@compressed-tensors")
    assert models.judged(folder, "transformers") == "no"  # alone it leaves the experts out
    assert any("llm-compressor" in reason for reason in models.reasons(folder, "transformers"))


@pytest.mark.parametrize("kind", ROUTERS)
def test_it_calls_them_as_we_do(kind: str, source: Make, quantized: Make, compare: Any, tmp_path: Path) -> None:
    schemes = [scheme for scheme in GPT_OSS if kind == "gpt_oss" or scheme == "W4A16"]
    _write(source(kind, "open"), ROUTERS[kind], tmp_path, [s.replace("-", "_") for s in schemes])
    for scheme in schemes:
        theirs, ours = tmp_path / scheme.replace("-", "_"), quantized(kind, "native", f"{scheme}@compressed-tensors")
        assert _shapes(theirs) == _shapes(ours), scheme
        assert _targets(theirs) == _targets(ours), scheme
        if scheme in SAME_BYTES:
            assert compare(ours, theirs)[1] == [], scheme


def _write(folder: Path, router: str, out: Path, schemes: Sequence[str]) -> None:
    script = str(Path(__file__).with_name("llmcompressor_writes.py"))
    _run([sys.executable, script, str(folder), router, str(out), *schemes], out)


def _run(command: Sequence[str], folder: Path) -> str:
    """What it prints; it writes a log where it runs."""
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def _shapes(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> dtype and shape of every tensor."""
    found: dict[str, tuple[str, list[int]]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in sorted(file.keys())}
            found |= {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    return found


def _targets(folder: Path) -> Any:
    """What the configuration says is quantized, and what not."""
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = [(group["targets"], group["format"]) for group in block["config_groups"].values()]
    return block["quant_method"], block["format"], groups, sorted(block["ignore"])
