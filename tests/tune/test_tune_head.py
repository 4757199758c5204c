"""The head, tuned with what comes into it: nearer to its logits than the nearest codes, tied or not; and stops."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="block mode needs transformers")

import tuned_models as models

from shardq.kernels import load
from shardq.plans import make_plan
from shardq.quantizers.decode import decode_rows
from shardq.recipe import Recipe, make_recipe
from shardq.sources import open_source
from shardq.tune import driver, passes
from shardq.tune.blocks import BlockModel
from shardq.tune.driver import Place, tune_blocks
from shardq.tune.head import Logits, head_inputs, head_options
from shardq.tune.options import DataOptions, TuneOptions
from shardq.tune.result import TuneResult
from shardq.tune.settings import SignRoundOptions
from shardq.tune.subjects import find_subjects
from shardq.tune.work import Work
from shardq.tuned import load_tuned

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = DataOptions("random", nsamples=8, seqlen=16, seed=1)
LEARNING = SignRoundOptions(iters=20, batch_size=3)
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: models.make_model(name, base / name) for name in ("llama", "tied")}


def _recipe(blocks: bool = False, **more: Any) -> Recipe:
    ignore = [] if blocks else ["model.layers.**"]
    return make_recipe("W3A16G32", layout="fake", quant_lm_head=True, ignore=ignore, **more)


def _tune(folder: Path, out: Path, algorithm: Any, recipe: Recipe) -> TuneResult:
    options = TuneOptions(algorithm=algorithm, data=DATA, signround=LEARNING)
    return tune_blocks(open_source(str(folder)), recipe, options, Place(out))


@torch.no_grad()
def _error(folder: Path, out: Path, recipe: Recipe) -> float:
    """Mean square of the logits' errors by the head alone, on the samples of the tuning."""
    ids = torch.from_numpy(np.load(out / driver.IDS))
    with BlockModel.open(open_source(str(folder)), dtype=torch.float32) as model:
        head = find_subjects(model, make_plan(model.checkpoint, recipe)).head
        assert head is not None
        codes = passes.read_stored(out, head.module, (head,)).codes[head.tensor]
        batch = model.embed(ids)
        for index in range(len(model.block_names)):
            with model.block(index) as block:
                model.advance(block, batch, index)
        hidden = head_inputs(model, batch).hidden
        with model.head() as module:
            weight = head.weight(module).float()
        error = torch.from_numpy(decode_rows(codes, head.scheme, load())) - weight
        return float((hidden @ error.T).square().mean())


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_a_tuned_head_is_nearer_to_its_logits(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    errors = {}
    for algorithm in ("rtn", "opt-rtn", "gptq", "signround"):
        result = _tune(folders[name], tmp_path / algorithm, algorithm, _recipe())
        assert (result.modules, result.left) == (1, ())
        assert list(load_tuned(tmp_path / algorithm).refs) == ["lm_head"]
        errors[algorithm] = _error(folders[name], tmp_path / algorithm, _recipe())
    assert errors["opt-rtn"] < errors["rtn"], errors
    assert errors["gptq"] < 0.8 * errors["rtn"], errors
    assert errors["signround"] < 0.9 * errors["rtn"], errors


def test_its_inputs_have_passed_the_codes_of_the_blocks(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[Work] = []
    real = passes.tune_block

    def catch(work: Work, options: TuneOptions, *more: Any) -> Any:
        met.append(work)
        return real(work, options, *more)

    monkeypatch.setattr(passes, "tune_block", catch)
    _tune(folders["llama"], tmp_path / "out", "signround", _recipe(blocks=True))
    head, samples = met[-1], [0, 5]
    assert isinstance(head.wanted, Logits)
    assert len(head.wanted) == DATA.nsamples
    assert not torch.equal(head.wanted.hidden, head.inputs.hidden)  # of the way without codes
    whole = models.whole_logits(
        folders["llama"], torch.from_numpy(np.load(tmp_path / "out" / driver.IDS))[samples], torch.bfloat16
    )
    logits = head.wanted.hidden[samples] @ models.load_whole(folders["llama"], torch.bfloat16).lm_head.weight.T
    torch.testing.assert_close(logits, whole, rtol=0.02, atol=0.02)


def test_a_step_has_as_many_samples_as_a_blocks() -> None:
    found = head_options(SignRoundOptions(batch_size=4, gradient_accumulate_steps=3))
    assert (found.batch_size, found.gradient_accumulate_steps) == (1, 12)


def test_a_run_that_was_stopped_before_the_head_ends_with_the_same_bytes(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    recipe = _recipe(blocks=True)
    _tune(folders["llama"], whole, "gptq", recipe)

    def stopping(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(passes.Run, "head", stopping)
        with pytest.raises(KeyboardInterrupt):
            _tune(folders["llama"], again, "gptq", recipe)
    assert _tune(folders["llama"], again, "gptq", recipe).resumed == 3
    for path in whole.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    assert json.loads((again / "tuned.json").read_text())["blocks"].keys() >= {"lm_head.safetensors"}
