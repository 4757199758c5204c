"""The table of layouts. Adding one is a file, a row here and a folder of golden files; see ADDING.md."""

from typing import Final

from shardq.errors import LayoutRefuses
from shardq.layouts.auto_round import AWQ, MX, NVFP4, V1, ZERO_OF_ALL, AutoRound
from shardq.layouts.awq import Awq
from shardq.layouts.base import Layout
from shardq.layouts.compressed_tensors import CompressedTensors
from shardq.layouts.fake import Fake
from shardq.layouts.fp8 import Fp8
from shardq.layouts.gguf import Gguf
from shardq.layouts.gptq import VERSION_2, Gptq
from shardq.layouts.mlx import Mlx
from shardq.layouts.plain import Plain
from shardq.schemes import Scheme

LAYOUTS: Final[tuple[Layout, ...]] = (
    AutoRound(),
    AutoRound("auto_round:auto_gptq", (), (V1,)),
    AutoRound("auto_round:gptqmodel", (), (ZERO_OF_ALL,)),
    AutoRound("auto_round:auto_awq", (), (AWQ,)),
    AutoRound("auto_round:llm_compressor", (), (MX, NVFP4)),
    Gptq(),
    Gptq("gptq_v2", ("gptqmodel",), VERSION_2),
    Awq(),
    CompressedTensors(),
    Fp8(),
    Mlx(),
    Fake(),
)
LISTED: Final[tuple[Layout, ...]] = (*LAYOUTS, Gguf())  # what a user may ask for
GGUF_LAYOUT: Final = Gguf.name  # of file types of GGUF; what is in one is planned apart
PLAIN_LAYOUT: Final = Plain.name  # of `shardq dequantize`; nothing can be quantized into it
SQUARE: Final = (4096, 4096)  # a shape that fits every group


def find_layout(name: str) -> Layout:
    """The layout of that name or alias. Raises LayoutRefuses with the names that exist."""
    wanted = name.strip().lower()
    for layout in (*LISTED, Plain()):
        if wanted == layout.name or wanted in layout.aliases:
            return layout
    raise LayoutRefuses(f"unknown layout {name!r}: expected one of {', '.join(x.name for x in LISTED)}")


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
