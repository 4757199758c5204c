"""Where a block is computed while it is tuned: its weights, its inputs and its loss go there, and codes come back."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch

from shardq.errors import BadOption
from shardq.tune.activations import CPU

AUTO: Final = "auto"
CUDA: Final = "cuda"
WORKSPACE: Final = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses cuBLAS among deterministic ones


@dataclass(frozen=True, slots=True)
class ComputeOptions:
    """Under auto-round's names."""

    device: str = "cpu"  # auto, cpu, cuda, cuda:N or N
    low_gpu_mem_usage: bool = False  # hidden states stay in main memory, and go to the device batch by batch
    enable_deterministic_algorithms: bool = False  # torch refuses what it cannot compute twice alike

    def place(self) -> torch.device:
        """The device. Raises BadOption for one that is not there, and for several."""
        word = self.device.strip().lower()
        if "," in word:
            raise BadOption(f"--device {self.device}: a block is computed on one device; name one, as cuda:0")
        word = f"{CUDA}:{word}" if word.isdecimal() else word
        if word == AUTO:
            word = CUDA if torch.cuda.is_available() else "cpu"
        kind, _, number = word.partition(":")
        if kind not in ("cpu", CUDA) or (number and not number.isdecimal()) or (kind == "cpu" and number):
            raise BadOption(f"--device {self.device}: expected auto, cpu, cuda, cuda:N or N")
        if kind == CUDA and int(number or 0) >= torch.cuda.device_count():
            raise BadOption(
                f"--device {self.device}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; "
                "take --device cpu, or a torch that is built for CUDA"
            )
        return torch.device(kind, int(number or 0)) if kind == CUDA else CPU


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
