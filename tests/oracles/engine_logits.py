"""Load folders with one engine and save their logits for engine_models.PROMPT, in a process of its own: auto-round and
GPTQModel change classes of transformers when they load a model with experts, and what is loaded afterwards is wrong.

    python engine_logits.py ENGINE RESULTS.pt FOLDER...

RESULTS.pt: folder -> {"logits": float32 [1, tokens, vocabulary], "tokens": the likeliest that follow, "missing": names}
or {"refused": message}.
"""

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


ENGINES: Final[Mapping[str, Callable[[Path], tuple[Any, list[str]]]]] = MappingProxyType(
    {"transformers": load_with_transformers, "auto_round": load_with_auto_round, "gptqmodel": load_with_gptqmodel}
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
