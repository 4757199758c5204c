"""The tensor of a module whose activations are calibrated: the same in compressed-tensors 0.20 (llm-compressor 0.14)
and auto-round 0.16.1.

`input_scale` [1], in the weight's type, is what activations are divided by; `input_global_scale` fp32 [1] is what the
scales of e4m3 are multiplied by that a server computes for groups of each token.
"""

from typing import TYPE_CHECKING, Final

from shardq.layouts.base import Layout, OutSpec
from shardq.schemes import ACTIVATIONS, WEIGHT_TYPE, Scheme

if TYPE_CHECKING:
    from shardq.layouts.base import Arrays
    from shardq.quantizers.quantized import Quantized

PLAIN: Final = "input_scale"
GLOBAL: Final = "input_global_scale"


def input_outputs(scheme: Scheme, dtype: str) -> tuple[OutSpec, ...]:
    """See Layout.outputs: what goes beside the tensors of the weight; nothing unless activations are calibrated."""
    if not scheme.calibrated:
        return ()
    if ACTIVATIONS[scheme.activation].scale == WEIGHT_TYPE:
        return (OutSpec(PLAIN, dtype, (1,), slab_axis=None),)
    return (OutSpec(GLOBAL, "F32", (1,), slab_axis=None),)


def pack_input(part: "Quantized", out: "Arrays") -> None:
    """See Layout.pack."""
    import numpy as np

    from shardq.layouts.stored import store

    for array in (out[name] for name in (PLAIN, GLOBAL) if name in out):
        assert part.input_scale is not None, "the plan lets no matrix pass without a scale of its activations"
        array[:] = store(np.full(1, part.input_scale, np.float32), array.dtype)  # size 0 but in the first slab


def unpack_input(arrays: "Arrays") -> float | None:
    """See Layout.unpack: None where there is no such tensor."""
    from shardq.layouts.stored import load

    found = [arrays[name] for name in (PLAIN, GLOBAL) if name in arrays]
    return float(load(found[0])[0]) if found else None


def wants_input_scale(layout: Layout, scheme: Scheme) -> bool:
    """True if the layout writes a tensor that only calibration data give."""
    if not scheme.calibrated:
        return False
    square = max(scheme.group_size, scheme.group_rows, 128)
    return any(o.suffix in (PLAIN, GLOBAL) for o in layout.outputs(scheme, "BF16", square, square))
