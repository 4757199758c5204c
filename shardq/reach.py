"""Which tensors must be measured before a tensor can be quantized: those whose scheme reaches beyond a group."""

from collections.abc import Iterable, Mapping
from typing import Any

from shardq.fused import fused_groups
from shardq.schemes import Scheme


def find_reaches(
    quantized: Iterable[tuple[str, str, Scheme]], config: Mapping[str, Any] | None
) -> dict[str, tuple[str, ...]]:
    """Tensor -> tensors whose largest magnitudes its scales need, itself included; only tensors with such a scheme.

    `quantized`: module, tensor and scheme of whatever is quantized; `config` is config.json, which tells what servers
    fuse. Members of a fused group under a scheme that does not reach so far are left out. Raises nothing.
    """
    far = {module: (tensor, scheme) for module, tensor, scheme in quantized if scheme.reach != "group"}
    groups = fused_groups(far, config) if far else {}
    return {
        tensor: tuple(far[m][0] for m in groups.get(module, (module,))) if scheme.reach == "fused" else (tensor,)
        for module, (tensor, scheme) in far.items()
    }
