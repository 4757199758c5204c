"""The table of layouts. Adding one is a file, a row here and a folder of golden files; see ADDING.md."""

from typing import Final

from shardq.errors import LayoutRefuses
from shardq.layouts.auto_round import AutoRound
from shardq.layouts.awq import Awq
from shardq.layouts.base import Layout
from shardq.layouts.compressed_tensors import CompressedTensors
from shardq.layouts.fake import Fake
from shardq.layouts.fp8 import Fp8
from shardq.layouts.gptq import Gptq
from shardq.schemes import Scheme

LAYOUTS: Final[tuple[Layout, ...]] = (AutoRound(), Gptq(), Awq(), CompressedTensors(), Fp8(), Fake())


def find_layout(name: str) -> Layout:
    """The layout of that name or alias. Raises LayoutRefuses with the names that exist."""
    wanted = name.strip().lower()
    for layout in LAYOUTS:
        if wanted == layout.name or wanted in layout.aliases:
            return layout
    raise LayoutRefuses(f"unknown layout {name!r}: expected one of {', '.join(x.name for x in LAYOUTS)}")


def default_layout(scheme: Scheme) -> str:
    """The layout of a scheme that names none: auto-round's own for plain integers."""
    return "auto_round" if scheme.format.is_integer and not scheme.activation else "compressed-tensors"
