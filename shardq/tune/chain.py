"""Hidden states of all samples on their way through the blocks: with the checkpoint's weights, and with those that
codes stand for."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from shardq.errors import BudgetTooSmall
from shardq.files.atomic import writing
from shardq.tune.activations import Batch
from shardq.tune.blocks import BlockModel


@dataclass(slots=True)
class Chain:
    """Both ways. Where codes do not feed the next block, `inputs` is what the plain way gave to this one."""

    model: BlockModel
    inputs: Batch  # of the block that is tuned next
    plain: Batch | None  # the way without codes; None if nobody asks for it
    quanted: bool  # what a block with codes gives is the next one's input

    def enter(self, block: nn.Module, index: int) -> torch.Tensor | None:
        """Take the plain way through a block; returns what it gave there."""
        if self.plain is None:
            return None
        if not self.quanted:
            self.inputs.hidden[:] = self.plain.hidden
        self.model.advance(block, self.plain, index)
        return self.plain.hidden

    def leave(self, block: nn.Module, index: int) -> None:
        """Take the other way through the block, which has the weights of its codes now."""
        if self.quanted:
            self.model.advance(block, self.inputs, index)


def begin_chain(
    model: BlockModel, ids: torch.Tensor, *, plain: bool, quanted: bool, max_ram_bytes: int | None, folder: Path
) -> Chain:
    """Samples [n, tokens] before the first block. Hidden states beyond `max_ram_bytes` lie in files of `folder` that
    have no name, so that nothing is left behind. Raises DiskFull, NotWritable, BudgetTooSmall."""
    batch = model.embed(ids)
    plain = plain or not quanted
    size = batch.hidden.numel() * batch.hidden.element_size()
    in_files = max_ram_bytes is not None and (1 + plain) * size > max_ram_bytes
    if in_files and max_ram_bytes is not None and size // len(ids) > max_ram_bytes:
        raise BudgetTooSmall(
            f"--max-ram of {max_ram_bytes} bytes: one sample's hidden states take {size // len(ids)}; ask for shorter "
            "samples, or allow more"
        )
    inputs = batch.moved(spooled(batch.hidden, folder)) if in_files else batch
    if not plain:
        return Chain(model, inputs, None, quanted)
    other = spooled(batch.hidden, folder) if in_files else batch.hidden.clone()
    return Chain(model, inputs, batch.moved(other), quanted)


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
