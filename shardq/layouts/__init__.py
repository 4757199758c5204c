"""The table of layouts. Adding one is a file, a row here and a folder of golden files; see ADDING.md.

A run needs one layout or two, so that files are loaded when one of their layouts is asked for.
"""

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from shardq.errors import LayoutRefuses
from shardq.layouts.base import Layout
from shardq.schemes import Scheme

if TYPE_CHECKING:
    LAYOUTS: tuple[Layout, ...]
    LISTED: tuple[Layout, ...]  # what a user may ask for

# Of file types of GGUF, which are planned apart, and of `shardq dequantize`, into which nothing can be quantized; also
# the names of their files here.
GGUF_LAYOUT: Final = "gguf"
PLAIN_LAYOUT: Final = "plain"
FILES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(  # file -> names and aliases of its own LAYOUTS
    {
        "auto_round": (
            "auto_round", "auto-round", "autoround", "auto_round:auto_gptq", "auto_round:gptqmodel",
            "auto_round:auto_awq", "auto_round:llm_compressor",
        ),
        "gptq": ("gptq", "auto_gptq", "gptq_v2", "gptqmodel"),
        "awq": ("awq", "auto_awq", "autoawq"),
        "compressed_tensors": ("compressed-tensors", "compressed_tensors", "llm_compressor", "llmcompressor"),
        "fp8": ("fp8", "mxfp8", "finegrained_fp8"),
        "mlx": ("mlx", "mlx-lm", "mlx_lm"),
        "fake": ("fake", "qdq"),
        GGUF_LAYOUT: (GGUF_LAYOUT, "llama.cpp"),
        PLAIN_LAYOUT: (PLAIN_LAYOUT,),
    }
)  # fmt: skip
_HOMES: Final = {word: file for file, words in FILES.items() for word in words}
SQUARE: Final = (4096, 4096)  # a shape that fits every group


def __getattr__(name: str) -> Any:
    """LAYOUTS and LISTED: all rows, for those who look at each."""
    apart = {"LAYOUTS": (GGUF_LAYOUT, PLAIN_LAYOUT), "LISTED": (PLAIN_LAYOUT,)}
    if name not in apart:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return tuple(layout for file in FILES if file not in apart[name] for layout in _layouts_of(file))


def find_layout(name: str) -> Layout:
    """The layout of that name or alias. Raises LayoutRefuses with the names that exist."""
    if (found := known_layout(name.strip().lower())) is None:
        names = ", ".join(layout.name for layout in __getattr__("LISTED"))
        raise LayoutRefuses(f"unknown layout {name!r}: expected one of {names}")
    return found


def known_layout(word: str) -> Layout | None:
    """The layout of a name or alias in lower case; None where there is none."""
    if (file := _HOMES.get(word)) is None:
        return None
    return next(layout for layout in _layouts_of(file) if word == layout.name or word in layout.aliases)


def _layouts_of(file: str) -> tuple[Layout, ...]:
    made: tuple[Layout, ...] = importlib.import_module(f"shardq.layouts.{file}").LAYOUTS
    return made


def default_layout(scheme: Scheme) -> str:
    """The layout of a scheme that names none: auto-round's own for plain integers, else compressed-tensors, or
    auto-round's where that alone holds the scheme."""
    if scheme.is_adjustable:
        return "auto_round"
    for name in ("compressed-tensors", "auto_round"):
        layout = find_layout(name)
        settled = layout.settle(scheme)
        if layout.refuse(settled, settled, *SQUARE) is None:
            return name
    return "compressed-tensors"  # which says why not
