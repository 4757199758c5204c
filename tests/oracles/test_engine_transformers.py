"""What we write as compressed-tensors, in transformers with compressed-tensors (5.23.0, 0.20.0): the logits of a model
with our dequantized weights, to the bit, wherever it loads; and where it does not, so that README.md stays true."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pytest
import torch

pytestmark = pytest.mark.oracle

MakePair = Callable[[str, str], Any]
EXACT: Final = 0.0
# Relative error of the logits where the engine quantizes activations too, and the largest that was measured.
INT8, FP8, FP4 = 0.03, 0.07, 0.25  # 0.019, 0.047, 0.19
MISMATCH: Final = "ignore_mismatched_sizes"  # packed zero points, expected unpacked ones
CONVERSION: Final = "automatic conversion of the weights"  # experts whose scales it cannot stack
Outcome = float | str  # an error of the logits, or what the engine says when it refuses

# model -> scheme -> by default, and with dequantize=True
OUTCOMES: Final[dict[str, dict[str, tuple[Outcome, Outcome]]]] = {
    "qwen3": {
        "W2A16": (EXACT, EXACT),
        "W3A16": (EXACT, EXACT),
        "W4A16": (EXACT, EXACT),
        "W4A16-ASYM": (MISMATCH, EXACT),
        "W8A16": (EXACT, EXACT),
        "W8A8": (INT8, EXACT),
        "FP8_DYNAMIC": (FP8, EXACT),
        "FPW8A16": (EXACT, EXACT),
        "FP8_BLOCK": (FP8, EXACT),
        "MXFP4": (FP4, EXACT),
        "MXFP4A16": (EXACT, EXACT),
        "MXFP6A16": (EXACT, EXACT),
        "MXFP8": (FP8, EXACT),
        "MXFP8A16": (EXACT, EXACT),
    },
    "qwen3_moe": {
        "W2A16": (EXACT, EXACT),
        "W3A16": (EXACT, EXACT),
        "W4A16": (EXACT, EXACT),
        "W4A16-ASYM": (CONVERSION, CONVERSION),
        "W8A16": (EXACT, EXACT),
        "W8A8": (CONVERSION, CONVERSION),
        "FP8_DYNAMIC": (FP8, EXACT),
        "FPW8A16": (EXACT, EXACT),
        "FP8_BLOCK": (CONVERSION, CONVERSION),
        "MXFP4": (FP4, EXACT),
        "MXFP4A16": (EXACT, EXACT),
        "MXFP6A16": (EXACT, EXACT),
        "MXFP8": (CONVERSION, CONVERSION),
        "MXFP8A16": (CONVERSION, CONVERSION),
    },
}
CASES: Final = [
    pytest.param(kind, scheme, dequantize, outcome, id=f"{kind}-{scheme}-{'dequantized' if dequantize else 'default'}")
    for kind, schemes in OUTCOMES.items()
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


@pytest.mark.parametrize(("kind", "scheme", "dequantize", "outcome"), CASES)
def test_compressed_tensors_in_transformers(
    kind: str, scheme: str, dequantize: bool, outcome: Outcome, models: Any, make_pair: MakePair, load: Any
) -> None:
    pair = make_pair(kind, f"{scheme}@compressed-tensors")
    if isinstance(outcome, str):
        with pytest.raises(RuntimeError, match=outcome):
            load(pair.quantized, dequantize)
        return
    tokens = torch.tensor([models.PROMPT])
    with torch.no_grad():
        ours, theirs = load(pair.twin)(tokens).logits, load(pair.quantized, dequantize)(tokens).logits
    if outcome == EXACT:
        assert torch.equal(ours, theirs)
    else:  # not equal: activations must have been quantized
        assert 0 < models.relative_error(theirs, ours) <= outcome
