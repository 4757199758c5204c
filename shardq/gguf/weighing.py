"""Whose importance weighs the errors of a tensor of a GGUF file.

As llama.cpp has it: what a file does not name is not weighed. Source: tools/quantize and src/llama-quant.cpp of
llama.cpp as in llama-cpp-python 0.3.36.
"""

from collections.abc import Sequence

from shardq.errors import BadImportance
from shardq.gguf.mixture_rules import EMBEDDINGS
from shardq.importance import Importance
from shardq.importance_files import Entry, find_entry
from shardq.importance_vectors import VectorRef
from shardq.regrouping import Regrouping


def find_weighing(
    importance: Importance, tensor: str, modules: Sequence[str], columns: int, order: Regrouping | None = None
) -> tuple[VectorRef | None, ...]:
    """The vector of each matrix of a tensor, which are `modules` of the source, with so many columns, of which those of
    the source are in another `order`, as those of an imatrix are not; None where the file has none. Of an imatrix an
    expert that no token has reached has equal columns.

    Raises BadImportance for a vector of another length.
    """
    if importance.format == "shardq":
        return tuple(_own(importance, module, columns, order) for module in modules)
    entry = importance.entries.get(tensor)
    if entry is None or (tensor in EMBEDDINGS and entry.values != columns * len(modules)):
        return (None,) * len(modules)
    if entry.values != columns * len(modules) or len(entry.counts) not in (1, len(modules)):
        raise BadImportance(
            f"importance {importance.label} does not fit {tensor}: {entry.values} values in {len(entry.counts)} slices "
            f"for {len(modules)} matrices of {columns} columns; make it from this model"
        )
    return tuple(_slice(importance, entry, index, columns) for index in range(len(modules)))


def _own(importance: Importance, module: str, columns: int, order: Regrouping | None) -> VectorRef | None:
    entry = find_entry(importance.entries, module)
    if entry is not None and entry.values != columns:
        raise BadImportance(
            f"importance {importance.label} does not fit {module}: {entry.values} values for {columns} columns; make "
            "it from this model"
        )
    return None if entry is None else VectorRef(importance.stamp, entry.begin, columns, order=order)


def _slice(importance: Importance, entry: Entry, index: int, columns: int) -> VectorRef:
    count = entry.counts[index if len(entry.counts) > 1 else 0]
    if not count:
        return VectorRef(importance.stamp, 0, columns, slices=0)
    return VectorRef(importance.stamp, entry.begin + 4 * columns * index, columns, count)
