"""A GGUF output against its source: every byte of it is derived again, but for the zeros between tensors."""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from shardq.gguf_remade import check_plan, check_sizes, remake_plan
from shardq.gguf_rows import DerivedRows, Made, by_name, compare_extent, compare_fixed, find_made
from shardq.importance import Importance
from shardq.kernels import KernelSet, load
from shardq.ledger import merge
from shardq.outputs import Output
from shardq.plans import OutputFile
from shardq.source_rows import NoRowsError
from shardq.sources.base import Source
from shardq.unpack import check_errors

READERS: Final = 4  # weights that are derived side by side

Files = Mapping[str, OutputFile]


def check_gguf_source(output: Output, source: Source, importance: Importance | None) -> tuple[list[str], int]:
    """Problems, and how many weights were compared: the ledger is that of a plan of the source, its error figures are
    measured again, and headers and tensors have the bytes that the source gives.

    Raises what remake_plan raises: BadOption for another source than the records name. Memory: four slabs.
    """
    plan = remake_plan(output, source, importance)
    files, made = by_name(plan), find_made(plan)
    problems = [*check_plan(output, plan), *check_sizes(output, files)]
    if problems:
        return problems, 0
    problems += (p for f in files.values() if (p := compare_fixed(output.source, f).problem))
    kernels, entries = load(), output.ledger["tensors"]
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(_check, m, entries[name], output, source, files, kernels) for name, m in made.items()]
        try:
            problems += (problem for future in futures for problem in future.result())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return problems, len(made)


def _check(
    made: Made, entry: Mapping[str, Any], output: Output, source: Source, files: Files, kernels: KernelSet
) -> list[str]:
    try:
        return list(_problems(made, entry, output, source, files, kernels))
    except NoRowsError as e:
        return [f"{made.tensor.name} cannot be derived: {e}"]


def _problems(
    made: Made, entry: Mapping[str, Any], output: Output, source: Source, files: Files, kernels: KernelSet
) -> Iterator[str]:
    rows = DerivedRows(made, output.rounded, source, kernels)
    errors = []
    for slab in made.slabs(0, made.rows):
        extents, found = rows.derive(*slab)
        for file, (data, offset) in extents:
            if problem := compare_extent(output.source, files[file], data, offset).problem:
                yield problem
                return
        errors.append(found)
    if entry["outcome"] == "quantized":
        yield from check_errors(made.tensor.name, entry, merge(errors))
