"""Hidden states of all samples on their way through the blocks: with the checkpoint's weights, and with those that
codes stand for."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from shardq.errors import BudgetTooSmall
from shardq.files.atomic import writing
from shardq.tune.activations import CPU, Batch
from shardq.tune.blocks import BlockModel


@dataclass(slots=True)
class Chain:
    """Both ways. Where codes do not feed the next block, `inputs` is what the plain way gave to this one."""

    model: BlockModel
    inputs: Batch  # of the block that is tuned next
    plain: Batch | None  # the way without codes; None if nobody asks for it
    quanted: bool  # what a block with codes gives is the next one's input

    def enter(self, blocks: Sequence[nn.Module], first: int) -> torch.Tensor | None:
        """Take the plain way through some blocks; returns what it gave behind the last."""
        if self.plain is None:
            return None
        if not self.quanted:
            self.inputs.hidden[:] = self.plain.hidden
        for index, block in enumerate(blocks, first):
            self.model.advance(block, self.plain, index)
        return self.plain.hidden

    def leave(self, blocks: Sequence[nn.Module], first: int) -> None:
        """Take the other way through the blocks, which have the weights of their codes now."""
        if self.quanted:
            for index, block in enumerate(blocks, first):
                self.model.advance(block, self.inputs, index)

    def end(self, change: Callable[[Batch], Batch]) -> tuple[Batch, Batch | None]:
        """Inputs of what comes behind the last block, and the same on the plain way, by what `change` makes of each."""
        if self.plain is None:
            return change(self.inputs), None
        plain = change(self.plain)
        return (change(self.inputs) if self.quanted else plain), plain


def begin_chain(
    model: BlockModel, ids: torch.Tensor, *, plain: bool, quanted: bool, max_ram_bytes: int | None, folder: Path,
    device: torch.device = CPU, resident: bool = True,
) -> Chain:  # fmt: skip
    """Samples [n, tokens] before the first block, which is computed on a device; hidden states lie there, too, if
    `resident`, else in main memory. Those beyond `max_ram_bytes` lie in files of `folder` that have no name, so that
    nothing is left behind. Raises DiskFull, NotWritable, BudgetTooSmall."""
    batch = model.embed(ids)
    size = batch.hidden.numel() * batch.hidden.element_size()
    in_files = is_spooled(size, 1 + plain, max_ram_bytes)
    if in_files and max_ram_bytes is not None and size // len(ids) > max_ram_bytes:
        raise BudgetTooSmall(
            f"--max-ram of {max_ram_bytes} bytes: one sample's hidden states take {size // len(ids)}; ask for shorter "
            "samples, or allow more"
        )
    batch = batch.on(device, whole=resident and not in_files)
    inputs = batch.moved(spooled(batch.hidden, folder)) if in_files else batch
    if not plain:
        return Chain(model, inputs, None, quanted)
    other = spooled(batch.hidden, folder) if in_files else batch.hidden.clone()
    return Chain(model, inputs, batch.moved(other), quanted)


def is_spooled(hidden_bytes: int, chains: int, max_ram_bytes: int | None) -> bool:
    """True if hidden states that so many chains have each lie in files."""
    return max_ram_bytes is not None and chains * hidden_bytes > max_ram_bytes


def spooled(hidden: torch.Tensor, folder: Path) -> torch.Tensor:
    """A copy in a file of `folder` without a name, which the system may write out whenever it needs the memory. Raises
    DiskFull, NotWritable."""
    size = hidden.numel() * hidden.element_size()
    with writing(folder), tempfile.NamedTemporaryFile(dir=folder, prefix=".hidden-", suffix=".tmp") as file:
        file.truncate(size)
        made = torch.from_file(file.name, shared=True, size=hidden.numel(), dtype=hidden.dtype)
    copied = made.view(hidden.shape)
    copied.copy_(hidden)
    return copied
