"""What the worker needs for some tasks only. Names are imported when they are first used: a plain run loads none, and a
run that has such tasks loads their modules once, before workers are forked."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from shardq.block_tasks import BlocksTask, VectorsTask
from shardq.tasks import CopyTask, QuantizeTask, Task

if TYPE_CHECKING:
    from shardq.block_rows import BlockRows, Given, extents, fill_vector, shapes, written_extents
    from shardq.carry_codes import carry_rows, largest_scale
    from shardq.decoded import DecodedRows, keep_rows, round_rows
    from shardq.replaced import read_replaced
    from shardq.tuned_rows import pack_tuned

__all__ = [
    "BlockRows", "DecodedRows", "Given", "carry_rows", "extents", "fill_vector", "keep_rows", "largest_scale",
    "load_parts", "pack_tuned", "read_replaced", "round_rows", "shapes", "written_extents",
]  # fmt: skip
_HOMES: Final = {
    **dict.fromkeys(("BlockRows", "Given", "extents", "fill_vector", "shapes", "written_extents"), "shardq.block_rows"),
    **dict.fromkeys(("carry_rows", "largest_scale"), "shardq.carry_codes"),
    **dict.fromkeys(("DecodedRows", "keep_rows", "round_rows"), "shardq.decoded"),
    "read_replaced": "shardq.replaced",
    "pack_tuned": "shardq.tuned_rows",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


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
