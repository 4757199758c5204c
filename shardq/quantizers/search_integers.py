"""Integers and affine codes whose scales are searched, not taken from the extremes alone: round-to-nearest's numbers
first, better ones where there are, and codes by true division under what is stored."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from shardq.quantizers.mlx import affine_lines, round_lines
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.scales import range_scales, round_to, shared_scales
from shardq.quantizers.search_job import SearchJob

LEAST: Final = float(np.float32(np.float16(1e-5)))  # scale that auto-round stores
TINY: Final = float(np.finfo(np.float32).tiny)


def auto_round_factors(bits: int) -> NDArray[np.float32]:
    """What auto-round 0.16.1's search_scales divides a group's leading weight by, in its order: 2^(bits-1) first, then
    200 steps of 0.75 hundredths of it to both sides, or 180 of 0.01 at 2 bits."""
    most = 1 << (bits - 1)
    reach, step = (90, 0.01) if bits == 2 else (100, most * 0.75 / 200 * 2)
    return np.array([most, *(most - step * i for i in range(-reach, reach + 1) if i)], np.float32)


def search_like_auto_round(job: SearchJob, stats: NDArray[np.float64]) -> tuple[Quantized, int]:
    """`rtn.quantize_rows` for symmetric integers by auto-round's own search: the winning candidate is stored as it is,
    rounded once more, with the codes that it has in the weights' own type. Losses are of scales before they are stored.
    """
    b, scheme, kernels = job.buffers, job.scheme, job.kernels
    factors = auto_round_factors(scheme.bits)
    bad = kernels.search_grid(
        job.source, job.dtype, scheme.bits, job.group, job.importance, factors, b.scales, b.codes, job.losses
    )
    b.scales[:] = round_to(b.scales, job.scale_format)
    bad += int((~np.isfinite(b.scales)).sum())
    kernels.error_scaled(job.source, job.dtype, scheme.element, b.codes, b.scales, job.group, stats)
    if scheme.numbers != "auto_round":
        return Quantized(b.codes, b.scales, None), bad
    b.zeros[:] = 1 << (scheme.bits - 1)
    return Quantized(b.codes, b.scales, b.zeros), bad


def search_symmetric(job: SearchJob, stats: NDArray[np.float64]) -> tuple[Quantized, int]:
    """`rtn.quantize_rows` for symmetric integers."""
    if job.search.rule == "auto_round":
        return search_like_auto_round(job, stats)
    b, scheme, kernels = job.buffers, job.scheme, job.kernels
    of_auto_round = scheme.numbers == "auto_round"
    least = LEAST if of_auto_round else TINY
    if of_auto_round:
        bad = kernels.rtn_int(job.source, job.dtype, scheme.bits, job.group, True, b.codes, b.scales, b.zeros)
    else:
        bad = kernels.group_absmax(job.source, job.dtype, job.group, b.high)
        bad += shared_scales(b.high, scheme, job.dtype, b.scales, None, job.stored)
    kernels.search_int(
        job.source,
        job.dtype,
        scheme.bits,
        job.group,
        job.importance,
        job.search.objective,
        job.factors(logarithmic=True),
        job.search.signs,
        job.search.sweeps,
        job.scale_format,
        least,
        b.scales,
        job.losses,
    )
    kernels.encode_scaled(job.source, job.dtype, scheme.element, job.group, b.scales, b.codes)
    if job.search.centered:
        b.low.fill(1 << (scheme.bits - 1))
        _center(job, "zero", least)
    kernels.error_scaled(job.source, job.dtype, scheme.element, b.codes, b.scales, job.group, stats)
    return Quantized(b.codes, b.scales, b.zeros if of_auto_round else None), bad


def _center(job: SearchJob, rule: str, least: float) -> None:
    """Scales, or by the rule "bias" biases, under which the codes that are there have a smaller mean error of each
    row's output; zero points, or biases, in `low`."""
    if job.means is None:
        raise ValueError("a search that is centered needs the means of the inputs")
    b = job.buffers
    moved = np.empty_like(b.scales)
    job.kernels.center_groups(
        job.source,
        job.dtype,
        job.scheme.bits,
        job.group,
        job.importance,
        job.means.spread,
        job.means.means,
        rule,
        job.scale_format,
        least,
        b.scales,
        b.low,
        moved,
        job.losses,
    )
    (b.scales if rule == "zero" else b.low)[:] = moved


def search_asymmetric(job: SearchJob, stats: NDArray[np.float64]) -> tuple[Quantized, int]:
    """`rtn.quantize_rows` for integers with zero points."""
    b, scheme, kernels = job.buffers, job.scheme, job.kernels
    of_auto_round = scheme.numbers == "auto_round"
    if of_auto_round:
        bad = kernels.rtn_int(job.source, job.dtype, scheme.bits, job.group, False, b.codes, b.scales, b.zeros)
    else:
        bad = kernels.group_range(job.source, job.dtype, job.group, b.low, b.high)
        bad += range_scales(b.low, b.high, scheme, job.stored, b.scales, b.zeros)
    np.copyto(b.low, b.zeros)
    _search_lines(job, "zero", LEAST if of_auto_round else TINY)
    np.copyto(b.zeros, b.low, casting="unsafe")
    rule = "round_add" if of_auto_round else "add_round"
    kernels.encode_affine(job.source, job.dtype, scheme.bits, job.group, b.scales, b.low, rule, b.codes)
    if job.search.centered:
        _center(job, "zero", LEAST if of_auto_round else TINY)
    kernels.error_affine(job.source, job.dtype, scheme.bits, b.codes, b.scales, b.low, job.group, "zero", stats)
    return Quantized(b.codes, b.scales, b.zeros), bad


def search_biases(job: SearchJob, stats: NDArray[np.float64]) -> tuple[Quantized, int]:
    """`rtn.quantize_rows` for affine codes of MLX. Codes are those of the stored scales and biases, where MLX takes
    them before these are rounded; so no group is worse than MLX's, searched or not."""
    b, scheme, kernels = job.buffers, job.scheme, job.kernels
    bad = kernels.group_range(job.source, job.dtype, job.group, b.low, b.high)
    finite = affine_lines(b, scheme.bits)
    round_lines(b, job.stored)
    _search_lines(job, "bias", TINY)
    bad += int((finite & ~(np.isfinite(b.scales) & np.isfinite(b.low))).sum())
    kernels.encode_affine(job.source, job.dtype, scheme.bits, job.group, b.scales, b.low, "subtract", b.codes)
    if job.search.centered:
        _center(job, "bias", TINY)
    kernels.error_affine(job.source, job.dtype, scheme.bits, b.codes, b.scales, b.low, job.group, "bias", stats)
    return Quantized(b.codes, b.scales, None, biases=b.low), bad


def _search_lines(job: SearchJob, rule: str, least: float) -> None:
    """Better scales, and zero points or biases in `low`."""
    job.kernels.search_affine(
        job.source,
        job.dtype,
        job.scheme.bits,
        job.group,
        job.importance,
        job.search.objective,
        job.factors(logarithmic=False),
        rule,
        job.search.sweeps,
        job.scale_format,
        least,
        job.buffers.scales,
        job.buffers.low,
        job.losses,
    )
