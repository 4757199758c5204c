"""A model tuned block by block: codes of every matrix that a plan quantizes, into a folder, one file for each block.

What is finished stays: the same call goes on behind the last block that is there. Hidden states are not saved; the
finished blocks are run again with their codes, which costs a pass through each and gives the same numbers, so that the
files are those of a run that was never stopped.
"""

import io
import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from shardq.errors import BadOption, BadTuned
from shardq.files.atomic import reading, write_atomic
from shardq.kernels import load
from shardq.plans import make_plan
from shardq.recipe import Recipe
from shardq.sources.base import Source
from shardq.tune.block_gptq import tune_gptq
from shardq.tune.block_rtn import tune_by_importance, tune_nearest
from shardq.tune.blocks import BlockModel
from shardq.tune.chain import Chain, begin_chain
from shardq.tune.data import Samples, load_samples
from shardq.tune.data_self import sample_self
from shardq.tune.options import DataOptions, TuneOptions
from shardq.tune.rounding import check_scheme
from shardq.tune.signround import tune_signround
from shardq.tune.subjects import Subject, find_subjects
from shardq.tune.tokenizing import Tokenizer, open_tokenizer
from shardq.tune.work import Codes, Work, put_codes
from shardq.tuned import SUFFIX, Tuned, TunedRef, TunedWriter, read_block, read_tuned

