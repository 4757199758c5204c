"""Every tensor that auto-round 0.16.1 writes of a real model, byte for byte."""

from collections.abc import Callable
from pathlib import Path

import pytest

from shardq import Limits, make_recipe, quantize

RunAutoRound = Callable[..., Path]
Compare = Callable[[Path, Path], tuple[int, list[str]]]


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["W4A16G64", "W4A16G32", "W8A16G64", "W8A16G32"])
def test_all_tensors_of_smollm2_equal_auto_round(
    scheme: str, tmp_path: Path, run_auto_round: RunAutoRound, smollm2: Path, compare: Compare
) -> None:
    theirs = run_auto_round(smollm2, tmp_path / "theirs", "--scheme", scheme)
    quantize(smollm2, make_recipe(scheme), output_dir=tmp_path / "ours", limits=Limits(parallel=1))
    count, differences = compare(tmp_path / "ours", theirs)
    assert count == 30 * 7 * 3 + 62
    assert differences == []
