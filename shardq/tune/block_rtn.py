"""The nearest codes of a block: under round-to-nearest's scales, or searched ones by what comes into each matrix."""

from typing import Final

import numpy as np
import torch

from shardq.tune.inputs import recording
from shardq.tune.work import Codes, Work, largest_of, quantize_alone, rows_of

BLOCK: Final = "block"  # what names of parameters begin with here
FLOOR: Final = 1e-4  # of the mean: what a column's importance is at least (quality.md, section 6 D)


@torch.no_grad()
def tune_nearest(work: Work) -> Codes:
    """Plain round-to-nearest; the inputs have no say."""
    amax = largest_of(work)
    return {
        s.tensor: quantize_alone(rows_of(work.block, [s]), s, work.kernels, amax.get(s.tensor)) for s in work.subjects
    }


@torch.no_grad()
def tune_by_importance(work: Work) -> Codes:
    """Scales that are searched with mean squares of the inputs, each token through every expert."""
    amax = largest_of(work)
    with recording(work.block, BLOCK, "all") as inputs:
        for part in work.inputs.split(1):
            work.run(part)
    codes: Codes = {}
    for s in work.subjects:
        sums = inputs.sums.get(f"{BLOCK}.{s.place.parameter}")
        own = None if sums is None else sums.squares if s.place.expert is None else sums.squares[s.place.expert]
        mean = 0.0 if own is None else float(own.mean())
        importance = np.maximum(own / mean, FLOOR).astype(np.float32) if own is not None and mean > 0 else None
        weight = rows_of(work.block, [s])
        codes[s.tensor] = quantize_alone(weight, s, work.kernels, amax.get(s.tensor), importance)
    return codes
