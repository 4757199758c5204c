"""auto-round 0.16.1's own search for scales of integers, as its torch code computes it: scales and codes bit for bit.

On one thread here, but threads change nothing (512 x 2048 weights on one and two): torch divides the groups among them,
not a group. Nor does `torch.compile` (20,480 groups): the search branches on data, so that its loop stays eager. What
does change sums is a CPU without AVX2, where torch adds in another order; and importance that is 0, which auto-round
replaces by a mean or by the weights, and we take as it is.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shardq.kernels import load
from shardq.layouts import find_layout
from shardq.quantizers.buffers import Buffers, buffer_shapes
from shardq.quantizers.rtn import quantize_rows
from shardq.schemes import parse_scheme
from shardq.search import AUTO_ROUND

MakeWeight = Callable[[int, int, int, torch.dtype], torch.Tensor]
DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def raw(w: torch.Tensor) -> NDArray[Any]:
    return w.numpy() if w.dtype == torch.float32 else w.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.oracle
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["W4A16", "W2A16G32", "W3A16", "W4A16G32", "W2A16G64", "W4A16CH"])
def test_scales_and_codes_equal_auto_round(
    name: str, dtype: str, weighted: bool, make_weight: MakeWeight, one_thread: None
) -> None:
    pytest.importorskip("auto_round", reason="auto-round is not installed")
    from auto_round.data_type.int import quant_tensor_opt_rtn_sym

    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torch adds in another order than with AVX2")
    scheme = find_layout("auto_round").settle(parse_scheme(name).scheme)
    w = make_weight(64, 576, 7, DTYPES[dtype])
    importance = torch.rand(576, generator=torch.Generator().manual_seed(3)) ** 4 * 30 + 1e-3 if weighted else None
    decoded, scales, _ = quant_tensor_opt_rtn_sym(w.clone(), scheme.bits, scheme.group_size, imatrix=importance)
    groups = scheme.groups(576)
    scales = scales.reshape(64, groups)

    buffers = Buffers(*(np.zeros(shape, kind) for shape, kind in buffer_shapes(64, 576, scheme)))
    stats = np.empty((64, 3))
    e = None if importance is None else importance.numpy()
    found, bad = quantize_rows(
        raw(w), dtype, scheme, buffers, stats, load(), search=AUTO_ROUND, importance=e
    )  # fmt: skip
    assert bad == 0
    assert torch.equal(torch.from_numpy(found.scales), scales.half().float())
    steps = scales.repeat_interleave(scheme.group_columns(576), 1)[:, :576]
    levels = torch.from_numpy(found.codes.astype(np.float32) - 2 ** (scheme.bits - 1)).to(w.dtype)
    assert torch.equal(levels * steps + 0.0, decoded + 0.0)  # -0 is 0
