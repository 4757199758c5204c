"""AWQ: what scaling does to a block, what the search finds, and an output with replaced norms."""

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("transformers", reason="block mode needs transformers")

import shardq
from shardq.cli.group import commands
from shardq.errors import BadOption, BadTuned
from shardq.kernels import load
from shardq.ledger import decode_ledger
from shardq.plans import make_plan
from shardq.recipe import Recipe, make_recipe
from shardq.sources import open_source
from shardq.tune import block_awq, driver
from shardq.tune.awq import AwqOptions
from shardq.tune.awq_sites import Site, find_awq_sites
from shardq.tune.blocks import BlockModel
from shardq.tune.driver import Place, TuneResult, tune_blocks
from shardq.tune.options import DataOptions, TuneOptions
from shardq.tune.signround import SignRoundOptions
from shardq.tune.subjects import Subject, find_subjects
from shardq.tune.work import Changes, Work
from shardq.tuned import load_tuned

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parent)
    models: Any = importlib.import_module("tuned_models")

DATA = DataOptions("random", nsamples=4, seqlen=16, seed=1)
LEARNING = SignRoundOptions(iters=4, batch_size=2)
NAMES = ("llama", "qwen3_moe", "gemma3", "deepseek_v3")
SHORT = AwqOptions(awq_n_grid=6)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: models.make_model(name, base / name) for name in NAMES}


def _recipe(scheme: str = "W4A16G32", layout: str = "fake", **more: Any) -> Recipe:
    return make_recipe(scheme, layout=layout, **more)


def _tune(folder: Path, out: Path, algorithm: str, recipe: Recipe | None = None, **more: Any) -> TuneResult:
    options = TuneOptions(algorithm=algorithm, data=DATA, signround=LEARNING, **{"awq": SHORT, **more})
    return tune_blocks(open_source(str(folder)), recipe or _recipe(), options, Place(out))


@contextmanager
def _first_block(folder: Path, recipe: Recipe | None = None) -> Iterator[tuple[Work, tuple[Site, ...]]]:
    """A model's first block, and its sites."""
    with BlockModel.open(open_source(str(folder)), dtype=torch.float32) as model, torch.no_grad():
        plan = make_plan(model.checkpoint, recipe or _recipe())
        subjects = find_subjects(model, plan)
        sites = find_awq_sites(model, plan, subjects)
        with model.block(0) as block:
            batch = model.embed(models.some_ids())
            yield Work(block, 0, subjects.blocks[0], batch, None, load(), 0), sites[0]


@pytest.mark.parametrize("name", NAMES)
def test_scaling_leaves_what_a_block_computes(name: str, folders: dict[str, Path]) -> None:
    with _first_block(folders[name]) as (work, sites):
        expected = {"llama": 3, "qwen3_moe": 1, "gemma3": 3, "deepseek_v3": 5}[name]  # heads share keys and values
        assert len(sites) == expected, [s.parent for s in sites]
        before, changes = work.run(work.inputs), Changes()
        for site in sites:
            columns = site.behind[0].shape[1]
            factors = torch.exp(torch.randn(columns, generator=torch.Generator().manual_seed(columns)))
            block_awq.apply_factors(work.block, site, factors, changes)
        after = work.run(work.inputs)
        assert float((after - before).abs().max()) < 2e-5 * float(before.abs().max())
        assert all(values.dtype == torch.bfloat16 for values in changes.replaced.values())


@pytest.mark.parametrize("duo", ["true", "false", "both"])
def test_the_search_is_never_worse_than_no_scaling(duo: Any, folders: dict[str, Path]) -> None:
    options = AwqOptions(awq_n_grid=8, awq_duo_scaling=duo)
    assert options.candidates[0] == (0.0, False)
    better = 0
    with _first_block(folders["llama"]) as (work, sites):
        for site, seen in zip(sites, block_awq._record(work, sites, options), strict=True):
            module = site.module(work.block)
            wanted = [block_awq._output(module(*args, **kwargs)) for args, kwargs in seen.calls]
            best = block_awq.search_factors(work, site, seen, options)
            assert best is not None
            losses = [block_awq._loss(work, site, seen, wanted, f) for f in (torch.ones_like(best), best)]
            assert losses[1] <= losses[0]
            better += losses[1] < losses[0]
    assert better


def test_a_block_with_the_best_scales_has_less_error(folders: dict[str, Path], tmp_path: Path) -> None:
    errors = {}
    for algorithm in ("rtn", "awq,rtn", "opt-rtn", "awq"):
        _tune(folders["llama"], tmp_path / algorithm, algorithm, _recipe("W3A16G32"), awq=AwqOptions())
        made = shardq.quantize(
            str(folders["llama"]), make_recipe("W3A16G32", layout="fake", tuned=tmp_path / algorithm),
            output_dir=tmp_path / f"out-{algorithm}",
        )  # fmt: skip
        ids = models.some_ids(4, 48)
        wanted, found = (models.whole_logits(f, ids).log_softmax(-1) for f in (folders["llama"], made.output))
        errors[algorithm] = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    print(errors)
    assert errors["awq,rtn"] < errors["rtn"]
