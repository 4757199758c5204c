"""Modules that the worker needs for some tasks only. A plain run loads none of them; one that has such tasks loads them
once, before workers are forked."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Final

from shardq.block_tasks import BlocksTask, VectorsTask
from shardq.tasks import CopyTask, QuantizeTask, Task


def _is_of_gguf(task: Task) -> bool:
    return isinstance(task, BlocksTask | VectorsTask)


def _is_encoded(task: Task) -> bool:
    return isinstance(task, QuantizeTask | BlocksTask) and task.encoded is not None


def _is_carried(task: Task) -> bool:
    return isinstance(task, QuantizeTask) and task.goal is not None


def _is_tuned(task: Task) -> bool:
    return isinstance(task, QuantizeTask) and task.tuned is not None


def _is_searched(task: Task) -> bool:
    return isinstance(task, QuantizeTask) and task.search is not None


def _is_replaced(task: Task) -> bool:
    return isinstance(task, CopyTask) and any(p.replaced for p in task.pieces)


PARTS: Final[Mapping[str, Callable[[Task], bool]]] = MappingProxyType(
    {
        "shardq.block_rows": _is_of_gguf,
        "shardq.decoded": _is_encoded,
        "shardq.carry_codes": _is_carried,
        "shardq.tuned_rows": _is_tuned,
        "shardq.quantizers.search_rows": _is_searched,
        "shardq.replaced": _is_replaced,
    }
)  # module -> the tasks that need it


def load_parts(tasks: Iterable[Task]) -> None:
    """Load what these tasks need."""
    left = dict(PARTS)
    for task in tasks:
        for module in [m for m, needs in left.items() if needs(task)]:
            importlib.import_module(module)
            del left[module]
