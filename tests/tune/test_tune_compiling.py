"""Compiled rounding: numbers of torch's own operations, bit by bit, from functions that were compiled as a whole."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from shardq.errors import MissingPackage, RecipeChanged, TaskFailed
from shardq.recipe import make_recipe
from shardq.schemes import PRESETS
from shardq.sources import open_source
from shardq.tune import compiling, rounding_parts
from shardq.tune.arithmetic import EAGER
from shardq.tune.driver import Place, tune_blocks
from shardq.tune.options import DataOptions, TuneOptions
from shardq.tune.rounding import begin_learning, make_grid
from shardq.tune.rounding_parts import Part
from shardq.tune.settings import SignRoundOptions

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles with g++")
SHAPES = ((48, 160), (20, 400))  # no two sizes alike, which would be a form of its own


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.set_num_threads(1)
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("name", ["W4A16_ASYM", "NVFP4"])
def test_compiled_numbers_are_those_of_single_operations(name: str) -> None:
    scheme, made = PRESETS[name].scheme, compiling.compile_arithmetic()
    for rows, columns in SHAPES:
        generator = torch.Generator().manual_seed(rows)
        weight = torch.randn(rows, columns, generator=generator) * 0.02
        weight[3] = 0
        grid = make_grid(weight, scheme, "BF16", [Part(slice(0, rows), float(weight.abs().max()))])
        learned = begin_learning(grid, factors=True)
        v = torch.rand(learned.v.shape, generator=generator) - 0.5
        factors = [torch.rand(f.shape, generator=generator) / 4 + 0.75 for f in learned.factors]
        grad = torch.randn(v.shape, generator=generator)
        assert torch.equal(made.values(grid, v, factors), EAGER.values(grid, v, factors))
        pulled = zip(made.pull(grid, grad, v, factors), EAGER.pull(grid, grad, v, factors), strict=True)
        for one, other in pulled:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4 * float(other.abs().max()))
    assert counters["stats"]["unique_graphs"] == 2  # for both shapes
    assert not counters["graph_break"]


def test_without_a_compiler_it_says_so_beforehand() -> None:
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(MissingPackage, match=r"no C\+\+ compiler; install g\+\+, name one in CXX, or leave it"),
    ):
        compiling.check_compiler(torch.device("cpu"))


def test_what_cannot_be_compiled_is_no_silent_detour() -> None:
    def strange(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x

    with pytest.raises(TaskFailed, match=r"--enable_torch_compile: torch .* cannot compile this .*: leave it out$"):
        compiling._compiled(strange)(torch.ones(2))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_model_gets_the_codes_of_single_operations(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="block mode needs transformers")
    torch.set_num_threads(threads)
    monkeypatch.setattr(rounding_parts, "TILE_WEIGHTS", 1 << 10)  # a matrix has several, which threads share
    import tuned_models as models

    folder = models.make_model("llama", tmp_path / "llama")
    for name, compiled in (("eager", False), ("compiled", True)):
        options = TuneOptions(
            data=DataOptions("random", nsamples=4, seqlen=12, seed=1),
            dtype="float32",
            signround=SignRoundOptions(iters=4, batch_size=2, enable_torch_compile=compiled),
        )
        tune_blocks(open_source(str(folder)), make_recipe("W4A16G32", layout="fake"), options, Place(tmp_path / name))
        assert (counters["stats"]["unique_graphs"] > 2) == compiled  # the sum that is tried beforehand is one
    for path in (tmp_path / "eager").glob("*.safetensors"):
        one, other = load_file(path), load_file(tmp_path / "compiled" / path.name)
        assert all(torch.equal(one[key], other[key]) for key in one), path.name
    with pytest.raises(RecipeChanged, match="tuned otherwise"):
        tune_blocks(
            open_source(str(folder)), make_recipe("W4A16G32", layout="fake"), options, Place(tmp_path / "eager")
        )
