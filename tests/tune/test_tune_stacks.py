"""Experts that a checkpoint stores as stacks, turned or with gate and up in alternate rows: tuned codes reach the main
job in the form of each of its matrices."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="block mode needs transformers")

import encoded_sources as sources
import tuned_models as models

import shardq
from shardq.kernels import load
from shardq.plans import make_plan
from shardq.quantizers.decode import decode_rows
from shardq.recipe import Recipe, make_recipe
from shardq.sources import open_source
from shardq.tune import driver, passes
from shardq.tune.blocks import BlockModel
from shardq.tune.driver import Place, tune_blocks
from shardq.tune.inputs import between, first_of, given, recording
from shardq.tune.options import DataOptions, TuneOptions
from shardq.tune.reading import BlockReader
from shardq.tune.result import TuneResult
from shardq.tune.settings import SignRoundOptions
from shardq.tune.subjects import find_subjects

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = DataOptions("random", nsamples=8, seqlen=16, seed=1)
LEARNING = SignRoundOptions(iters=20, batch_size=8)
EXPERTS = {"gpt_oss": 3 * 4 * 3, "llama4": 2 * 4 * 3, "qwen3_vl_moe": 3 * 4 * 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: models.make_model(name, base / name) for name in EXPERTS}


def _write(kind: str, folder: Path) -> Path:
    """A checkpoint with experts: blocks of codes, stacks in 16 bits, these one by one, or of square slices."""
    if kind == "square":
        model = models.make_model("gpt_oss", folder / "made")
        path = model / "model.safetensors"
        tensors = {n: t[:, :64] if n.endswith("down_proj") else t for n, t in load_file(path).items()}
        tensors = {n: t[..., :128] if "gate_up_proj" in n else t for n, t in tensors.items()}
        save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
        return Path(model)
    case = sources.CASES[kind.removesuffix(" single")]
    made: Path = sources.write_source(case, folder / "made")
    return sources.write_twin(case, made, folder / "single", None) if kind.endswith("single") else made


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *((kind, "fake") for kind in ("gpt_oss", "gpt_oss_bf16", "gpt_oss_bf16 single", "square", "granitemoe")),
        ("gpt_oss", "gptq"),
        ("gpt_oss_bf16", "gptq"),
    ],
)
@torch.no_grad()
def test_places_hold_the_weights_of_the_plan(kind: str, layout: str, tmp_path: Path) -> None:
    source = open_source(str(_write(kind, tmp_path)))
    with BlockModel.open(source, dtype=torch.float32) as model:
        plan = make_plan(model.checkpoint, _recipe("W4A16G32", layout, requantize=True))
        found = find_subjects(model, plan)
        assert found.left == ()
        own = [s for s in found.blocks[0] if s.place.expert is not None]
        assert len(own) == 3 * (max(s.place.expert or 0 for s in own) + 1)
        reader = BlockReader(source, load())
        with model.block(0) as block:
            for s in found.blocks[0]:
                expected = reader.fetch([plan.weights.tensors[s.tensor]], False).take(s.tensor, torch.float32)
                assert torch.equal(s.weight(block), expected), s.tensor
        reader.close()


def _recipe(scheme: str = "W3A16G32", layout: str = "fake", **more: Any) -> Recipe:
    return make_recipe(scheme, layout=layout, **more)


def _tune(folder: Path, out: Path, algorithm: Any, recipe: Recipe | None = None) -> TuneResult:
    options = TuneOptions(algorithm=algorithm, data=DATA, signround=LEARNING)
    return tune_blocks(open_source(str(folder)), recipe or _recipe(), options, Place(out))


@pytest.mark.parametrize("name", EXPERTS)
def test_the_nearest_codes_are_those_of_quantize(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = {"scheme": "W4A16G32", "layout": "compressed-tensors"}
    result = _tune(folders[name], tmp_path / "tuned", "rtn", _recipe(**recipe))
    assert result.left == ()
    assert result.modules >= EXPERTS[name]
    made, plain = tmp_path / "made", tmp_path / "plain"
    limits = shardq.Limits(parallel=1)
    shardq.quantize(folders[name], _recipe(**recipe, tuned=str(tmp_path / "tuned")), output_dir=made, limits=limits)
    shardq.quantize(folders[name], _recipe(**recipe), output_dir=plain, limits=limits)
    shards = sorted(p.name for p in plain.glob("*.safetensors"))
    assert shards
    for shard in shards:
        assert (made / shard).read_bytes() == (plain / shard).read_bytes(), shard


@pytest.mark.parametrize("name", EXPERTS)
def test_each_algorithm_is_better_than_the_nearest_codes(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    errors = {}
    for algorithm in ("rtn", "gptq", "signround"):
        assert _tune(folders[name], tmp_path / algorithm, algorithm).left == ()
        errors[algorithm] = models.coded_error(folders[name], tmp_path / algorithm, _recipe())
    assert errors["gptq"] < 0.9 * errors["rtn"], errors
    assert errors["signround"] < 0.95 * errors["rtn"], errors


@torch.no_grad()
def _weighed(folder: Path, outs: Sequence[Path]) -> list[tuple[float, ...]]:
    """Errors of the first block's experts, by what comes into them, of each output."""
    found = []
    with BlockModel.open(open_source(str(folder)), dtype=torch.float32) as model:
        own = find_subjects(model, make_plan(model.checkpoint, _recipe())).blocks[0]
        batch = model.embed(torch.from_numpy(np.load(outs[0] / driver.IDS)))
        with model.block(0) as block:
            with recording(block, "block", "all") as inputs:
                model.advance(block, batch, 0)
            codes = [passes.read_stored(out, model.block_names[0], own).codes for out in outs]
            for s in (s for s in own if s.place.expert is not None):
                squares = inputs.sums[f"block.{s.place.parameter}"].squares[s.place.expert]
                wanted = s.weight(block).double().numpy()
                made = [decode_rows(of[s.tensor], s.scheme, load()) for of in codes]
                found.append(tuple(float((squares * (wanted - m) ** 2).sum()) for m in made))
    return found


