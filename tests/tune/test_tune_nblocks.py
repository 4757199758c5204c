"""Blocks that are tuned together: one loss behind the last, files for each, and the same bytes after kill -9."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="block mode needs transformers")

import tuned_models as models

from shardq.errors import BadOption
from shardq.plans import make_plan
from shardq.recipe import Recipe, make_recipe
from shardq.sources import open_source
from shardq.tune import passes
from shardq.tune.activations import call_block
from shardq.tune.blocks import BlockModel
from shardq.tune.driver import Place, tune_blocks
from shardq.tune.groups import Group, group_batch, group_subjects
from shardq.tune.options import DataOptions, TuneOptions
from shardq.tune.result import TuneResult
from shardq.tune.settings import SignRoundOptions
from shardq.tune.subjects import find_subjects
from shardq.tune.work import Work, put_codes

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = DataOptions("random", nsamples=6, seqlen=12, seed=1)
KILLED_AT = """
import os, signal, sys
from shardq.tune import passes
from test_tune_nblocks import tune

real, left = passes.tune_block, [int(sys.argv[4])]

def dying(work, *more):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(work, *more)

passes.tune_block = dying
tune(sys.argv[1], sys.argv[2], int(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: models.make_model(name, base / name) for name in ("llama", "gemma3")}


def _recipe() -> Recipe:
    return make_recipe("W3A16G32", layout="fake", quant_lm_head=True)


def tune(folder: str | Path, out: str | Path, nblocks: int) -> TuneResult:
    torch.set_num_threads(1)
    options = TuneOptions(data=DATA, signround=SignRoundOptions(iters=20, batch_size=6, nblocks=nblocks))
    return tune_blocks(open_source(str(folder)), _recipe(), options, Place(Path(out)))


@pytest.mark.parametrize("name", ["llama", "gemma3"])  # gemma3: blocks with other masks
def test_a_group_is_its_blocks_one_after_the_other(name: str, folders: dict[str, Path]) -> None:
    with BlockModel.open(open_source(str(folders[name])), dtype=torch.float32) as model, torch.no_grad():
        batch = model.embed(models.some_ids(3, 12))
        with model.block(1) as second, model.block(2) as third:
            expected = call_block(third, batch.moved(call_block(second, batch, 1)), 2)
            group = Group([second, third])
            found = call_block(group, group_batch(batch, 1, 3), 0)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
            part = group_batch(batch, 1, 3).pick([2, 0])
            torch.testing.assert_close(call_block(group, part, 0), expected[[2, 0]], rtol=1e-5, atol=1e-5)
            subjects = find_subjects(model, make_plan(model.checkpoint, _recipe())).blocks
            placed = group_subjects(subjects[1:])
            assert [s.tensor for s in placed] == [s.tensor for own in subjects[1:] for s in own]
            for s, own, block in zip(placed, subjects[1] + subjects[2], [second] * 7 + [third] * 7, strict=True):
                assert s.weight(group).data_ptr() == own.weight(block).data_ptr()


def test_groups_are_learned_by_what_their_last_block_gives(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[Work] = []
    losses: list[float] = []
    real = passes.tune_block

    @torch.no_grad()
    def loss(work: Work) -> float:
        assert work.wanted is not None
        return float((work.run(work.inputs).float() - work.wanted[list(range(6))].float()).square().mean())

    def catch(work: Work, options: TuneOptions, *more: Any) -> Any:
        met.append(work)
        found = real(work, options, *more)
        if len(work.subjects) == 14:
            nearest = real(work, TuneOptions(algorithm="rtn"), *more)
            for tried in (found, nearest):
                put_codes(work.block, work.subjects, tried.codes, work.kernels)
                losses.append(loss(work))
        return found

    monkeypatch.setattr(passes, "tune_block", catch)
    result = tune(folders["llama"], tmp_path / "out", 2)
    assert [len(w.subjects) for w in met] == [14, 7, 1]
    assert losses[0] < 0.9 * losses[1]
    assert (result.blocks, result.modules, result.left) == (3, 22, ())
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == [
        "lm_head.safetensors", *(f"model.layers.{i}.safetensors" for i in range(3)),
    ]  # fmt: skip


@pytest.mark.parametrize(("nblocks", "tuned", "there"), [(2, 1, 2), (2, 2, 3), (1, 1, 1)])
def test_a_killed_run_ends_with_the_same_bytes(
    nblocks: int, tuned: int, there: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    tune(folders["llama"], whole, nblocks)
    words = [sys.executable, "-P", "-c", KILLED_AT, str(folders["llama"]), str(again), str(nblocks), str(tuned)]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    ended = subprocess.run(words, check=False, env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert tune(folders["llama"], again, nblocks).resumed == there
    assert sorted(p.name for p in whole.iterdir()) == sorted(p.name for p in again.iterdir())
    for made in whole.iterdir():
        assert made.read_bytes() == (again / made.name).read_bytes(), made.name


def test_a_group_of_which_a_file_is_missing_is_tuned_again(folders: dict[str, Path], tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    for out in (whole, again):
        tune(folders["llama"], out, 3)
    for name in ("model.layers.1.safetensors", "tuned.json"):
        (again / name).unlink()
    (again / "identity.json").write_text(_identity(whole))
    assert tune(folders["llama"], again, 3).resumed == 1
    for made in whole.iterdir():
        assert made.read_bytes() == (again / made.name).read_bytes(), made.name


def _identity(folder: Path) -> str:
    return json.dumps(json.loads((folder / "tuned.json").read_text())["identity"], sort_keys=True)


def test_no_block_at_a_time_is_refused() -> None:
    with pytest.raises(BadOption, match="nblocks"):
        SignRoundOptions(nblocks=0)
