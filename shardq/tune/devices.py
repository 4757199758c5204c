"""Where a block is computed while it is tuned: its weights, its inputs and its loss go there, and codes come back."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

WORKSPACE: Final = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses cuBLAS among deterministic ones


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """A context in which torch raises for what it cannot compute twice alike, if that is wanted."""
    if not on:
        yield
        return
    before, workspace = torch.are_deterministic_algorithms_enabled(), os.environ.get(WORKSPACE[0])
    os.environ.setdefault(*WORKSPACE)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        if workspace is None:
            del os.environ[WORKSPACE[0]]
