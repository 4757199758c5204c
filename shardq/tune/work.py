"""One block while it is tuned: what goes into it, what should come out, and the codes of its matrices."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shardq.errors import NonFiniteWeight
from shardq.quantizers.buffers import Buffers, buffer_shapes
from shardq.quantizers.decode import decode_rows
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.rtn import quantize_rows
from shardq.schemes import Scheme
from shardq.search import Search, default_search
from shardq.tune.activations import Batch, call_block
from shardq.tune.settings import CPU
from shardq.tune.subjects import Subject
from shardq.tuned import Factors

if TYPE_CHECKING:
    from shardq.kernels import KernelSet

STATS = 6  # figures of a row
DECODED: Final = 1 << 20  # weights that are made of codes at once
Codes = dict[str, Quantized]  # by tensor
Ranges = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # by tensor: ends of each group's range, [rows, groups]


@dataclass(slots=True)
class Changes:
    """What a block has got beside codes: tensors that are others now, in the types of the checkpoint, and what rows and
    columns of matrices were multiplied by, fp32; all by tensor."""

    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    columns: dict[str, torch.Tensor] = field(default_factory=dict)

    def factors_of(self, tensor: str) -> Factors | None:
        """Of one matrix; None where it is as it was."""
        rows, columns = self.rows.get(tensor), self.columns.get(tensor)
        if rows is None and columns is None:
            return None
        return Factors(*(None if v is None else v.cpu().numpy() for v in (rows, columns)))


class Targets(Protocol):
    """What a block should give, sample by sample: a tensor [samples, tokens, width], or what makes parts of one."""

    def __len__(self) -> int: ...

    def __getitem__(self, samples: list[int], /) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Work:
    """A block, blocks taken as one, or a head, with the weights of the checkpoint, which an algorithm may change."""

    block: nn.Module
    index: int
    subjects: tuple[Subject, ...]
    inputs: Batch
    wanted: Targets | None  # what the block gives by its own weights and inputs; None unless the algorithm asks
    kernels: "KernelSet"
    seed: int

    def run(self, part: Batch) -> torch.Tensor:
        """Hidden states behind the block."""
        return call_block(self.block, part, self.index)


Algorithm = Callable[[Work], Codes]


def largest_of(work: Work, others: Mapping[str, torch.Tensor] | None = None) -> Mapping[str, float]:
    """The largest magnitude that each tensor's scales need, for those that need one of more than a group; `others`:
    matrices in place of those that the block has."""
    weights = others or {}
    own = {s.tensor: float(weights.get(s.tensor, s.weight(work.block)).abs().max()) for s in work.subjects if s.reach}
    return {s.tensor: max(own[n] for n in s.reach) for s in work.subjects if s.reach}


def rows_of(block: nn.Module, subjects: Iterable[Subject]) -> NDArray[np.float32]:
    """Matrices with the same columns, which may lie on several devices, one below the other, in fp32; what is so
    already is not copied."""
    parts = [s.weight(block).detach().float().cpu() for s in subjects]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    found: NDArray[np.float32] = whole.contiguous().numpy()
    return found


def quantize_alone(
    weight: NDArray[np.float32],
    subject: Subject,
    kernels: "KernelSet",
    amax: float | None,
    importance: NDArray[np.float32] | None = None,
    search: Search | None = None,
) -> Quantized:
    """The nearest codes, under round-to-nearest's scales, or with importance [columns] under those that `search` finds,
    by default the one that measured best. Raises NonFiniteWeight."""
    rows, columns = weight.shape
    scheme = subject.scheme
    buffers = Buffers(*(np.zeros(shape, kind) for shape, kind in buffer_shapes(rows, columns, scheme)))
    chosen = None if importance is None else search or default_search(scheme, weighted=True)
    found, bad = quantize_rows(
        weight, "F32", scheme, buffers, np.empty((rows, STATS)), kernels, amax, subject.dtype, chosen,
        importance if chosen else None,
    )  # fmt: skip
    if bad:
        raise NonFiniteWeight(
            f"{subject.tensor}: {bad} groups hold NaN or infinity, or need a scale beyond {scheme.scale}; "
            "is the checkpoint damaged?"
        )
    return found


def put_codes(
    block: nn.Module, subjects: Iterable[Subject], codes: Mapping[str, Quantized], kernels: "KernelSet"
) -> None:
    """Replace weights by what their codes stand for."""
    with torch.no_grad():
        for s in (s for s in subjects if s.tensor in codes):
            put_rows(s.weight(block), codes[s.tensor], s.scheme, kernels)


def put_rows(weight: torch.Tensor, codes: Quantized, scheme: Scheme, kernels: "KernelSet") -> None:
    """What codes stand for, in place of a weight [rows, columns], in its type; for some rows at once."""
    if weight.dtype == torch.float32 and weight.device.type == CPU and weight.is_contiguous():
        decode_rows(codes, scheme, kernels, weight.detach().numpy())
        return
    step = max(1, DECODED // weight.shape[1])
    for row in range(0, len(weight), step):
        values = decode_rows(codes.rows(slice(row, row + step)), scheme, kernels)
        weight[row : row + step] = torch.from_numpy(values)
