"""The way of all samples through a model: blocks tuned one after the other, or as groups, and the head behind them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from shardq.errors import BadTuned
from shardq.kernels import load
from shardq.replaced import Replaced, read_whole
from shardq.tune.activation_scales import InputScales, find_input_scales
from shardq.tune.activations import Batch
from shardq.tune.awq_sites import Plain, Site
from shardq.tune.block_awq import scale_block
from shardq.tune.block_gptq import tune_gptq
from shardq.tune.block_rtn import tune_by_importance, tune_nearest
from shardq.tune.blocks import BlockModel
from shardq.tune.chain import Chain
from shardq.tune.device_moves import Devices, lay_out
from shardq.tune.freeing import give_back
from shardq.tune.groups import Group, group_batch, group_subjects
from shardq.tune.head import Logits, head_inputs, head_options
from shardq.tune.norms_biases import put_learned
from shardq.tune.options import TuneOptions
from shardq.tune.served import serving
from shardq.tune.signround import Beside, tune_signround
from shardq.tune.stored import bytes_of, put_replaced
from shardq.tune.subjects import Subject, Subjects
from shardq.tune.work import Changes, Codes, Targets, Work, put_codes
from shardq.tuned import SUFFIX, Tuned, TunedBlocks, TunedWriter, read_block, read_tuned

SEEDS: Final = 1 << 32  # more than a block takes


@dataclass(frozen=True, slots=True)
class Found:
    """What was found for a block, blocks taken as one, or a head; by tensor."""

    codes: Codes
    scales: InputScales  # of activations that are calibrated
    changes: Changes = field(default_factory=Changes)

    def of(self, s: Subject) -> Tuned:
        """What is written of one matrix."""
        return Tuned(s.scheme, self.codes[s.tensor], self.scales.get(s.tensor), self.changes.factors_of(s.tensor))


@dataclass(frozen=True, slots=True)
class Stored:
    """What a block's file holds, by tensor."""

    codes: Codes
    scales: InputScales
    replaced: Mapping[str, Replaced]


@dataclass(frozen=True, slots=True)
class Around:
    """What algorithms know of a block beside its matrices."""

    config: Mapping[str, Any] | None  # config.json
    sites: Sequence[Site] = ()  # where AWQ scales
    plain: Mapping[str, Plain] = field(default_factory=dict)  # parameters that may be others in the output, by names


@dataclass(frozen=True, slots=True)
class Run:
    """A model on its way."""

    model: BlockModel
    options: TuneOptions
    folder: Path
    writer: TunedWriter
    chain: Chain
    devices: Devices
    subjects: Subjects
    parameters: tuple[Mapping[str, str], ...]  # of blocks, by tensors that they are
    sites: tuple[tuple[Site, ...], ...] | None  # of each block where AWQ scales
    plain: tuple[Mapping[str, Plain], ...]  # of each block parameters that may be others in the output

    @property
    def device(self) -> torch.device:
        """Where blocks are computed."""
        return self.chain.inputs.device

    def go(self, told: Callable[[int], None]) -> None:
        """Through all blocks, which are told of when they are done, and the head if that gets codes and lacks them."""
        count = len(self.model.block_names)
        together = self.options.signround.nblocks if self.options.codes == "signround" else 1
        for first in range(0, count, together):
            stop = min(first + together, count)
            self.group(first, stop)
            told(stop)
        if (head := self.subjects.head) and not self.writer.has(head.module):
            self.head(head)

    def group(self, first: int, stop: int) -> None:
        """Tune some blocks as one, or take their codes if those of all are there, and go through them."""
        names = self.model.block_names[first:stop]
        with ExitStack() as stack:
            blocks = []
            for index in range(first, stop):
                blocks.append(stack.enter_context(self.model.block(index)))
                if index + 1 < stop:
                    self.model.prefetch(index + 1)
            self.model.prefetch_beside(stop)
            of_blocks = lay_out(blocks, self.subjects.blocks[first:stop], self.devices)
            wanted = self.chain.enter(blocks, first)
            if all(map(self.writer.has, names)):
                stored = [read_stored(self.folder, n, own) for n, own in zip(names, of_blocks, strict=True)]
            else:
                stored = self._tune(blocks, first, of_blocks, wanted)
            self.model.prefetch(stop)  # into memory not before, so that it is not there while these are tuned
            if stop < len(self.model.block_names) or self.subjects.head:
                self._leave(blocks, first, of_blocks, stored)

    def head(self, subject: Subject) -> None:
        """Tune the output projection, behind all blocks."""
        inputs, plain = self.chain.end(lambda batch: head_inputs(self.model, batch))
        with self.model.head() as module:
            module.to(self.device)
            wanted = None if plain is None else Logits(module, plain.hidden, self.device)
            seed = self.options.data.seed + SEEDS * len(self.model.block_names)
            work = Work(module, 0, (subject,), inputs, wanted, load(), seed)
            options = replace(self.options, signround=head_options(self.options.signround))
            found = tune_block(work, options, Around(self.model.checkpoint.config))
        self._write(subject.module, (subject,), found, {})

    def _tune(
        self, blocks: Sequence[nn.Module], first: int, of_blocks: Sequence[tuple[Subject, ...]], wanted: Targets | None
    ) -> list[Stored]:
        seed = self.options.data.seed + SEEDS * first  # another order of samples for each block
        work = _work_on(blocks, first, of_blocks, self.chain.inputs, wanted, seed)
        give_back()  # what reading has left
        plain = self.plain[first] if len(blocks) == 1 else _joined(self.plain[first : first + len(blocks)])
        sites = self.sites[first] if self.sites else ()
        found = tune_block(work, self.options, Around(self.model.checkpoint.config, sites, plain))
        give_back()
        stored = []
        for index, own in enumerate(of_blocks, first):
            mine = found.changes.replaced.keys() & self.parameters[index].keys()
            changed = {t: bytes_of(found.changes.replaced[t]) for t in sorted(mine)}
            self._write(self.model.block_names[index], own, found, changed)
            stored.append(Stored(found.codes, found.scales, changed))
        return stored

    def _leave(
        self,
        blocks: Sequence[nn.Module],
        first: int,
        of_blocks: Sequence[tuple[Subject, ...]],
        stored: Sequence[Stored],
    ) -> None:
        """Go on with the weights that a server has, and with activations as it has them."""
        with ExitStack() as served:
            for index, (block, own, there) in enumerate(zip(blocks, of_blocks, stored, strict=True), first):
                put_codes(block, own, there.codes, load())
                put_replaced(block, self.parameters[index], there.replaced)
                served.enter_context(serving(block, own if self.options.enable_act_quant else (), there.scales))
            self.chain.leave(blocks, first)

    def _write(self, name: str, subjects: Sequence[Subject], found: Found, changed: Mapping[str, Replaced]) -> None:
        self.writer.write(name, {s.module: found.of(s) for s in subjects}, changed)


