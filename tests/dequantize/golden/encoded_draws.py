"""What cases of encoded weights are made of: random codes, each pattern of which is as likely as any other, scales, and
words of configurations. Needs torch alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch

Tensors = dict[str, torch.Tensor]
MODULE: Final = "model.layers.0.q_proj"
STACK: Final = "model.layers.0.mlp.experts"


@dataclass(frozen=True)
class Case:
    """One encoded weight: `reader` is a key of peer_readers.READERS, `args` what it must be told."""

    kind: str
    name: str
    reader: str
    make: Callable[[torch.Generator], Tensors]
    config: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    weight: str = f"{MODULE}.weight"  # logical name

    @property
    def id(self) -> str:
        """Folder and file name."""
        return f"{self.kind}/{self.name}"


def octets(g: torch.Generator, *shape: int) -> torch.Tensor:
    """uint8 of any value."""
    return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)


def words(g: torch.Generator, *shape: int) -> torch.Tensor:
    """int32 of any value."""
    return octets(g, *shape[:-1], shape[-1] * 4).view(torch.int32)


def e4m3(g: torch.Generator, *shape: int) -> torch.Tensor:
    """Any e4m3 numbers: subnormals, both zeros, no NaN."""
    raw = octets(g, *shape)
    raw[(raw & 0x7F) == 0x7F] = 0x80
    return raw.view(torch.float8_e4m3fn)


def steps(g: torch.Generator, *shape: int) -> torch.Tensor:
    """fp32 scales of many sizes."""
    return torch.exp2(torch.randint(-14, 2, shape, generator=g)) * (1 + torch.rand(shape, generator=g))


def powers(g: torch.Generator, *shape: int) -> torch.Tensor:
    """Exponent bytes: common ones, with the smallest (2^-127, a subnormal of fp32) among them."""
    raw = torch.randint(100, 140, shape, generator=g, dtype=torch.uint8)
    return torch.where(torch.rand(shape, generator=g) < 0.05, torch.zeros((), dtype=torch.uint8), raw)


def e8m0(g: torch.Generator, *shape: int) -> torch.Tensor:
    """The same as float8_e8m0fnu."""
    return powers(g, *shape).view(torch.float8_e8m0fnu)


def small_scales(g: torch.Generator, *shape: int) -> torch.Tensor:
    """e4m3 scales: positive, some zero or subnormal."""
    return (e4m3(g, *shape).view(torch.uint8) & 0x7F).view(torch.float8_e4m3fn)


def ct_config(weights: dict[str, Any], fmt: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "format": fmt}
    return {"quantization_config": {"quant_method": "compressed-tensors", "format": fmt, "config_groups": {"g": group}}}


def int_weights(bits: int, group: int | None, symmetric: bool) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}


def float_weights(bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "symmetric": True, **more}


def of_module(**parts: torch.Tensor) -> Tensors:
    return {f"{MODULE}.{k}": v for k, v in parts.items()}
