"""Native kernels over numpy arrays, one table per instruction set, all with the same bits. Imports nothing from shardq proper.

`load()` gives the fastest set that this CPU runs, or the one that SHARDQ_KERNELS names. The contract of every kernel is in
`shardq.kernels.contract`; `shardq.kernels.reference` is the same contract in torch, to be read and to test against.
"""

from shardq.kernels.choice import NAMES, KernelChoiceError, SetInfo, load, sets
from shardq.kernels.contract import DTYPES, KernelSet

__all__ = ["DTYPES", "NAMES", "KernelChoiceError", "KernelSet", "SetInfo", "load", "sets"]
