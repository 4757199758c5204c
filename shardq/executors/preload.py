"""Imported first in the fork server, in every worker and by the command line: how a process of our own works, with one
thread per worker and few collections of garbage.

The numeric libraries read these variables when they are loaded, so this comes before the handler's module, and nothing
that importing the package `shardq` alone loads may load numpy. The process of a script that calls shardq must not
import this module: its own libraries may use all cores.
"""

import atexit
import gc
import os
from typing import Final

THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
GARBAGE_OBJECTS: Final = 30_000  # new ones until Python looks for cycles; its own 700 take 0.03 CPU-s of the imports

os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
gc.set_threshold(GARBAGE_OBJECTS)
atexit.register(gc.freeze)  # looking for garbage among all that was loaded, at the end, took 0.03 CPU-s
