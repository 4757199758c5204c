"""The kernels in torch: the specification in code and the oracle of the tests. Import only through load("reference")."""

from shardq.kernels.reference.kernel_set import ReferenceSet

__all__ = ["ReferenceSet"]
