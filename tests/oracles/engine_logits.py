"""Load folders with one engine and save their logits for engine_models.PROMPT, in a process of its own: auto-round,
GPTQModel and llm-compressor change classes and tables of transformers when they load a model with experts, and what is
loaded afterwards is wrong.

    python engine_logits.py ENGINE RESULTS.pt FOLDER...

RESULTS.pt: folder -> {"logits": float32 [1, tokens, vocabulary], "tokens": the likeliest that follow, "missing": names}
or {"refused": message}.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from engine_models import NEW_TOKENS, PROMPT  # beside this file


def load_with_transformers(folder: Path) -> tuple[Any, list[str]]:
    """As a user loads it, in BF16."""
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    model, found = load(folder, dtype=torch.bfloat16, output_loading_info=True)
    return model, sorted(found["missing_keys"])


def load_with_auto_round(folder: Path) -> tuple[Any, list[str]]:
    """transformers with auto-round's plain torch code, which computes in BF16."""
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    load, config = AutoModelForCausalLM.from_pretrained, AutoRoundConfig(backend="torch")
    model, found = load(folder, dtype=torch.bfloat16, output_loading_info=True, quantization_config=config)
    return model, sorted(found["missing_keys"])


def load_with_gptqmodel(folder: Path) -> tuple[Any, list[str]]:
    """GPTQModel's own loader and plain torch code, which computes in FP16."""
    from gptqmodel import GPTQModel

    return GPTQModel.load(str(folder), backend="torch", device="cpu", dtype=torch.float16).model, []


def load_with_llm_compressor(folder: Path) -> tuple[Any, list[str]]:
    """transformers with llm-compressor's experts, each matrix a Linear of its own; as a user loads it, in BF16."""
    return _load_single_experts(folder, {})


def load_decoded_with_llm_compressor(folder: Path) -> tuple[Any, list[str]]:
    """The same with codes that are decoded while it loads, in BF16; it computes in FP32."""
    from transformers import CompressedTensorsConfig

    method = json.loads((folder / "config.json").read_text()).get("quantization_config", {}).get("quant_method")
    decode = {"quantization_config": CompressedTensorsConfig(dequantize=True)}  # fp8 is decoded anyway without a GPU
    model, left = _load_single_experts(folder, decode if method == "compressed-tensors" else {})
    return torch.nn.Module.float(model), left  # the model's own refuses what was quantized


def load_auto_round_with_llm_compressor(folder: Path) -> tuple[Any, list[str]]:
    """The same with auto-round's plain torch code, which computes in BF16."""
    from transformers import AutoRoundConfig

    return _load_single_experts(folder, {"quantization_config": AutoRoundConfig(backend="torch")})


def load_in_fp32(folder: Path) -> tuple[Any, list[str]]:
    """transformers alone, in FP32."""
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    model, found = load(folder, dtype=torch.float32, output_loading_info=True)
    return model, sorted(found["missing_keys"])


def _load_single_experts(folder: Path, words: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The model, and whatever is missing, left over or of another shape."""
    from llmcompressor.modeling import patch_moe_mappings
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from transformers import AutoModelForCausalLM

    left: list[str] = []

    class Loader:
        """Keeps the report, which llm-compressor would take for a part of the model."""

        @classmethod
        def from_pretrained(cls, folder: Path, **given: Any) -> Any:
            model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **given)
            left.extend(str(name) for names in found.values() for name in names)
            return model

    with patch_moe_mappings("gpt_oss", []), load_quantizable_moe(Loader):
        model = Loader.from_pretrained(folder, dtype=torch.bfloat16, **words)
    return model, left


ENGINES: Final[Mapping[str, Callable[[Path], tuple[Any, list[str]]]]] = MappingProxyType(
    {
        "transformers": load_with_transformers,
        "transformers_fp32": load_in_fp32,
        "auto_round": load_with_auto_round,
        "gptqmodel": load_with_gptqmodel,
        "llm_compressor": load_with_llm_compressor,
        "llm_compressor_decoded": load_decoded_with_llm_compressor,
        "llm_compressor_auto_round": load_auto_round_with_llm_compressor,
    }
)


def continue_greedily(model: Any) -> list[int]:
    """NEW_TOKENS tokens, each the likeliest, of the whole text anew."""
    tokens = list(PROMPT)
    for _ in range(NEW_TOKENS):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


def main() -> None:
    """Save the results of all folders."""
    engine, results, *folders = sys.argv[1:]
    found: dict[str, dict[str, Any]] = {}
    with torch.compiler.set_stance("force_eager"), torch.no_grad():  # compiling takes minutes
        for folder in folders:
            try:
                model, missing = ENGINES[engine](Path(folder))
                logits = model(torch.tensor([PROMPT])).logits.float()
                found[folder] = {"logits": logits, "tokens": continue_greedily(model), "missing": missing}
            except (RuntimeError, ValueError, KeyError, AttributeError, ImportError, NotImplementedError) as error:
                found[folder] = {"refused": f"{type(error).__name__}: {error}"}
    torch.save(found, results)


if __name__ == "__main__":
    main()
