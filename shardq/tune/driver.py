"""A model tuned block by block: codes of every matrix that a plan quantizes, into a folder, one file for each block.

What is finished stays: the same call goes on behind the last block that is there. Hidden states are not saved; the
finished blocks are run again with their codes, which costs a pass through each and gives the same numbers, so that the
files are those of a run that was never stopped.
"""

import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from shardq.errors import BadOption, BadTuned
from shardq.files.atomic import reading, write_atomic, writing
from shardq.kernels import load
from shardq.lock import FolderLock
from shardq.plans import make_plan
from shardq.recipe import Recipe
from shardq.sources.base import Source
from shardq.tune.activation_scales import InputScales, find_input_scales
from shardq.tune.activations import Batch
from shardq.tune.block_gptq import tune_gptq
from shardq.tune.block_rtn import tune_by_importance, tune_nearest
from shardq.tune.blocks import BlockModel
from shardq.tune.chain import Chain, begin_chain
from shardq.tune.data import Samples, load_samples
from shardq.tune.data_self import sample_self
from shardq.tune.devices import deterministic
from shardq.tune.disk import check_disk
from shardq.tune.groups import Group, group_batch, group_subjects
from shardq.tune.head import Logits, head_inputs, head_options
from shardq.tune.options import TuneOptions
from shardq.tune.rounding import check_scheme
from shardq.tune.signround import tune_signround
from shardq.tune.subjects import Subject, Subjects, check_left, find_subjects
from shardq.tune.tokenizing import Tokenizer, open_tokenizer
from shardq.tune.work import Codes, Work, put_codes
from shardq.tuned import SUFFIX, Tuned, TunedRef, TunedWriter, read_block, read_tuned

SEEDS: Final = 1 << 32  # more than a block takes
IDS: Final = "ids.npy"  # of the samples, beside the blocks
LOCK: Final = "lock"  # beside them; stays, empty
Told = Callable[[int, int], None]  # blocks done, and all


