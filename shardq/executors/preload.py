"""Imported first in the fork server, in every worker and by the command line: one thread per worker.

The numeric libraries read these variables when they are loaded, so this comes before the handler's module, and nothing
that importing the package `shardq` alone loads may load numpy. The process of a script that calls shardq must not
import this module: its own libraries may use all cores.
"""

import os
from typing import Final

THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
