"""AWQ: what scaling does to a block, what the search finds, and an output with replaced norms."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="block mode needs transformers")

import tuned_models as models

import shardq
from shardq.errors import BadOption
from shardq.kernels import load
from shardq.ledger import decode_ledger
from shardq.plans import make_plan
from shardq.quantizers.decode import decode_rows
from shardq.recipe import Recipe, make_recipe
from shardq.sources import open_source
from shardq.tune import block_awq, passes
from shardq.tune.awq import in_groups
from shardq.tune.awq_inputs import record_inputs
from shardq.tune.awq_sites import Site, find_awq_sites
from shardq.tune.block_rtn import tune_by_importance
from shardq.tune.blocks import BlockModel
from shardq.tune.driver import Place, tune_blocks
from shardq.tune.options import DataOptions, TuneOptions, build_options
from shardq.tune.result import TuneResult
from shardq.tune.settings import AwqCodes, AwqOptions, SignRoundOptions
from shardq.tune.subjects import Subject, find_subjects
from shardq.tune.work import Changes, Work
from shardq.tuned import load_tuned, read_tuned

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = DataOptions("random", nsamples=4, seqlen=16, seed=1)
LEARNING = SignRoundOptions(iters=4, batch_size=2)
NAMES = ("llama", "qwen3_moe", "gemma3", "deepseek_v3")
SHORT = AwqOptions(awq_n_grid=6)
NORM_OF_MLP = {"llama": "post_attention_layernorm", "qwen3_moe": "", "gemma3": "pre_feedforward_layernorm"}


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


def test_a_bias_goes_with_its_rows(tmp_path: Path) -> None:
    folder = models.make_model("qwen2", tmp_path / "qwen2", torch.float32)
    with _first_block(folder) as (work, sites):
        site = next(s for s in sites if s.bias)
        assert (site.rows.place.parameter if site.rows else "") == "self_attn.v_proj.weight"
        before, changes = work.run(work.inputs), Changes()
        factors = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(0)))
        block_awq.apply_factors(work.block, site, factors, changes)
        assert changes.replaced.keys() == {"model.layers.0.self_attn.v_proj.bias"}
        assert float((work.run(work.inputs) - before).abs().max()) < 2e-5 * float(before.abs().max())


@pytest.mark.parametrize("codes", ["nearest", "searched"])
@pytest.mark.parametrize("loss", ["output", "inputs"])
@pytest.mark.parametrize("duo", ["true", "false", "both"])
def test_the_search_is_never_worse_than_no_scaling(duo: Any, loss: Any, codes: Any, folders: dict[str, Path]) -> None:
    options = AwqOptions(awq_n_grid=8, awq_duo_scaling=duo, awq_loss=loss, awq_codes=codes)
    assert options.candidates[0] == (0.0, False)
    better = 0
    with _first_block(folders["llama"]) as (work, sites):
        for site, seen in zip(sites, record_inputs(work, sites, options), strict=True):
            module = site.module(work.block)
            wanted = [block_awq._output(module(*args, **kwargs)) for args, kwargs in seen.calls]
            best = block_awq.search_factors(work, site, seen, options)
            assert best is not None
            losses = [block_awq._loss(work, site, seen, wanted, f, options) for f in (torch.ones_like(best), best)]
            assert losses[1] <= losses[0]
            better += losses[1] < losses[0]
    assert better


def test_searched_codes_are_those_that_opt_rtn_finds(folders: dict[str, Path]) -> None:
    options = AwqOptions(awq_codes="searched")
    with _first_block(folders["llama"], _recipe("W3A16G32")) as (work, sites):
        codes, seen = tune_by_importance(work), record_inputs(work, sites, options)
        for site, own in zip(sites, seen, strict=True):
            expected = 0.0
            assert own.squares is not None
            for s in site.behind:
                change = s.weight(work.block) - torch.from_numpy(decode_rows(codes[s.tensor], s.scheme, work.kernels))
                expected += float((change.double().square().sum(0) * own.squares).sum())
            ones = torch.ones(site.behind[0].shape[1])
            assert block_awq._loss(work, site, own, (), ones, options) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("algorithm", ["awq", "awq,signround"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3"])
def test_norms_are_replaced_in_an_output_that_passes_its_checks(
    name: str, algorithm: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    source, out, folder = folders[name], tmp_path / "out", tmp_path / "tuned"
    _tune(source, folder, algorithm)
    shardq.quantize(str(source), _recipe(tuned=folder), output_dir=out, limits=shardq.Limits(parallel=1))
    ledger = decode_ledger((out / "shardq-ledger.json.zst").read_bytes())["tensors"]
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    replaced = {n for n, entry in ledger.items() if "replaced" in entry}
    norms = {"input_layernorm", NORM_OF_MLP[name]} - {""}
    assert replaced == {n for n in before if n.split(".")[-2] in norms}
    assert all(ledger[n]["replaced"] == algorithm for n in replaced)
    assert any(not torch.equal(before[n], after[n]) for n in replaced)
    assert all(torch.equal(before[n], after[n]) for n in before.keys() - replaced if ledger[n]["outcome"] == "copied")
    assert all(ledger[n]["relative_error"] < 0.2 for n, entry in ledger.items() if entry["outcome"] == "quantized")
    for deep in (False, True):
        assert not shardq.verify(out, deep=deep, source=source).problems
    assert not shardq.verify(out, deep=True).problems
    assert not shardq.audit(out, source=source, tuned=folder).problems
    ids = models.some_ids(4, 48)
    wanted, found = (models.whole_logits(f, ids).log_softmax(-1) for f in (source, out))
    assert float((wanted.exp() * (wanted - found)).sum(-1).mean()) < 0.05


@pytest.mark.parametrize("algorithm", ["awq", "awq,signround", "awq,gptq"])
def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    algorithm: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    _tune(folders["llama"], whole, algorithm)
    real = passes.tune_block

    def stopping(work: Work, *more: Any) -> Any:
        if work.index == 2:
            raise KeyboardInterrupt
        return real(work, *more)

    with monkeypatch.context() as stopped:
        stopped.setattr(passes, "tune_block", stopping)
        with pytest.raises(KeyboardInterrupt):
            _tune(folders["llama"], again, algorithm)
    assert _tune(folders["llama"], again, algorithm).resumed == 2
    files = sorted(p.name for p in whole.iterdir())
    assert files == sorted(p.name for p in again.iterdir())
    assert all((whole / n).read_bytes() == (again / n).read_bytes() for n in files)


@pytest.mark.parametrize(("loss", "duo"), [("inputs", "false"), ("output", "true")])
def test_scaling_makes_the_nearest_codes_better(loss: Any, duo: Any, tmp_path: Path) -> None:
    """With columns of very different inputs, as real models have them."""
    folder = models.make_model("llama", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    sizes = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(5)) * 1.5)
    for name, t in weights.items():
        if name.endswith("layernorm.weight"):
            t.mul_(sizes)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ids, errors = models.some_ids(4, 48), {}
    wanted = models.whole_logits(folder, ids).log_softmax(-1)
    for algorithm in ("rtn", "awq,rtn"):
        _tune(folder, tmp_path / algorithm, algorithm, awq=AwqOptions(awq_duo_scaling=duo, awq_loss=loss))
        recipe, out = _recipe(tuned=tmp_path / algorithm), tmp_path / f"out-{algorithm}"
        shardq.quantize(str(folder), recipe, output_dir=out, limits=shardq.Limits(parallel=1))
        found = models.whole_logits(out, ids).log_softmax(-1)
        errors[algorithm] = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert errors["awq,rtn"] < 0.9 * errors["rtn"], errors


def test_a_range_is_clipped_where_that_lowers_the_error(folders: dict[str, Path]) -> None:
    recipe, options = _recipe("W2A16G32"), AwqOptions(awq_n_grid=4, awq_apply_clip=True)
    with _first_block(folders["llama"], recipe) as (work, sites):
        seen = record_inputs(work, sites, options)
        before = {s.tensor: s.weight(work.block).clone() for s in work.subjects}
        changes, ranges = block_awq.scale_block(work, sites, options)
        assert not ranges
        clipped = set()
        for site, own in zip(sites, seen, strict=True):
            for s in site.behind:
                scaled = before[s.tensor] * changes.columns[s.tensor]
                if s.tensor in changes.rows:
                    scaled *= changes.rows[s.tensor][:, None]
                now = s.weight(work.block)
                if torch.allclose(now, scaled, rtol=1e-5, atol=1e-7):
                    continue
                clipped.add(s.module.rpartition(".")[2])
                errors = [
                    own.groups[32].squares(in_groups(block_awq._decoded(work, s, w, None) - scaled, 32), _ones(s))
                    for w in (scaled, now)
                ]
                assert float(errors[1].sum()) < float(errors[0].sum())
        assert "v_proj" in clipped
        assert not clipped & {"q_proj", "k_proj"}


def _ones(s: Subject) -> torch.Tensor:
    return torch.ones(s.shape[1])


def test_sign_round_begins_with_clipped_ranges(folders: dict[str, Path], tmp_path: Path) -> None:
    found = {}
    for name, more in (("plain", {}), ("clip", {"awq_apply_clip": True}), ("init", {"awq_clip_as_init": True})):
        words = AwqOptions(awq_n_grid=4, **{"awq_apply_clip": name != "plain", **more})
        _tune(folders["llama"], tmp_path / name, "awq,signround", _recipe("W2A16G32"), awq=words)
        codes = load_tuned(tmp_path / name)
        found[name] = read_tuned(codes.refs["model.layers.0.mlp.up_proj"], 0, 4).scales
    assert abs(found["init"]).max() < abs(found["plain"]).max()
    assert not np.array_equal(found["init"], found["clip"])


def test_a_site_with_a_kept_matrix_is_not_used(folders: dict[str, Path]) -> None:
    with _first_block(folders["llama"], _recipe(ignore=("**.k_proj",))) as (_, sites):
        assert [site.parent for site in sites] == ["mlp", "mlp.down_proj"]
    with (
        pytest.raises(BadOption, match="nothing of"),
        _first_block(folders["qwen3_moe"], _recipe(ignore=("**.k_proj",))),
    ):
        pass


def test_the_search_sees_the_first_tokens_of_samples(folders: dict[str, Path]) -> None:
    with _first_block(folders["gemma3"]) as (work, _):
        short = work.run(work.inputs.shortened(11))
        assert short.shape[1] == 11
        assert float((work.run(work.inputs)[:, :11] - short).abs().max()) < 1e-5
        assert work.inputs.shortened(24) is work.inputs


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"algorithm": "signround", "awq_n_grid": 3}, "has a meaning for --algorithm awq"),
        ({"algorithm": "awq", "iters": 3}, "has a meaning for --algorithm signround"),
        ({"algorithm": "awq,awq"}, "--algorithm"),
        ({"algorithm": "signround,awq"}, "--algorithm"),
        ({"algorithm": "awq", "awq_n_grid": 0}, "--awq-n-grid"),
        ({"algorithm": "awq", "awq_duo_scaling": "maybe"}, "--awq-duo-scaling"),
        ({"algorithm": "awq", "awq_loss": "maybe"}, "--awq-loss"),
        ({"algorithm": "awq", "awq_codes": "maybe"}, "--awq-codes"),
        ({"algorithm": "awq,signround", "awq_clip_as_init": True}, "--awq-apply-clip"),
        ({"algorithm": "awq", "awq_clip_as_init": True, "awq_apply_clip": True}, "awq,signround"),
    ],
)
def test_words_without_a_meaning_are_refused(words: dict[str, object], told: str) -> None:
    with pytest.raises(BadOption, match=told):
        build_options(words)


def test_words_of_lists_have_their_parts() -> None:
    found = build_options({"algorithm": "awq,signround", "iters": 7, "awq_n_grid": 3})
    assert (found.codes, found.is_scaling, found.precision) == ("signround", True, "auto")
    assert found.as_dict().keys() & {"awq", "gptq", "signround"} == {"awq", "signround"}
    assert (found.awq.awq_duo_scaling, found.awq.awq_loss) == ("false", "inputs")
    alone = build_options({"algorithm": "awq"})
    assert (alone.codes, alone.is_scaling, alone.precision) == ("opt-rtn", True, "float32")
    assert not build_options({"algorithm": "opt-rtn"}).is_scaling


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"algorithm": "awq"}, "searched"),
        ({"algorithm": "awq,gptq"}, "searched"),
        ({"algorithm": "awq,gptq", "scales": "rtn"}, "nearest"),
        ({"algorithm": "awq,rtn"}, "nearest"),
        ({"algorithm": "awq,signround"}, "nearest"),
        ({"algorithm": "awq", "awq_codes": "nearest"}, "nearest"),
        ({"algorithm": "awq,rtn", "awq_codes": "searched"}, "searched"),
    ],
)
def test_scales_are_judged_under_the_codes_that_follow(words: dict[str, Any], expected: str) -> None:
    found = build_options(words)
    assert (found.scaling.awq_codes, found.as_dict()["awq"]["awq_codes"]) == (expected, expected)


def test_blocks_are_scaled_by_the_codes_that_follow(folders: dict[str, Path], tmp_path: Path) -> None:
    """Left to the algorithm, a folder is that of the word that it stands for, and not of the other one."""
    made: dict[AwqCodes | None, list[bytes]] = {None: [], "searched": [], "nearest": []}
    for codes, files in made.items():
        place = tmp_path / str(codes)
        _tune(folders["llama"], place, "awq", awq=AwqOptions(awq_codes=codes))
        files += [p.read_bytes() for p in sorted(place.glob("model.layers.*"))]
    assert made[None] == made["searched"] != made["nearest"]
