"""Models tuned block by block: nearer to themselves than the nearest codes, and the same files after a stop."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="block mode needs transformers")

import tuned_models as models

import shardq
from shardq.errors import BadOption, RecipeChanged
from shardq.quantizers.float_scales import global_scale
from shardq.recipe import Recipe, make_recipe
from shardq.sources import open_source
from shardq.tune import passes
from shardq.tune.driver import Place, tune_blocks
from shardq.tune.options import DataOptions, TuneOptions
from shardq.tune.result import TuneResult
from shardq.tune.settings import SignRoundOptions
from shardq.tune.work import Work
from shardq.tuned import load_tuned

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = DataOptions("random", nsamples=6, seqlen=16, seed=1)
LEARNING = SignRoundOptions(iters=8, batch_size=3)
NAMES = ("llama", "qwen3_moe", "qwen3_vl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: models.make_model(name, base / name) for name in NAMES}


def _recipe(scheme: str = "W3A16G32", layout: str = "fake", **more: Any) -> Recipe:
    return make_recipe(scheme, layout=layout, **more)


def _options(algorithm: Any, **more: Any) -> TuneOptions:
    return TuneOptions(algorithm=algorithm, data=DATA, signround=LEARNING, **more)


def _tune(folder: Path, out: Path, algorithm: str, recipe: Recipe | None = None, **more: Any) -> TuneResult:
    return tune_blocks(open_source(str(folder)), recipe or _recipe(), _options(algorithm, **more), Place(out))


@pytest.mark.parametrize("name", NAMES)
def test_each_algorithm_is_better_than_the_nearest_codes(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    algorithms = ("rtn", "gptq", "signround") if name != "qwen3_vl" else ("rtn", "gptq")
    results = {a: _tune(folders[name], tmp_path / a, a) for a in algorithms}
    errors = {a: models.coded_error(folders[name], tmp_path / a, _recipe()) for a in results}
    assert errors["gptq"] < 0.8 * errors["rtn"], errors
    assert errors.get("signround", 0) < 0.9 * errors["rtn"], errors
    modules = {r.modules for r in results.values()}
    assert modules == {3 * (4 + 8 * 3) if name == "qwen3_moe" else 3 * 7}
    assert all(r.left == () for r in results.values())


def test_experts_get_codes_in_the_type_that_is_computed_with(folders: dict[str, Path], tmp_path: Path) -> None:
    _tune(folders["qwen3_moe"], tmp_path / "out", "gptq", dtype="bfloat16")
    assert models.coded_error(folders["qwen3_moe"], tmp_path / "out", _recipe()) > 0


@pytest.mark.parametrize(("algorithm", "quanted"), [("gptq", True), ("signround", True), ("signround", False)])
def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    algorithm: str, quanted: bool, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    _tune(folders["llama"], whole, algorithm, enable_quanted_input=quanted)
    real = passes.tune_block

    def stopping(work: Work, *more: Any) -> Any:
        if work.index == 2:
            raise KeyboardInterrupt
        return real(work, *more)

    with monkeypatch.context() as stopped:
        stopped.setattr(passes, "tune_block", stopping)
        with pytest.raises(KeyboardInterrupt):
            _tune(folders["llama"], again, algorithm, enable_quanted_input=quanted)
    result = _tune(folders["llama"], again, algorithm, enable_quanted_input=quanted)
    assert result.resumed == 2
    files = sorted(p.name for p in whole.iterdir())
    assert files == sorted(p.name for p in again.iterdir())
    assert all((whole / n).read_bytes() == (again / n).read_bytes() for n in files)


def test_hidden_states_in_files_give_the_same_codes(folders: dict[str, Path], tmp_path: Path) -> None:
    source = open_source(str(folders["llama"]))
    one_sample = DATA.seqlen * 64 * 4
    for name, most in (("memory", None), ("files", one_sample)):
        tune_blocks(source, _recipe(), _options("signround"), Place(tmp_path / name, most))
    for path in (tmp_path / "memory").iterdir():
        assert path.read_bytes() == (tmp_path / "files" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("scheme", "layout"),
    [
        ("FP8_DYNAMIC", "compressed-tensors"), ("FP8_BLOCK", "fp8"), ("FP8_TENSOR", "compressed-tensors"),
        ("MXFP4", "compressed-tensors"), ("MXFP8", "compressed-tensors"), ("MXINT4", "auto_round"),
        ("NVFP4A16", "compressed-tensors"), ("W8A8", "compressed-tensors"), ("4bit", "mlx"),
    ],
)  # fmt: skip
def test_gptq_takes_every_kind_of_codes(scheme: str, layout: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Matrix by matrix it errs no more by H than the nearest codes; so the block does, but for chance."""
    more = {"group_size": 32} if layout == "mlx" else {}
    recipe, source = _recipe(scheme, layout, **more), folders["llama"]
    errors = {}
    for algorithm in ("rtn", "gptq"):
        _tune(source, tmp_path / algorithm, algorithm, recipe)
        errors[algorithm] = models.coded_error(source, tmp_path / algorithm, recipe)
    assert 0 < errors["gptq"] < errors["rtn"], errors
    packed = _recipe(scheme, layout, tuned=tmp_path / "gptq", **more)
    out = tmp_path / "out"
    shardq.quantize(str(source), packed, output_dir=out, limits=shardq.Limits(parallel=1))
    assert shardq.verify(out, deep=True, source=str(source)).problems == ()


def test_members_of_a_fused_group_share_their_scale(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = _recipe("NVFP4A16", "compressed-tensors")
    _tune(folders["llama"], tmp_path / "out", "gptq", recipe)
    refs = load_tuned(tmp_path / "out").refs
    found = [m for m in refs if m.startswith("model.layers.0.")]
    scales = {m.rpartition(".")[2]: refs[m].global_scale for m in found}
    weights = load_file(folders["llama"] / "model.safetensors")
    largest = {m: float(weights[f"{m}.weight"].abs().max()) for m in found}
    for group in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
        most = max(value for m, value in largest.items() if m.rpartition(".")[2] in group)
        assert {scales[m] for m in group} == {float(global_scale(most, 6.0))}


def test_a_folder_keeps_its_words(folders: dict[str, Path], tmp_path: Path) -> None:
    _tune(folders["llama"], tmp_path / "out", "rtn")
    with pytest.raises(RecipeChanged, match="tuned otherwise"):
        _tune(folders["llama"], tmp_path / "out", "gptq")


def test_what_cannot_be_tuned_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="GGUF"):
        _tune(folders["llama"], tmp_path / "a", "gptq", make_recipe("Q4_0"))
    with pytest.raises(BadOption, match="--algorithm"):
        _options("sorcery")
