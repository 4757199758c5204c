"""The kernels in torch: specification in code, and oracle of the tests. Import it through load("reference") only."""

from shardq.kernels.reference.kernel_set import ReferenceSet

__all__ = ["ReferenceSet"]
