"""Global scales of carried codes. Servers that run modules as one matrix have one such scale for all of them.

vLLM 0.32 takes the largest divisor of a fused group (`layer.weight_global_scale.max()`, of experts that of `w1`) and
warns: codes below another one then stand for other weights. Shared scales cannot be made without new codes, so what
each weight has is looked at before a run: the numbers are part of what is read with the headers.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from shardq.checkpoint import Checkpoint, TensorRef
from shardq.formats import STORAGE
from shardq.fused import fused_groups

if TYPE_CHECKING:
    from shardq.decide import Decision
    from shardq.dequantize.base import Encoded

ROLES: Final = ("factor", "divisor")  # parts that stand above all scales of a matrix
NEW, NONE, UNREAD = "new codes", "none", "unread"


def find_global_scales(
    encoded: "Mapping[str, Sequence[Encoded]]", tensors: Mapping[str, TensorRef]
) -> tuple[TensorRef, ...]:
    """The tensors that hold global scales of encoded weights, each once."""
    names = dict.fromkeys(p.tensor for es in encoded.values() for e in es for p in e.parts if p.role in ROLES)
    return tuple(tensors[name] for name in names)


def split_groups(decisions: Iterable["Decision"], checkpoint: Checkpoint) -> Mapping[str, tuple[str, ...]]:
    """Module -> its fused group, where a member is carried below a global scale that another has not. A group whose
    numbers were not read, as of headers that somebody kept, counts as one. Raises nothing."""
    quantized = {d.tensor.module: d for d in decisions if d.scheme}
    lifted = [m for m, d in quantized.items() if d.goal and d.goal.lifted]
    groups = fused_groups(quantized, checkpoint.config) if lifted else {}
    found: dict[str, tuple[str, ...]] = {}
    for module in lifted:
        group = groups.get(module, ())
        scales = {_scale_of(quantized[m], checkpoint) for m in group}
        if len(scales) > 1 and UNREAD not in scales:
            found |= dict.fromkeys(group, group)
    return found


def _scale_of(d: "Decision", checkpoint: Checkpoint) -> str:
    """What tells the global scale of a quantized weight from others."""
    if d.goal is None:
        return NEW
    part = next((p for role in ROLES if (p := d.tensor.encoded[0].part(role))), None)
    if part is None:
        return NONE
    content = checkpoint.peeked.get(part.tensor)
    if content is None:
        return UNREAD
    at = part.begin - checkpoint.tensors[part.tensor].begin
    return f"{part.role} {part.dtype} {content[at : at + STORAGE[part.dtype].bits // 8].hex()}"