def tune_block(work: Work, options: TuneOptions, around: Around) -> Found:
    """Codes of all matrices of a block, and what else it has then. Raises what algorithms do."""
    if not work.subjects:
        return Found({}, {})
    changes, ranges = scale_block(work, around.sites, options.scaling) if around.sites else (Changes(), None)
    scales = find_input_scales(work, around.config)
    if options.codes == "signround":
        learned = Changes()
        with serving(work.block, work.subjects if options.enable_act_quant else (), scales):
            codes = tune_signround(work, options.signround, ranges, Beside(around.plain, learned))
        if scales and learned.replaced:
            put_codes(work.block, work.subjects, codes, work.kernels)
            put_learned(work.block, around.plain, learned.replaced)
            scales = find_input_scales(work, around.config)
        changes.replaced.update(learned.replaced)
    elif options.codes == "gptq":
        codes = tune_gptq(work, options.gptq)
    else:
        codes = tune_by_importance(work) if options.codes == "opt-rtn" else tune_nearest(work)
    return Found(codes, scales, changes)


def read_stored(folder: Path, name: str, subjects: tuple[Subject, ...]) -> Stored:
    """What the file of a finished block holds. Raises BadTuned."""
    found = TunedBlocks()
    read_block(folder / f"{name}{SUFFIX}", found)
    lacking = [s.module for s in subjects if found.shapes.get(s.module) != s.shape]
    if lacking:
        raise BadTuned(f"{folder.name}/{name}{SUFFIX} has no codes of {lacking[0]}: delete the folder and tune again")
    refs = {s.tensor: found.refs[s.module] for s in subjects}
    return Stored(
        {s.tensor: read_tuned(refs[s.tensor], 0, s.shape[0]) for s in subjects},
        {tensor: ref.input_scale for tensor, ref in refs.items() if ref.input_scale},
        {tensor: read_whole(ref) for tensor, ref in found.replaced.items()},
    )


def find_borrowed(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Modules of finished blocks whose activations have the scale of their siblings. Raises BadTuned."""
    found = TunedBlocks()
    for name in names:
        read_block(folder / f"{name}{SUFFIX}", found)
    return tuple(module for module, ref in found.refs.items() if ref.input_scale and ref.input_scale.borrowed)


def _work_on(
    blocks: Sequence[nn.Module], first: int, of_blocks: Sequence[tuple[Subject, ...]], inputs: Batch,
    wanted: Targets | None, seed: int,
) -> Work:  # fmt: skip
    if len(blocks) == 1:
        return Work(blocks[0], first, of_blocks[0], inputs, wanted, load(), seed)
    joined = group_batch(inputs, first, first + len(blocks))
    return Work(Group(blocks), 0, group_subjects(of_blocks), joined, wanted, load(), seed)


def _joined(of_blocks: Sequence[Mapping[str, Plain]]) -> Mapping[str, Plain]:
    """Parameters of some blocks, named as in their group."""
    return {
        f"{place}.{name}": replace(p, parameter=f"{place}.{name}")
        for place, own in enumerate(of_blocks)
        for name, p in own.items()
    }
