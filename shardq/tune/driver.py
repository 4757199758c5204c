"""A model tuned block by block: codes of every matrix that a plan quantizes, into a folder, one file for each block.

What is finished stays: the same call goes on behind the last block that is there. Hidden states are not saved; the
finished blocks are run again with their codes, which costs a pass through each and gives the same numbers, so that the
files are those of a run that was never stopped.
"""

import io
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch

from shardq.errors import BadOption
from shardq.files.atomic import reading, write_atomic, writing
from shardq.lock import FolderLock
from shardq.plans import make_plan
from shardq.recipe import Recipe
from shardq.sources.base import Source
from shardq.tune.awq_sites import find_awq_sites
from shardq.tune.blocks import BlockModel
from shardq.tune.chain import Chain, begin_chain
from shardq.tune.data import Samples, load_samples
from shardq.tune.data_self import sample_self
from shardq.tune.device_moves import Devices, find_devices
from shardq.tune.devices import deterministic
from shardq.tune.disk import check_disk
from shardq.tune.norms_biases import find_plain
from shardq.tune.options import DataOptions, TuneOptions
from shardq.tune.passes import Run, find_borrowed
from shardq.tune.result import TuneResult
from shardq.tune.rounding import check_scheme
from shardq.tune.settings import CPU
from shardq.tune.spool import Spooling
from shardq.tune.subjects import check_left, find_parameters, find_subjects
from shardq.tune.tokenizing import Tokenizer, open_tokenizer
from shardq.tuned import TunedWriter

IDS: Final = "ids.npy"  # of the samples, beside the blocks
LOCK: Final = "lock"  # beside them; stays, empty
Told = Callable[[int, int], None]  # blocks done, and all


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
    device = options.compute.place()
    if options.codes == "signround" and options.signround.enable_torch_compile:
        from shardq.tune.compiling import check_compiler  # brings torch's compiler along

        check_compiler(device)
    dtype = None if options.precision == "auto" else getattr(torch, options.precision)
    with ExitStack() as stack:
        stack.enter_context(deterministic(options.compute.enable_deterministic_algorithms))
        model = stack.enter_context(BlockModel.open(source, dtype=dtype, trust_remote_code=trust_remote_code))
        plan = make_plan(model.checkpoint, recipe, before_tuning=True)
        subjects = find_subjects(model, plan)
        check_left(subjects, plan)
        if not any(subjects.blocks) and subjects.head is None:
            raise BadOption(f"{source.label}: nothing in its blocks gets codes that can be tuned")
        for s in subjects.all() if options.codes == "signround" else ():
            check_scheme(s.scheme)
        sites = find_awq_sites(model, plan, subjects) if options.is_scaling else None
        data, chains = options.data, 2 if options.has_plain_chain else 1
        spooling = Spooling(place.folder, place.max_ram_bytes, place.max_disk_bytes, options.compute.spool)
        shares = check_disk(model, subjects, data.nsamples, data.seqlen, chains, spooling)
        stack.enter_context(_lock(place.folder))
        model.let_wait(place.folder, shares.waiting_bytes)
        writer = TunedWriter(place.folder, {**plan.identity(), **options.as_dict()})
        names = model.block_names
        resumed = next((i for i, name in enumerate(names) if not writer.has(name)), len(names))
        ids, dropped = _samples(model, options, open_tokenizer(source, trust_remote_code), place)
        if resumed < len(names) or (subjects.head and not writer.has(subjects.head.module)):
            chain = _begin(model, ids, options, replace(spooling, max_disk_bytes=shares.spool_bytes))
            run = Run(
                model, options, place.folder, writer, chain, _find_devices(options, chain), subjects,
                find_parameters(model), sites, find_plain(model, plan),
            )  # fmt: skip
            run.go(lambda done: report(done, len(names)) if report else None)
        writer.finish()
        return TuneResult(
            place.folder, len(names), resumed, sum(1 for _ in subjects.all()), subjects.left, len(ids), ids.numel(),
            dropped, find_borrowed(place.folder, names),
            tuple(n for n, own in zip(names, sites, strict=True) if not own) if sites else (),
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


def _begin(model: BlockModel, ids: torch.Tensor, options: TuneOptions, spooling: Spooling) -> Chain:
    return begin_chain(
        model, ids, plain=options.has_plain_chain, quanted=options.enable_quanted_input, spooling=spooling,
        device=options.compute.place(), resident=not options.compute.low_gpu_mem_usage,
    )  # fmt: skip


def _find_devices(options: TuneOptions, chain: Chain) -> Devices:
    ways = [way.hidden for way in (chain.inputs, chain.plain) if way is not None]
    taken = sum(hidden.nbytes for hidden in ways if hidden.device.type != CPU)
    compute = options.compute
    return find_devices(
        compute.places(), named=not compute.is_auto, learned=options.codes == "signround", taken_bytes=taken
    )


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
