"""Quantize a folder with llm-compressor itself, in a process of its own, without data, as it lists schemes.

python llmcompressor_writes.py FOLDER ROUTER OUT SCHEME...     ROUTER: the name of modules that choose experts
"""

import sys
from pathlib import Path

import torch


def main() -> None:
    """OUT gets a folder for each scheme."""
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    folder, router, out, *schemes = sys.argv[1:]
    for scheme in schemes:
        with load_quantizable_moe():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        ignore = ["lm_head", f"re:.*\\.{router}$"]
        oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=ignore))
        model.save_pretrained(Path(out, scheme), save_compressed=True)


if __name__ == "__main__":
    main()
