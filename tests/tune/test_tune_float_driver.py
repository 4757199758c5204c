"""Whole models whose small floats are learned: nearer to themselves as they are served, and packed to the end."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("transformers", reason="block mode needs transformers")

import tuned_models as models

from shardq.cli.group import commands
from shardq.recipe import Recipe, make_recipe
from shardq.sources import open_source
from shardq.tune.driver import Place, tune_blocks
from shardq.tune.options import DataOptions, TuneOptions
from shardq.tune.settings import SignRoundOptions

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = DataOptions("random", nsamples=6, seqlen=16, seed=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: models.make_model(name, base / name) for name in ("llama", "qwen3_moe")}


def _tune(folder: Path, out: Path, algorithm: Any, recipe: Recipe, **learning: Any) -> None:
    options = TuneOptions(
        algorithm=algorithm, data=DATA, dtype="float32",
        signround=SignRoundOptions(**{"iters": 12, "batch_size": 3, **learning}),
    )  # fmt: skip
    tune_blocks(open_source(str(folder)), recipe, options, Place(out))


@pytest.mark.parametrize(
    ("model", "scheme", "learning", "most"),
    [
        ("llama", "MXFP4", {}, 0.9),
        ("llama", "MXFP4", {"momentum": 0.5}, 0.9),
        ("llama", "MXFP4", {"enable_adam": True, "lr": 0.05}, 0.9),
        ("llama", "NVFP4", {}, 0.9),
        ("llama", "NVFP4_E5M3", {}, 0.9),
        ("llama", "FP8_DYNAMIC", {}, 1.0),
        ("llama", "FPW8A16_BLOCK", {}, 1.0),
        ("llama", "W8A8", {}, 1.0),
        ("qwen3_moe", "NVFP4", {}, 0.9),
    ],
)
def test_it_is_better_than_the_nearest_codes(
    model: str, scheme: str, learning: dict[str, Any], most: float, folders: dict[str, Path], tmp_path: Path
) -> None:
    recipe = make_recipe(scheme, layout="fake")
    errors = {}
    for algorithm in ("rtn", "signround"):
        _tune(folders[model], tmp_path / algorithm, algorithm, recipe, **learning)
        errors[algorithm] = models.coded_error(folders[model], tmp_path / algorithm, recipe)
    print(model, scheme, learning, errors, errors["signround"] / errors["rtn"])
    assert errors["signround"] < most * errors["rtn"], errors


@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP4@compressed-tensors", "NVFP4A16", "FP8_BLOCK@fp8"])
def test_codes_are_tuned_and_packed(scheme: str, folders: dict[str, Path], tmp_path: Path) -> None:
    source, out = str(folders["llama"]), str(tmp_path / "out")
    words = (
        "--scheme", scheme, "--dataset", "random", "--nsamples", "4", "--seqlen", "16", "--parallel", "1",
        "--iters", "2", "--batch-size", "2", "-o", out,
    )  # fmt: skip
    for command in (("tune", source, *words), ("verify", out, "--deep", "--source", source)):
        found = CliRunner().invoke(commands, list(command), catch_exceptions=False)
        assert found.exit_code == 0, found.output
