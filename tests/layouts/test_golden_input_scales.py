"""Scales of activations against compressed-tensors' own; golden/compressed_tensors/PROVENANCE.md says how made."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from shardq.layouts.stored import load, store
from shardq.making import TARGET_ARRAYS
from shardq.quantizers.input_scales import input_scale
from shardq.schemes import PRESETS

CASES: Final[Mapping[str, Any]] = json.loads(
    (Path(__file__).with_name("golden") / "compressed_tensors" / "input_scales.json").read_text()
)


@pytest.mark.parametrize(("name", "dtype"), [(n, d) for n, of in CASES.items() for d in of])
def test_scales_are_those_of_the_library(name: str, dtype: str) -> None:
    scheme = PRESETS[name].scheme
    for amax, expected in CASES[name][dtype]:
        found = input_scale(scheme, amax, dtype)
        assert found == expected, amax
        if name != "NVFP4":  # the file loses nothing of it
            stored = store(np.full(1, found, np.float32), np.dtype(TARGET_ARRAYS[dtype]))
            assert float(load(stored)[0]) == expected


@pytest.mark.parametrize("amax", [math.nan, math.inf])
def test_what_is_not_finite_has_no_scale(amax: float) -> None:
    assert {input_scale(PRESETS[n].scheme, amax, "BF16") for n in CASES} == {None}


def test_a_scale_beyond_its_type_is_none() -> None:
    scheme = PRESETS["FP8_STATIC"].scheme
    assert input_scale(scheme, 65504.0 * 448, "F16") == 65504.0
    assert input_scale(scheme, 65536.0 * 448, "F16") is None
    assert input_scale(scheme, 65536.0 * 448, "BF16") == 65536.0
