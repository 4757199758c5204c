"""Native kernels over numpy arrays, one table per instruction set, all with the same bits.

`load()` gives the fastest set that this CPU runs, or the one that SHARDQ_KERNELS names. `shardq.kernels.contract` says
what every kernel does; `shardq.kernels.reference` is the same in torch, to be read and to test against. This package
imports nothing from the rest of shardq.
"""

from shardq.kernels.choice import NAMES, KernelChoiceError, SetInfo, load, sets
from shardq.kernels.contract import DTYPES, ELEMENTS, KernelSet

__all__ = ["DTYPES", "ELEMENTS", "NAMES", "KernelChoiceError", "KernelSet", "SetInfo", "load", "sets"]