SEEDS: Final = 1 << 32  # more than a block takes
IDS: Final = "ids.npy"  # of the samples, beside the blocks
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


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run works, and how much memory hidden states may have."""

    folder: Path
    max_ram_bytes: int | None = None


def tune_blocks(
    source: Source, recipe: Recipe, options: TuneOptions, place: Place, *, trust_remote_code: bool = False,
    report: Told | None = None,
) -> TuneResult:  # fmt: skip
    """Tune what `recipe` quantizes into `place.folder`. Raises BadOption for what cannot be tuned, RecipeChanged for a
    folder that was begun otherwise, and what planning and reading raise."""
    _refuse(recipe)
    dtype = None if options.precision == "auto" else getattr(torch, options.precision)
    with ExitStack() as stack:
        model = stack.enter_context(BlockModel.open(source, dtype=dtype, trust_remote_code=trust_remote_code))
        plan = make_plan(model.checkpoint, recipe)
        subjects = find_subjects(model, plan)
        if not any(subjects.blocks):
            raise BadOption(f"{source.label}: nothing in its blocks gets codes that can be tuned")
        for s in (s for own in subjects.blocks for s in own if options.algorithm == "signround"):
            check_scheme(s.scheme)
        writer = TunedWriter(place.folder, {**plan.identity(), **options.as_dict()})
        names = model.block_names
        resumed = next((i for i, name in enumerate(names) if not writer.has(name)), len(names))
        ids, dropped = _samples(model, options, open_tokenizer(source, trust_remote_code), place)
        if resumed < len(names):
            run = _Run(model, options, place.folder, writer, _begin(model, ids, options, place))
            for index, own in enumerate(subjects.blocks):
                run.block(index, own)
                if report:
                    report(index + 1, len(names))
        writer.finish()
        return TuneResult(
            place.folder, len(names), resumed, sum(map(len, subjects.blocks)), subjects.left, len(ids),
            ids.numel(), dropped,
        )  # fmt: skip


def _refuse(recipe: Recipe) -> None:
    if recipe.gguf:
        raise BadOption(f"{recipe.preset}: blocks of GGUF files cannot be tuned yet; give --importance to quantize")
    if recipe.fold or recipe.importance:
        raise BadOption("tuning takes weights as the source has them: leave --fold and --importance out")
    if recipe.purpose != "quantize":
        raise BadOption("only what is quantized can be tuned")


def _begin(model: BlockModel, ids: torch.Tensor, options: TuneOptions, place: Place) -> Chain:
    plain = options.algorithm == "signround"
    return begin_chain(
        model, ids, plain=plain, quanted=options.enable_quanted_input, max_ram_bytes=place.max_ram_bytes,
        folder=place.folder,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Run:
    """A model on its way."""

    model: BlockModel
    options: TuneOptions
    folder: Path
    writer: TunedWriter
    chain: Chain

    def block(self, index: int, subjects: tuple[Subject, ...]) -> None:
        """Tune a block, or take its codes as they are there, and go through it."""
        name, kernels = self.model.block_names[index], load()
        is_last = index + 1 == len(self.model.block_names)
        with self.model.block(index) as module:
            self.model.prefetch(index + 1)
            wanted = self.chain.enter(module, index)
            if self.writer.has(name):
                codes = _read(self.folder, name, subjects)
            else:
                seed = self.options.data.seed + SEEDS * index  # another order of samples for each block
                work = Work(module, index, subjects, self.chain.inputs, wanted, kernels, seed)
                codes = _tune(work, self.options)
                self.writer.write(name, {s.module: Tuned(s.scheme, codes[s.tensor]) for s in subjects})
            if not is_last:
                put_codes(module, subjects, codes, kernels)
                self.chain.leave(module, index)


def _tune(work: Work, options: TuneOptions) -> Codes:
    if options.algorithm == "signround":
        return tune_signround(work, options.signround)
    if options.algorithm == "gptq":
        return tune_gptq(work, options.gptq)
    return tune_by_importance(work) if options.algorithm == "opt-rtn" else tune_nearest(work)


def _read(folder: Path, name: str, subjects: tuple[Subject, ...]) -> Codes:
    """Codes of a finished block, by tensor. Raises BadTuned."""
    schemes: dict[str, Mapping[str, Any]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    refs: dict[str, TunedRef] = {}
    read_block(folder / f"{name}{SUFFIX}", schemes, shapes, refs)
    lacking = [s.module for s in subjects if shapes.get(s.module) != s.shape]
    if lacking:
        raise BadTuned(f"{folder.name}/{name}{SUFFIX} has no codes of {lacking[0]}: delete the folder and tune again")
    return {s.tensor: read_tuned(refs[s.module], 0, s.shape[0]) for s in subjects}


def _samples(model: BlockModel, options: TuneOptions, tokenizer: Tokenizer, place: Place) -> tuple[torch.Tensor, int]:
    """Ids [samples, tokens], int64, and how many samples were dropped: those that a run began with stay."""
    path, max_ram_bytes = place.folder / IDS, place.max_ram_bytes
    if path.exists():
        with reading(path):
            stored = np.load(path)
        return torch.from_numpy(stored), 0
    found = draw_samples(model, tokenizer, options.data, max_ram_bytes)
    buffer = io.BytesIO()
    np.save(buffer, found.ids.numpy())
    write_atomic(path, buffer.getvalue())
    return found.ids, found.dropped


def draw_samples(model: BlockModel, tokenizer: Tokenizer, data: DataOptions, max_ram_bytes: int | None) -> Samples:
    """Calibration data, which the model may have to sample itself. Raises what `load_samples` does."""

    def sampler(count: int, seqlen: int, seed: int) -> Samples:
        return sample_self(model, tokenizer, count, seqlen, seed, resident=_resident(model, max_ram_bytes))

    return load_samples(
        data.dataset, tokenizer, count=data.nsamples, seqlen=data.seqlen, seed=data.seed, sampler=sampler
    )


def _resident(model: BlockModel, max_ram_bytes: int | None) -> int:
    """How many blocks stay in memory while the model samples: what half of the memory holds, or of what is allowed."""
    allowed = max_ram_bytes or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    shapes = model.matched.shapes
    largest = max(sum(math.prod(shapes[p]) for p in own) for own in model.matched.blocks) * model.dtype.itemsize
    return min(len(model.block_names), allowed // 2 // max(1, largest))
