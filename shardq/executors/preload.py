"""Imported first in every worker and in the fork server, before numpy: one thread per worker.

The numeric libraries read these variables when they are loaded. The caller's process must not
import this module: its own libraries may use all cores.
"""

import os
from typing import Final

THREAD_VARIABLES: Final = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)

os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