@dataclass(frozen=True, slots=True)
class TuneResult:
    """What became of a model."""

    folder: Path
    blocks: int
    resumed: int  # blocks that were there before
    modules: int  # with tuned codes
    left: tuple[str, ...]  # modules that get codes, but none of these: the main job makes them
    samples: int
    tokens: int
    dropped: int  # samples that were too short
    borrowed: tuple[str, ...]  # modules of experts that no token went to: scales of activations are their siblings'


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run works, how much memory hidden states may have, and how much disk all that it writes."""

    folder: Path
    max_ram_bytes: int | None = None
    max_disk_bytes: int | None = None


def tune_blocks(
    source: Source, recipe: Recipe, options: TuneOptions, place: Place, *, trust_remote_code: bool = False,
    report: Told | None = None,
) -> TuneResult:  # fmt: skip
    """Tune what `recipe` quantizes into `place.folder`. Raises BadOption for what cannot be tuned, OutputLocked for a
    folder that another run works in, RecipeChanged for one that was begun otherwise, BudgetTooSmall for one that must
    not become as large, and what planning and reading raise."""
    _refuse(recipe)
    options.compute.place()
    dtype = None if options.precision == "auto" else getattr(torch, options.precision)
    with ExitStack() as stack:
        stack.enter_context(deterministic(options.compute.enable_deterministic_algorithms))
        model = stack.enter_context(BlockModel.open(source, dtype=dtype, trust_remote_code=trust_remote_code))
        plan = make_plan(model.checkpoint, recipe, before_tuning=True)
        subjects = find_subjects(model, plan)
        check_left(subjects, plan)
        if not any(subjects.blocks) and subjects.head is None:
            raise BadOption(f"{source.label}: nothing in its blocks gets codes that can be tuned")
        for s in subjects.all() if options.algorithm == "signround" else ():
            check_scheme(s.scheme)
        data, chains = options.data, 2 if options.has_plain_chain else 1
        check_disk(model, subjects, data.nsamples, data.seqlen, chains, place.max_ram_bytes, place.max_disk_bytes)
        stack.enter_context(_lock(place.folder))
        writer = TunedWriter(place.folder, {**plan.identity(), **options.as_dict()})
        names = model.block_names
        resumed = next((i for i, name in enumerate(names) if not writer.has(name)), len(names))
        ids, dropped = _samples(model, options, open_tokenizer(source, trust_remote_code), place)
        head = subjects.head if subjects.head and not writer.has(subjects.head.module) else None
        if resumed < len(names) or head:
            run = _Run(model, options, place.folder, writer, _begin(model, ids, options, place), subjects)
            together = options.signround.nblocks if options.algorithm == "signround" else 1
            for first in range(0, len(names), together):
                stop = min(first + together, len(names))
                run.group(first, stop)
                if report:
                    report(stop, len(names))
            if head:
                run.head(head)
        writer.finish()
        return TuneResult(
            place.folder, len(names), resumed, sum(1 for _ in subjects.all()), subjects.left, len(ids), ids.numel(),
            dropped, _borrowed(place.folder, names),
        )  # fmt: skip


def _lock(folder: Path) -> FolderLock:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return FolderLock(folder / LOCK)


def _refuse(recipe: Recipe) -> None:
    if recipe.gguf:
        raise BadOption(f"{recipe.preset}: blocks of GGUF files cannot be tuned yet; give --importance to quantize")
    if recipe.fold or recipe.importance:
        raise BadOption("tuning takes weights as the source has them: leave --fold and --importance out")
    if recipe.purpose != "quantize":
        raise BadOption("only what is quantized can be tuned")


def _begin(model: BlockModel, ids: torch.Tensor, options: TuneOptions, place: Place) -> Chain:
    return begin_chain(
        model, ids, plain=options.has_plain_chain, quanted=options.enable_quanted_input,
        max_ram_bytes=place.max_ram_bytes, folder=place.folder,
        device=options.compute.place(), resident=not options.compute.low_gpu_mem_usage,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Run:
    """A model on its way."""

    model: BlockModel
    options: TuneOptions
    folder: Path
    writer: TunedWriter
    chain: Chain
    subjects: Subjects

    @property
    def device(self) -> torch.device:
        """Where blocks are computed."""
        return self.chain.inputs.device

    def group(self, first: int, stop: int) -> None:
        """Tune some blocks as one, or take their codes if those of all are there, and go through them."""
        names, kernels = self.model.block_names[first:stop], load()
        of_blocks = self.subjects.blocks[first:stop]
        with ExitStack() as stack:
            blocks = []
            for index in range(first, stop):
                blocks.append(stack.enter_context(self.model.block(index)).to(self.device))
                self.model.prefetch(index + 1)
            wanted = self.chain.enter(blocks, first)
            if all(map(self.writer.has, names)):
                found = [_read(self.folder, name, own) for name, own in zip(names, of_blocks, strict=True)]
                codes = {tensor: q for own in found for tensor, q in own.items()}
            else:
                seed = self.options.data.seed + SEEDS * first  # another order of samples for each block
                work = _work_on(blocks, first, of_blocks, self.chain.inputs, wanted, seed)
                scales = find_input_scales(work, self.model.checkpoint.config)
                codes = _tune(work, self.options)
                for name, own in zip(names, of_blocks, strict=True):
                    self._write(name, own, codes, scales)
            if stop < len(self.model.block_names) or self.subjects.head:
                for block, own in zip(blocks, of_blocks, strict=True):
                    put_codes(block, own, codes, kernels)
                self.chain.leave(blocks, first)

    def head(self, subject: Subject) -> None:
        """Tune the output projection, behind all blocks."""
        inputs, plain = self.chain.end(lambda batch: head_inputs(self.model, batch))
        with self.model.head() as module:
            module.to(self.device)
            wanted = None if plain is None else Logits(module, plain.hidden, self.device)
            seed = self.options.data.seed + SEEDS * len(self.model.block_names)
            work = Work(module, 0, (subject,), inputs, wanted, load(), seed)
            scales = find_input_scales(work, self.model.checkpoint.config)
            codes = _tune(work, replace(self.options, signround=head_options(self.options.signround)))
        self._write(subject.module, (subject,), codes, scales)

    def _write(self, name: str, subjects: Sequence[Subject], codes: Codes, scales: InputScales) -> None:
        self.writer.write(name, {s.module: Tuned(s.scheme, codes[s.tensor], scales.get(s.tensor)) for s in subjects})


def _work_on(
    blocks: Sequence[nn.Module], first: int, of_blocks: Sequence[tuple[Subject, ...]], inputs: Batch,
    wanted: torch.Tensor | None, seed: int,
) -> Work:  # fmt: skip
    if len(blocks) == 1:
        return Work(blocks[0], first, of_blocks[0], inputs, wanted, load(), seed)
    joined = group_batch(inputs, first, first + len(blocks))
    return Work(Group(blocks), 0, group_subjects(of_blocks), joined, wanted, load(), seed)


def _tune(work: Work, options: TuneOptions) -> Codes:
    if not work.subjects:
        return {}
    if options.algorithm == "signround":
        return tune_signround(work, options.signround)
    if options.algorithm == "gptq":
        return tune_gptq(work, options.gptq)
    return tune_by_importance(work) if options.algorithm == "opt-rtn" else tune_nearest(work)


def _read(folder: Path, name: str, subjects: tuple[Subject, ...]) -> Codes:
    """Codes of a finished block, by tensor. Raises BadTuned."""
    shapes, refs = _headers(folder, name)
    lacking = [s.module for s in subjects if shapes.get(s.module) != s.shape]
    if lacking:
        raise BadTuned(f"{folder.name}/{name}{SUFFIX} has no codes of {lacking[0]}: delete the folder and tune again")
    return {s.tensor: read_tuned(refs[s.module], 0, s.shape[0]) for s in subjects}


def _headers(folder: Path, name: str) -> tuple[dict[str, tuple[int, int]], dict[str, TunedRef]]:
    schemes: dict[str, Mapping[str, Any]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    refs: dict[str, TunedRef] = {}
    read_block(folder / f"{name}{SUFFIX}", schemes, shapes, refs)
    return shapes, refs


def _borrowed(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    found = (item for name in names for item in _headers(folder, name)[1].items())
    return tuple(module for module, ref in found if ref.input_scale and ref.input_scale.borrowed)


def _samples(model: BlockModel, options: TuneOptions, tokenizer: Tokenizer, place: Place) -> tuple[torch.Tensor, int]:
    """Ids [samples, tokens], int64, and how many samples were dropped: those that a run began with stay."""
    path, max_ram_bytes = place.folder / IDS, place.max_ram_bytes
    if path.exists():
        with reading(path):
            stored = np.load(path)
        return torch.from_numpy(stored), 0
    data = options.data

    def sampler(count: int, seqlen: int, seed: int) -> Samples:
        return sample_self(model, tokenizer, count, seqlen, seed, resident=_resident(model, max_ram_bytes))

    found = load_samples(
        data.dataset, tokenizer, count=data.nsamples, seqlen=data.seqlen, seed=data.seed, sampler=sampler
    )
    buffer = io.BytesIO()
    np.save(buffer, found.ids.numpy())
    write_atomic(path, buffer.getvalue())
    return found.ids, found.dropped


def _resident(model: BlockModel, max_ram_bytes: int | None) -> int:
    """How many blocks stay in memory while the model samples: what half of the memory holds, or of what is allowed."""
    allowed = max_ram_bytes or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    shapes = model.matched.shapes
    largest = max(sum(math.prod(shapes[p]) for p in own) for own in model.matched.blocks) * model.dtype.itemsize
    return min(len(model.block_names), allowed // 2 // max(1, largest))
