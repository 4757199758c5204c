"""Tensors as a checkpoint stores them, and back among the parameters of a block."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import nn

from shardq.replaced import Replaced

STORED: Final[Mapping[str, torch.dtype]] = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def bytes_of(values: torch.Tensor) -> Replaced:
    """A tensor of one of these types, little-endian."""
    dtype = next(tag for tag, kind in STORED.items() if kind == values.dtype)
    data = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return Replaced(dtype, tuple(values.shape), data.numpy().tobytes())


@torch.no_grad()
def put_replaced(block: nn.Module, parameters: Mapping[str, str], replaced: Mapping[str, Replaced]) -> None:
    """Give parameters of a block, named by tensors of the checkpoint, the content that replaces these."""
    for tensor, r in replaced.items():
        values = torch.frombuffer(bytearray(r.data), dtype=STORED[r.dtype])
        block.get_parameter(parameters[tensor]).copy_(values.view(r.shape))
