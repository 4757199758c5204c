"""What --max-disk counts is what a tuning writes, and what will not fit is refused before a weight is read."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="block mode needs transformers")

import tuned_models as models

from shardq.errors import BudgetTooSmall
from shardq.plans import make_plan
from shardq.recipe import Recipe, make_recipe
from shardq.sources import open_source
from shardq.tune import spool
from shardq.tune.blocks import BlockModel
from shardq.tune.disk import OTHER_BYTES, codes_bytes, hidden_bytes
from shardq.tune.driver import Place, tune_blocks
from shardq.tune.options import DataOptions, TuneOptions
from shardq.tune.result import TuneResult
from shardq.tune.settings import SignRoundOptions
from shardq.tune.subjects import find_subjects

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES, TOKENS = 6, 16
ONE_SAMPLE = TOKENS * 64 * 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: models.make_model(name, base / name) for name in ("llama", "gpt_oss")}


def _options(algorithm: Any = "rtn", **more: Any) -> TuneOptions:
    data = DataOptions("random", nsamples=SAMPLES, seqlen=TOKENS)
    learning = SignRoundOptions(iters=1, batch_size=2)
    return TuneOptions(algorithm=algorithm, data=data, dtype="float32", signround=learning, **more)


def _tune(folder: Path, place: Place, recipe: Recipe, options: TuneOptions) -> TuneResult:
    return tune_blocks(open_source(str(folder)), recipe, options, place)


@pytest.mark.parametrize(
    ("name", "scheme", "layout"),
    [
        ("llama", "W4A16G32", "auto_round"), ("llama", "W4A16G32", "mlx"), ("llama", "NVFP4A16", "compressed-tensors"),
        ("llama", "W8A16", "fake"), ("gpt_oss", "W3A16G32", "fake"),
    ],
)  # fmt: skip
def test_files_of_codes_are_as_large_as_said(
    name: str, scheme: str, layout: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    recipe = make_recipe(scheme, layout=layout, quant_lm_head=True, ragged="shrink")
    with BlockModel.open(open_source(str(folders[name])), dtype=torch.float32) as model:
        said = codes_bytes(find_subjects(model, make_plan(model.checkpoint, recipe)))
        assert hidden_bytes(model, SAMPLES, TOKENS) == SAMPLES * ONE_SAMPLE
    _tune(folders[name], Place(tmp_path / "out"), recipe, _options())
    found = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert 0.9 * said < found <= said
    assert sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) < said + OTHER_BYTES


@pytest.mark.parametrize(
    ("algorithm", "quanted", "chains"), [("gptq", True, 1), ("gptq", False, 2), ("signround", True, 2)]
)
def test_a_cap_counts_hidden_states_in_files(
    algorithm: str, quanted: bool, chains: int, folders: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    recipe, options = make_recipe("W4A16G32", layout="fake"), _options(algorithm, enable_quanted_input=quanted)
    spooled: list[int] = []
    real = spool.preallocate

    def count(fd: int, size_bytes: int, what: str) -> None:
        spooled.append(size_bytes)
        real(fd, size_bytes, what)

    monkeypatch.setattr(spool, "preallocate", count)
    with BlockModel.open(open_source(str(folders["llama"])), dtype=torch.float32) as model:
        codes = codes_bytes(find_subjects(model, make_plan(model.checkpoint, recipe)))
    base = codes + SAMPLES * TOKENS * 8 + OTHER_BYTES
    needed = base + chains * SAMPLES * ONE_SAMPLE
    with pytest.raises(BudgetTooSmall, match=f"{chains * SAMPLES * ONE_SAMPLE} of hidden states"):
        _tune(folders["llama"], Place(tmp_path / "a", ONE_SAMPLE, needed - 1), recipe, options)
    with pytest.raises(BudgetTooSmall, match="for codes; allow more"):
        _tune(folders["llama"], Place(tmp_path / "a", None, base - 1), recipe, options)
    assert not (tmp_path / "a").exists()
    _tune(folders["llama"], Place(tmp_path / "memory", None, base), recipe, options)
    assert not spooled
    _tune(folders["llama"], Place(tmp_path / "files", ONE_SAMPLE, needed), recipe, options)
    assert sum(spooled) == chains * SAMPLES * ONE_SAMPLE
    written = sum(p.stat().st_size for p in (tmp_path / "files").iterdir())
    assert written + sum(spooled) <= needed


def test_it_is_refused_before_a_weight_is_read(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    for name in ("embed", "block"):
        monkeypatch.setattr(BlockModel, name, read)
    with pytest.raises(BudgetTooSmall, match="--max-disk of 1000 bytes"):
        _tune(folders["llama"], Place(tmp_path / "out", None, 1000), make_recipe("W4A16G32"), _options())
