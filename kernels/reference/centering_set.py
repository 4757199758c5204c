"""The part of the reference that follows means of inputs. See shardq.kernels.contract_centering."""

import numpy as np
import torch
from numpy.typing import NDArray

from shardq.kernels.contract import DECODING_RULES, SCALE_FORMATS
from shardq.kernels.raw import RawWeights
from shardq.kernels.reference import centering
from shardq.kernels.reference.arrays import checked_bits, group_count, group_values, shaped
from shardq.kernels.reference.search_affine import Line
from shardq.kernels.reference.search_ladders import checked_ladder
from shardq.kernels.reference.searches import checked, read_groups, row_losses


class CenteringSet:
    """What `ReferenceSet` does by means of inputs."""

    __slots__ = ()

    def center_groups(
        self,
        src: RawWeights,
        dtype: str,
        bits: int,
        group: int,
        importance: NDArray[np.float32] | None,
        spread: NDArray[np.float32],
        means: NDArray[np.float32],
        rule: str,
        scale: str,
        least: float,
        scales: NDArray[np.float32],
        offsets: NDArray[np.float32],
        out: NDArray[np.float32],
        losses: NDArray[np.float64],
    ) -> None:
        """See KernelSet.center_groups."""
        g = read_groups(src, dtype, group, importance, "none")
        steps, places = group_values("scales", scales, src, group), group_values("offsets", offsets, src, group)
        found = centering.center(
            g,
            Line(steps, places),
            checked_bits(bits),
            centering.columns(spread, means, group, src.shape[1]),
            checked("rule", rule, DECODING_RULES),
            checked("scale", scale, SCALE_FORMATS),
            least,
        )
        shaped("out", out, np.float32, scales.shape)[...] = found.numbers.numpy()
        lost = row_losses(found.lost, found.lost)[:, 1]
        after = shaped("losses", losses, np.float64, (src.shape[0], 2))[:, 1]
        after[...] = np.where(found.moved.numpy(), lost, after)

    def center_ladder(
        self,
        src: RawWeights,
        dtype: str,
        element: str,
        group: int,
        importance: NDArray[np.float32] | None,
        spread: NDArray[np.float32],
        means: NDArray[np.float32],
        ladder: NDArray[np.float32],
        first: NDArray[np.uint8],
        last: NDArray[np.uint8],
        chosen: NDArray[np.uint8],
        out: NDArray[np.uint8],
        losses: NDArray[np.float64],
    ) -> None:
        """See KernelSet.center_ladder."""
        g = read_groups(src, dtype, group, importance, "none")
        rungs = checked_ladder(element, ladder)
        inputs = centering.columns(spread, means, group, src.shape[1])
        shape = (src.shape[0], group_count(src.shape[1], group))
        named = {"first": first, "last": last, "chosen": chosen}
        codes = (torch.from_numpy(shaped(n, x, np.uint8, shape).astype(np.int64)) for n, x in named.items())
        found = centering.center_ladder(g, element, rungs, inputs, *codes)
        shaped("out", out, np.uint8, shape)[...] = found.numbers.numpy()
        lost = row_losses(found.lost, found.lost)[:, 1]
        after = shaped("losses", losses, np.float64, (src.shape[0], 2))[:, 1]
        after[...] = np.where(found.moved.numpy(), lost, after)
