"""What we write as mlx, run by mlx-lm on the CPU (mlx 0.32.4, mlx-lm 0.32.2), dense and with experts, in every mode: it
generates, and in float32 its logits are those of transformers with our dequantized weights."""

from collections.abc import Callable
from typing import Any, Final

import pytest
import torch

pytestmark = pytest.mark.oracle

MakePair = Callable[..., Any]
BOUND: Final = 1e-5  # float32 sums in another order: 1e-6 was measured
MODES: Final = (*(f"W{bits}A16G64@mlx" for bits in (2, 3, 4, 5, 6, 8)), "MXFP4@mlx", "MXFP8@mlx", "NVFP4@mlx")


@pytest.fixture(scope="module")
def utils() -> Any:
    core = pytest.importorskip("mlx.core", reason="mlx is not installed here; `nox -s engine_mlx` installs it")
    core.set_default_device(core.cpu)
    return pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed here; `nox -s engine_mlx` installs it")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_mlx_lm_computes_what_we_wrote(kind: str, mode: str, utils: Any, models: Any, make_pair: MakePair) -> None:
    import mlx.core as mx
    import numpy as np
    from mlx_lm.generate import generate_step

    pair = make_pair(kind, mode, torch.float32)
    assert models.judged(pair.quantized, "mlx") in {"loads", "limits"}
    model, _ = utils.load_model(pair.quantized, strict=True)
    tokens = mx.array(models.PROMPT)
    assert len([token for token, _ in generate_step(tokens, model, max_tokens=4)]) == 4
    model.set_dtype(mx.float32)  # in bfloat16 the CPU's sums are, too: 0.04 off, and 0.1 where an expert flips
    theirs = torch.from_numpy(np.array(model(tokens[None])))
    error = models.relative_error(theirs, models.transformers_logits(pair.twin, torch.float32))
    print(f"\n{kind} {mode}: error of the logits {error:.2e}")
    assert error <= BOUND