@pytest.mark.parametrize("name", EXPERTS)
def test_searched_scales_lower_the_error_that_they_are_searched_by(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    for algorithm in ("opt-rtn", "rtn"):
        _tune(folders[name], tmp_path / algorithm, algorithm)
    errors = _weighed(folders[name], [tmp_path / "opt-rtn", tmp_path / "rtn"])
    assert len(errors) == 4 * 3
    assert sum(searched for searched, _ in errors) < 0.97 * sum(nearest for _, nearest in errors)
    assert sum(searched <= nearest for searched, nearest in errors) == len(errors)


@torch.no_grad()
def test_experts_of_llama_4_get_rows_that_the_router_weighed(folders: dict[str, Path]) -> None:
    with BlockModel.open(open_source(str(folders["llama4"])), dtype=torch.float32) as model:
        batch = model.embed(models.some_ids(2, 12))
        met: list[tuple[torch.Tensor, torch.Tensor]] = []
        with model.block(0) as block:
            experts: Any = block.get_submodule("feed_forward.experts")
            experts.register_forward_hook(lambda _, args, out: met.append((args[0], out)))
            model.run(block, batch, 0)
            ((rows, expected),) = met
            x, chosen = given(experts, (rows,), {}, "experts")
            assert len(x) == 2 * 12  # one expert for each token
            made = torch.zeros_like(expected).view(4, 24, -1)
            for expert in range(4):
                own = x[(chosen == expert).any(-1)]
                out = between(experts, own, first_of(experts), expert) @ experts.down_proj[expert]
                made[expert][rows.view(4, 24, -1)[expert].any(-1)] = out
    torch.testing.assert_close(made.view_as(expected), expected)
