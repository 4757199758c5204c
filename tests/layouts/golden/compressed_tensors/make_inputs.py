"""Write the weights that the golden files of four layouts (this one, mlx, awq, fp8) were made from:

    python make_inputs.py

`plain` has rows that are easy to get wrong (zeros, one value, exact ties, limits of exponent rules, one sign, -0) and
normal ones; `extreme` has huge and tiny values of its dtype; `ragged` fits no block, and its last blocks are zeros.
"""

from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

HERE: Final = Path(__file__).parent / "inputs"
COLUMNS: Final = 256
DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Ties of FP4, FP6 and FP8 where the scale is 1.
FP4_TIES: Final = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
FP6_TIES: Final = (0.0625, 0.1875, 1.0625, 1.1875, 2.125, 2.375, 4.25, 4.75)
FP8_TIES: Final = (2**-10, 3 * 2**-10, 1.0625, 1.1875, 17.0, 19.0, 200.0, 216.0, 432.0)
# Largest magnitudes on both sides of where exponent rules go up: 1.5 (6/4), 1.75 and 1.9375 times a power of two.
LIMITS: Final = (1.0, 1.4921875, 1.5, 1.5078125, 1.7421875, 1.75, 1.9296875, 1.9375)


def repeat_group(values: tuple[float, ...], group: int = 32) -> torch.Tensor:
    """A row whose groups all hold `values` with both signs, padded with zeros."""
    both = [v for value in values for v in (value, -value)]
    return torch.tensor([*both, *[0.0] * (group - len(both))]).repeat(COLUMNS // group)


def make_plain(rng: torch.Generator) -> torch.Tensor:
    """[24, 256] float32; most rows are exact in every dtype."""
    w = torch.randn(24, COLUMNS, generator=rng) * 0.02 * torch.exp(0.5 * torch.randn(24, 1, generator=rng))
    w[-4:].view(-1)[torch.randint(0, 4 * COLUMNS, (12,), generator=rng)] *= 20
    w[0] = 0.0
    w[1] = 0.3
    w[2] = -0.3
    w[3] = repeat_group((6.0, *FP4_TIES))
    w[4] = repeat_group((7.5, *FP6_TIES))
    w[5] = repeat_group((448.0, *FP8_TIES))
    w[6] = torch.arange(COLUMNS) / 2 - 64.0  # ties of 8 bits where the scale is 1 or 1/2
    w[6, 0] = -127.5
    w[7] = repeat_group((7.5, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5))  # ties of symmetric 4 bits
    w[8] = (torch.arange(32) / 2 - 8.0).repeat(COLUMNS // 32)  # ties of asymmetric 4 bits
    w[8, 31::32] = 7.0
    for i, limit in enumerate(LIMITS):
        w[9, 32 * i : 32 * i + 32] = limit * torch.linspace(-0.9, 1.0, 32)
    w[10] = w[10].abs()
    w[11] = -w[11].abs()
    w[12, ::2] = -0.0
    w[13, 0::32], w[13, 1::32] = 0.5, -0.5  # the largest magnitude with both signs
    w[14] = 0.0
    w[14, 5], w[14, 250] = 1.5, -1e-3  # one value in a row of zeros
    w[15] = w[15].sign() * 1e-3
    return w


def make_extreme(dtype: torch.dtype, rng: torch.Generator) -> torch.Tensor:
    """[8, 256] float32: what is huge and tiny in `dtype`, each row of one size."""
    info = torch.finfo(dtype)
    sizes = (info.max / 4, info.max / 2**12, 1e3, 1e-3, 1e-5, info.tiny * 4, info.tiny / 2, info.tiny * 2**20)
    return torch.randn(8, COLUMNS, generator=rng).clamp(-3, 3) * torch.tensor(sizes, dtype=torch.float64)[:, None]


def main() -> None:
    """Write one file for each dtype."""
    HERE.mkdir(exist_ok=True)
    rng = torch.Generator().manual_seed(20261122)
    plain = make_plain(rng)
    ragged = torch.randn(136, 200, generator=rng) * 0.02
    ragged[128:, :128] = 0.0
    ragged[:, 3] *= 30
    for name, dtype in DTYPES.items():
        tensors = {"plain": plain.to(dtype), "extreme": make_extreme(dtype, rng).to(dtype)}
        if name == "BF16":
            tensors["ragged"] = ragged.to(dtype)
        save_file(tensors, HERE / f"{name}.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
