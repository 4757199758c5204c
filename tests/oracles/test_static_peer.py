"""Scales of activations beside those of auto-round 0.16.1's whole-model flow: the same tensors, and in the first block,
which nothing before it has changed, the same numbers."""

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file

from shardq import Limits, make_recipe, quantize
from shardq.sources import open_source

pytestmark = [pytest.mark.oracle, pytest.mark.slow]
SAMPLES, TOKENS = 8, 32
FORMATS: Final = {"auto_round": "auto_round", "compressed-tensors": "llm_compressor"}  # layout -> auto-round's word
OF_INPUTS: Final = ("input_scale", "input_global_scale")


@pytest.fixture(scope="module")
def models() -> Any:
    if find_spec("auto_round") is None:
        pytest.skip("auto-round is not installed here; `nox -s oracles` installs it")
    pytest.importorskip("transformers", reason="`nox -s oracles` installs transformers")
    import tuned_models

    return tuned_models


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, drawn = tmp_path_factory.mktemp("texts") / "texts.jsonl", random.Random(0)
    lines = (" ".join(str(drawn.randrange(90)) for _ in range(2 * TOKENS)) for _ in range(SAMPLES))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def run_peer(source: Path, out: Path, scheme: str, layout: str, texts: Path) -> dict[str, torch.Tensor]:
    words = ["--model", source, "--scheme", scheme, "--format", FORMATS[layout], "--output_dir", out]
    words += ["--iters", 0, "--disable_opt_rtn", "--disable_model_free", "--device_map", "cpu"]
    words += ["--dataset", texts, "--nsamples", SAMPLES, "--seqlen", TOKENS]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "auto_round", *map(str, words)],
        cwd=out.parent, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return {n: t for path in out.rglob("*.safetensors") for n, t in load_file(path).items()}


def run_ours(source: Path, out: Path, scheme: str, layout: str, texts: Path) -> dict[str, torch.Tensor]:
    from shardq.tune.driver import Place, tune_blocks
    from shardq.tune.options import DataOptions, TuneOptions

    tuned, data = out.with_suffix(".tuned"), DataOptions(str(texts), nsamples=SAMPLES, seqlen=TOKENS)
    options = TuneOptions("rtn", data, dtype="auto")
    tune_blocks(open_source(str(source)), make_recipe(scheme, layout=layout), options, Place(tuned))
    recipe = make_recipe(scheme, layout=layout, tuned=tuned)
    quantize(source, recipe, output_dir=out, limits=Limits(parallel=1))
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("scheme", ["FP8_STATIC", "NVFP4"])
def test_tensors_and_scales_are_those_of_auto_round(
    scheme: str, layout: str, models: Any, texts: Path, tmp_path: Path
) -> None:
    source = models.make_model("llama", tmp_path / "source")
    theirs = run_peer(source, tmp_path / "theirs", scheme, layout, texts)
    ours = run_ours(source, tmp_path / "ours", scheme, layout, texts)
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    scales = [n for n in ours if n.rpartition(".")[2] in OF_INPUTS]
    assert len(scales) == 3 * 7
    for name in scales:
        if ".layers.0." in name:
            assert torch.equal(ours[name], theirs[name]), name
        assert torch.allclose(ours[name], theirs[name], rtol=0.1), name
