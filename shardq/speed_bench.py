"""Measures how fast this machine's kernels are: each family of work as a run does it, on one matrix, in a few seconds.

A worker quantizes, measures, packs and writes a synthetic matrix, as in a run; what counts is CPU time, so that other
programs disturb little.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shardq.errors import KernelUnavailable
from shardq.figures import FIGURES
from shardq.files.safetensors import TensorSpec, plan_file
from shardq.headers import read_checkpoint
from shardq.kernels import KernelChoiceError, KernelSet, load, sets
from shardq.kernels.contract_blocks import BLOCK_FORMATS
from shardq.onepass import OnePass
from shardq.plans import make_plan
from shardq.recipe import make_recipe
from shardq.schemes import BLOCKS, PRESETS, WIDTHS, parse_scheme
from shardq.search import default_search
from shardq.sources import open_source
from shardq.speed import COPY, HASH, Speed, block_family, cpu_name, family_of
from shardq.staging import Staging
from shardq.tasks import Workplace
from shardq.version import VERSION
from shardq.worker import Worker

ROWS: Final = 128
COLUMNS: Final = 4096
REPEATS: Final = 3  # of which the fastest counts
ENOUGH_NS: Final = 50_000_000  # of CPU time, after which no further one is measured


_CONFIG: Final = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1}
_MATRIX: Final = "model.layers.0.mlp.up_proj.weight"
_SHARD: Final = "model.safetensors"


def measure_speed() -> Speed:
    """Measure all families. Takes a few seconds of one core.

    Raises KernelUnavailable, NotWritable, DiskFull.
    """
    try:
        kernels, chosen = load(), next((s.name for s in sets() if s.chosen), "")
    except KernelChoiceError as error:
        raise KernelUnavailable(str(error)) from error
    measured = datetime.now(UTC).isoformat(timespec="seconds")
    return Speed(cpu_name(), chosen, VERSION, measured, dict(_all_times(kernels)))


def _all_times(kernels: KernelSet) -> Iterator[tuple[str, float]]:
    weights = (np.random.default_rng(1).standard_normal((ROWS, COLUMNS)) * 0.02).astype(np.float32)
    rows = (weights.view(np.uint32) >> 16).astype(np.uint16)  # as BF16
    yield HASH, _measure(lambda: hashlib.sha256(weights.data)) / weights.nbytes
    seen: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="shardq-bench-") as name:
        folder = _write_model(Path(name) / "model", rows)
        yield COPY, _measure(lambda: (folder / "copy").write_bytes((folder / _SHARD).read_bytes())) / rows.nbytes
        for scheme in (*PRESETS, *(f"W{bits}A16_ASYM" for bits in WIDTHS)):
            preset = parse_scheme(scheme)
            family = family_of(preset.scheme, None)
            if not preset.bits_of and family not in seen:
                seen.add(family)
                yield from _scheme_times(folder, Path(name) / scheme, scheme, kernels)
    yield from _block_times(rows, kernels)


def _write_model(folder: Path, rows: NDArray[np.uint16]) -> Path:
    """A checkpoint of one matrix."""
    folder.mkdir()
    planned = plan_file([TensorSpec(_MATRIX, "BF16", rows.shape)], {})
    (folder / _SHARD).write_bytes(planned.header + rows.tobytes())
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    return folder


def _scheme_times(folder: Path, out: Path, scheme: str, kernels: KernelSet) -> Iterator[tuple[str, float]]:
    """A scheme in the layout that it has by default, without a search and, where there is one, with it."""
    plan = make_plan(read_checkpoint(open_source(str(folder))), make_recipe(scheme))
    staging = Staging(out)
    staging.make()
    for file in plan.files:
        staging.begin(file)
    worker = Worker(Workplace({_SHARD: str(folder / _SHARD)}, (str(staging.part),), True, None), kernels)
    bundle = next(b for b in OnePass((plan,)).bundles if b.quantize_tasks)
    (task,), (member,) = bundle.quantize_tasks, bundle.members
    assert task.scheme
    found = default_search(task.scheme, weighted=False)
    for search in (None, found) if found else (None,):
        amax = None if task.scheme.reach == "group" else 1.0
        wanted = replace(bundle, members=(replace(member, task=replace(task, search=search, amax=amax)),))
        yield family_of(task.scheme, search), _measure(partial(worker.run, wanted)) / (ROWS * COLUMNS)


def _block_times(rows: NDArray[np.uint16], kernels: KernelSet) -> Iterator[tuple[str, float]]:
    """The types of GGUF, as block_rows.py makes them: blocks, what they stand for, and the error."""
    wide, stats = np.empty(rows.shape, np.float32), np.empty((ROWS, FIGURES), np.float64)
    importance = np.ones(COLUMNS, np.float32)
    for kind, form in BLOCK_FORMATS.items():
        blocks = np.empty((ROWS, COLUMNS // form.cols * form.size_bytes), np.uint8)
        for vector in (None, importance):
            work = partial(_make_blocks, rows, kind, vector, blocks, wide, stats, kernels)
            yield block_family(kind, vector is not None), _measure(work) / (ROWS * COLUMNS)


def _make_blocks(
    rows: NDArray[np.uint16],
    kind: str,
    vector: NDArray[np.float32] | None,
    blocks: NDArray[np.uint8],
    wide: NDArray[np.float32],
    stats: NDArray[np.float64],
    kernels: KernelSet,
) -> None:
    kernels.quantize_blocks(rows, "BF16", kind, vector, blocks)
    kernels.dequantize_blocks(blocks, kind, wide)
    kernels.error_values(rows, "BF16", wide, BLOCKS[kind].group_size, stats)


def _measure(work: Callable[[], object]) -> float:
    """Nanoseconds of CPU time, the least of a few; memory is touched before the first that counts."""
    work()
    times: list[int] = []
    while len(times) < REPEATS and sum(times) < ENOUGH_NS:
        began_ns = time.process_time_ns()
        work()
        times.append(time.process_time_ns() - began_ns)
    return float(min(times))
