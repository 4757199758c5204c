"""Quantize a folder with GPTQModel itself, in a process of its own, to integers of 8 bits in groups of 128.

python gptqmodel_writes.py FOLDER OUT
"""

import os
import sys
from typing import Any, Final

import torch
from engine_models import VOCABULARY  # beside this file

SAMPLES, TOKENS = 8, 64
WORKERS: Final = "2"  # as many as it asks for itself, whatever the machine has


def main() -> None:
    """Random tokens are its data."""
    os.environ["GPTQMODEL_CPU_WORKERS"] = WORKERS
    from gptqmodel import GPTQModel, QuantizeConfig

    folder, out = sys.argv[1:]
    rng = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY - 32, (SAMPLES, 1, TOKENS), generator=rng)
    data: list[dict[str, Any]] = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]
    with torch.compiler.set_stance("force_eager"):  # compiling takes minutes
        config = QuantizeConfig(bits=8, group_size=128, desc_act=False)
        model = GPTQModel.load(folder, config, device="cpu", dtype=torch.bfloat16)
        model.quantize(data, batch_size=1)
        model.save(out)


if __name__ == "__main__":
    main()
