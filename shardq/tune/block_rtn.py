"""The nearest codes of a block: under round-to-nearest's scales, or searched ones by what comes into each matrix."""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from shardq.tune.inputs import Inputs, importance_by, recording
from shardq.tune.subjects import Subject
from shardq.tune.work import Codes, Work, largest_of, quantize_alone, rows_of

BLOCK: Final = "block"  # what names of parameters begin with here


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
        weight = rows_of(work.block, [s])
        codes[s.tensor] = quantize_alone(weight, s, work.kernels, amax.get(s.tensor), importance_of(inputs, s))
    return codes


def importance_of(inputs: Inputs, subject: Subject) -> NDArray[np.float32] | None:
    """Of the columns of a matrix, from what was recorded of a block under the name BLOCK; None where no input was."""
    sums = inputs.sums.get(f"{BLOCK}.{subject.place.parameter}")
    expert = subject.place.expert
    own = None if sums is None else sums.squares if expert is None else sums.squares[expert]
    return None if own is None else importance_by(own)
