"""What the tensors of any GGUF file of a checkpoint hold, whatever their types: as if all were F32, behind each other
in one file without a header. Metadata do not matter."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Final

from shardq.block_tasks import FP32, BlocksTask, VectorsTask
from shardq.checkpoint import Checkpoint
from shardq.files.gguf import drop_ones
from shardq.gguf.architectures import find_architecture
from shardq.gguf.metadata import counts_tokens, find_tensors
from shardq.gguf.model_files import model_files, needed_texts
from shardq.gguf.origins import Origins
from shardq.gguf.planned import PlannedTensor
from shardq.gguf.planning import Sourced
from shardq.gguf.units import find_takes, plan_tasks
from shardq.recipe import make_recipe
from shardq.sources.base import Source
from shardq.weights import Weights, find_weights

TYPE: Final = "F32"  # recipe and element type: holds every number as it is
FILE: Final = ""


@dataclass(frozen=True, slots=True)
class Content:
    """One tensor."""

    shape: tuple[int, ...]  # GGUF's order: the row length first
    weights: tuple[str, ...]  # of the source, that it is made of
    begin: int  # in the imagined file
    values: tuple[float, ...]  # where no weight stands for it: fp32


@dataclass(frozen=True, slots=True)
class Contents:
    """All tensors, and the work that would make them."""

    architecture: str
    tensors: Mapping[str, Content]  # by name
    weights: Weights
    tasks: tuple[BlocksTask | VectorsTask, ...]


def find_contents(checkpoint: Checkpoint, source: Source) -> Contents:
    """The contents of files of `checkpoint`; `source`, which it is of, is read for the vocabulary of the few
    architectures whose rows depend on it. Weights are decoded exactly, never by way of BF16.

    Raises UnsupportedSource for architectures and tensors that are not written, CheckpointIncomplete,
    SourceUnreadable, MissingPackage, LayoutRefuses.
    """
    recipe = make_recipe(TYPE)
    model = model_files(checkpoint)
    if counts_tokens(model):
        model = model_files(needed_texts(checkpoint, source, (recipe,)))
    weights = find_weights(checkpoint, recipe)
    origins = Origins(checkpoint, weights)
    sourced = {}
    for tensor in find_tensors(model, origins.shards()):
        taken = tuple(origins.find(part) for part in tensor.parts)
        sourced[tensor.name] = Sourced(tensor, taken, (None,) * len(taken))
    planned = tuple(_plan(s) for s in sourced.values())
    ends = accumulate(t.size_bytes for t in planned)
    begins = {t.name: end - t.size_bytes for t, end in zip(planned, ends, strict=True)}
    takes = find_takes(planned, begins, sourced, weights, rounded=False)
    tensors = {t.name: Content(t.shape, t.weights, begins[t.name], sourced[t.name].tensor.values) for t in planned}
    tasks = plan_tasks(checkpoint, weights, takes, rounded=False)
    return Contents(find_architecture(model.config()).name, tensors, weights, tasks)


def _plan(s: Sourced) -> PlannedTensor:
    shape = drop_ones(tuple(reversed(s.tensor.shape)))
    names = tuple(dict.fromkeys(t.weight for t in s.taken))
    return PlannedTensor(s.tensor.name, TYPE, shape, FP32 * prod(shape), FILE, names, weighed=False)
