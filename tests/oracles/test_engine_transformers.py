"""What we write as compressed-tensors and fp8, in transformers with compressed-tensors (5.23.0, 0.20.0): the logits of
a model with our dequantized weights, to the bit, wherever it loads; where it does not, what it says."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from shardq import Limits, make_recipe, quantize

pytestmark = pytest.mark.oracle

MakePair = Callable[..., Any]
EXACT: Final = 0.0
# Relative error of the logits where the engine quantizes activations too, and the largest that was measured.
INT8, FP8, FP4, INT4 = 0.03, 0.07, 0.25, 0.3  # 0.019, 0.047, 0.19, 0.25
WRONG: Final = 0.3  # at least this, without a word
MISMATCH: Final = "ignore_mismatched_sizes"  # packed zero points, expected unpacked ones
CONVERSION: Final = "automatic conversion of the weights"  # experts whose scales it cannot stack
Outcome = float | str  # an error of the logits, or what the engine says when it refuses

# model -> scheme -> by default, and with dequantize=True
COMPRESSED_TENSORS: Final[dict[str, dict[str, tuple[Outcome, Outcome]]]] = {
    "qwen3": {
        "W2A16": (EXACT, EXACT),
        "W3A16": (EXACT, EXACT),
        "W4A16": (EXACT, EXACT),
        "W4A16G32": (EXACT, EXACT),
        "W4A16CH": (EXACT, EXACT),
        "W4A16-ASYM": (MISMATCH, EXACT),
        "W5A16": (EXACT, EXACT),
        "W6A16": (EXACT, EXACT),
        "W7A16": (EXACT, EXACT),
        "W8A16": (EXACT, EXACT),
        "W4A4": (INT4, EXACT),
        "W4A8": (INT8, EXACT),
        "W4AFP8": (FP8, EXACT),
        "W8A8": (INT8, EXACT),
        "FP8_DYNAMIC": (FP8, EXACT),
        "FP8_TENSOR": (FP8, EXACT),
        "FPW8A16": (EXACT, EXACT),
        "FPW8A16_TENSOR": (EXACT, EXACT),
        "FP8_BLOCK": (FP8, EXACT),
        "MXFP4": (FP4, EXACT),
        "MXFP4A16": (EXACT, EXACT),
        "MXFP4XFP8": (FP8, EXACT),
        "MXFP6A8": (FP8, EXACT),
        "MXFP6A16": (EXACT, EXACT),
        "MXFP8": (FP8, EXACT),
        "MXFP8A16": (EXACT, EXACT),
        "NVFP4A16": (EXACT, EXACT),
    },
    "qwen3_moe": {
        "W2A16": (EXACT, EXACT),
        "W3A16": (EXACT, EXACT),
        "W4A16": (EXACT, EXACT),
        "W4A16G32": (EXACT, EXACT),
        "W4A16CH": (EXACT, EXACT),
        "W4A16_MIXED": (EXACT, EXACT),
        "W4A16-ASYM": (CONVERSION, CONVERSION),
        "W5A16": (EXACT, EXACT),
        "W8A16": (EXACT, EXACT),
        "W4A4": (INT4, EXACT),
        "W4A8": (INT8, EXACT),
        "W4AFP8": (FP8, EXACT),
        "W8A8": (CONVERSION, CONVERSION),
        "FP8_DYNAMIC": (FP8, EXACT),
        "FP8_TENSOR": (FP8, EXACT),
        "FPW8A16": (EXACT, EXACT),
        "FPW8A16_TENSOR": (EXACT, EXACT),
        "FP8_BLOCK": (CONVERSION, CONVERSION),
        "MXFP4": (FP4, EXACT),
        "MXFP4A16": (EXACT, EXACT),
        "MXFP4XFP8": (FP8, EXACT),
        "MXFP6A8": (FP8, EXACT),
        "MXFP6A16": (EXACT, EXACT),
        "MXFP8": (CONVERSION, CONVERSION),
        "MXFP8A16": (CONVERSION, CONVERSION),
    },
}
FP8_LAYOUT: Final = [(kind, scheme) for kind in ("qwen3", "qwen3_moe") for scheme in ("FP8_BLOCK", "MXFP8")]
CASES: Final = [
    pytest.param(kind, scheme, dequantize, outcome, id=f"{kind}-{scheme}-{'dequantized' if dequantize else 'default'}")
    for kind, schemes in COMPRESSED_TENSORS.items()
    for scheme, outcomes in schemes.items()
    for dequantize, outcome in zip((False, True), outcomes, strict=True)
]


@pytest.fixture(scope="module")
def transformers() -> Any:
    if find_spec("compressed_tensors") is None:
        pytest.skip("compressed-tensors is not installed here; `nox -s engine_transformers` installs it")
    return pytest.importorskip("transformers", reason="`nox -s engine_transformers` installs transformers")


@pytest.fixture(scope="module")
def load(transformers: Any) -> Callable[..., Any]:
    """A function that loads a folder in BF16, and fails where a tensor is missing or left over."""

    def load(folder: Path, dequantize: bool = False) -> Any:
        config = transformers.CompressedTensorsConfig(dequantize=True) if dequantize else None
        words = {} if config is None else {"quantization_config": config}
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, output_loading_info=True, **words
        )
        assert not any(found.values()), found
        return model

    return load


def logits(model: Any, models: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.tensor([models.PROMPT])).logits
    return result


@pytest.mark.parametrize(("kind", "scheme", "dequantize", "outcome"), CASES)
def test_compressed_tensors(
    kind: str, scheme: str, dequantize: bool, outcome: Outcome, models: Any, make_pair: MakePair, load: Any
) -> None:
    pair = make_pair(kind, f"{scheme}@compressed-tensors")
    if isinstance(outcome, str):
        with pytest.raises(RuntimeError, match=outcome):
            load(pair.quantized, dequantize)
        return
    ours = models.transformers_logits(pair.twin, torch.bfloat16)
    theirs = logits(load(pair.quantized, dequantize), models)
    error = models.relative_error(theirs, ours)
    if outcome == EXACT:
        assert torch.equal(ours, theirs), error
    else:  # not equal: activations must have been quantized
        assert 0 < error <= outcome


@pytest.mark.parametrize(
    ("kind", "scheme", "outcomes"), [(k, s, o) for k, rows in COMPRESSED_TENSORS.items() for s, o in rows.items()]
)
def test_verify_says_so(
    kind: str, scheme: str, outcomes: tuple[Outcome, Outcome], transformers: Any, models: Any, make_pair: MakePair
) -> None:
    judged = models.judged(make_pair(kind, f"{scheme}@compressed-tensors").quantized, "transformers")
    by_default, dequantized = (isinstance(outcome, float) for outcome in outcomes)
    assert judged in ({"loads", "limits"} if by_default else {"limits"} if dequantized else {"no"})


@pytest.mark.parametrize(("kind", "scheme"), FP8_LAYOUT)
def test_native_fp8(kind: str, scheme: str, models: Any, make_pair: MakePair, load: Any) -> None:
    pair = make_pair(kind, f"{scheme}@fp8")
    assert models.judged(pair.quantized, "transformers") in {"loads", "limits"}
    ours = models.transformers_logits(pair.twin, torch.bfloat16)
    assert torch.equal(ours, logits(load(pair.quantized), models))


@pytest.mark.parametrize("dequantize", [False, True])
def test_experts_of_nvfp4_are_computed_without_their_global_scale(
    dequantize: bool, models: Any, make_pair: MakePair, load: Any
) -> None:
    pair = make_pair("qwen3_moe", "NVFP4A16@compressed-tensors")
    assert models.judged(pair.quantized, "transformers") == "no"
    ours = models.transformers_logits(pair.twin, torch.bfloat16)
    assert models.relative_error(logits(load(pair.quantized, dequantize), models), ours) >= WRONG


@pytest.mark.parametrize(
    ("kind", "exceptions"),
    [
        ("qwen3", {"**.o_proj": {"bits": 8}}),
        ("qwen3", {"**.1.mlp.*": {"bits": 16}}),
        ("qwen3_moe", {"**.self_attn.*": {"scheme": "FPW8A16"}}),
        ("qwen3_moe", {"**.self_attn.*": {"bits": 16}}),
    ],
)
def test_exceptions_and_a_quantized_head(
    kind: str, exceptions: dict[str, Any], tmp_path: Path, models: Any, make_pair: MakePair, load: Any,
    write_checkpoint: Any,
) -> None:  # fmt: skip
    source = make_pair(kind, "W4A16@compressed-tensors").source
    recipe = make_recipe("W4A16@compressed-tensors", layer_config=exceptions, quant_lm_head=True)
    out = quantize(source, recipe, output_dir=tmp_path / "out", limits=Limits(parallel=1)).output
    assert "lm_head" in {module.name for module in models.quantized_modules(out)}
    twin = models.write_twin(source, out, tmp_path / "twin", torch.bfloat16, write_checkpoint)
    assert models.judged(out, "transformers") in {"loads", "limits"}
    assert torch.equal(models.transformers_logits(twin, torch.bfloat16), logits(load(out), models))
