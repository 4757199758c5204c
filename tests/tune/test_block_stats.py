"""Statistics are sums over what really comes into each matrix, in files that shardq and llama.cpp read."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardq.api import quantize
from shardq.errors import BadImportance, BadOption, UnsupportedSource
from shardq.gguf.metadata import find_tensors
from shardq.gguf.model_files import model_files
from shardq.gguf.origins import Origins
from shardq.gguf.weighing import find_weighing
from shardq.headers import read_checkpoint
from shardq.importance import load_importance, match
from shardq.importance_vectors import has_means, read_vector
from shardq.limits import Limits
from shardq.quality import collect_statistics
from shardq.recipe import make_recipe
from shardq.roles import Role, assign_roles
from shardq.sources import open_source
from shardq.weights import find_weights

pytest.importorskip("transformers", reason="transformers builds the models: pip install shardq[tune]")

import tuned_models as models

from shardq.tune.blocks import BlockModel
from shardq.tune.data import Samples
from shardq.tune.imatrix_file import write_imatrix
from shardq.tune.inputs import Experts, is_stacks
from shardq.tune.stats import Statistics, collect, write_importance

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES, TOKENS = 2, 24


def gather(folder: Path, experts: Experts = "all") -> Statistics:
    ids = models.some_ids(SAMPLES, TOKENS)
    with BlockModel.open(open_source(str(folder)), dtype=torch.float32, attention="eager") as model:
        return collect(model, Samples(ids, "random", "random ids", 0, 1), experts=experts)


@torch.no_grad()
def whole_inputs(folder: Path, ids: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """What comes into each module of the whole model, sample by sample; of experts also where tokens go."""
    model = models.load_whole(folder)
    met: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: met.setdefault(name, []).extend(args[:2]))
    for one in ids:
        model(input_ids=one[None], use_cache=False)
    return met


def squares(rows: list[torch.Tensor]) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = sum((r.reshape(-1, r.shape[-1]).double() ** 2).sum(0) for r in rows).numpy()
    return found


def values(rows: list[torch.Tensor]) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = sum(r.reshape(-1, r.shape[-1]).double().sum(0) for r in rows).numpy()
    return found


@pytest.mark.parametrize("name", ["llama", "tied", "phi3", "qwen3_vl", "deepseek_v3"])
def test_linear_layers_have_the_sums_of_the_whole_model(name: str, tmp_path: Path) -> None:
    folder = models.make_model(name, tmp_path / "model")
    found, met = gather(folder), whole_inputs(folder, models.some_ids(SAMPLES, TOKENS))
    dense = {n: m for n, m in found.modules.items() if ".experts." not in n}
    assert {"lm_head"} < set(dense)
    for module, moment in dense.items():
        assert moment.tokens == SAMPLES * TOKENS
        assert np.allclose(moment.squares, squares(met[module]), rtol=1e-9), module
        assert np.allclose(moment.values, values(met[module]), rtol=1e-9, atol=1e-9), module


def expert_sums(
    folder: Path, layer: int, kind: Experts
) -> Iterator[tuple[str, np.ndarray[Any, Any], np.ndarray[Any, Any], int]]:
    """By hand, for a Qwen3-MoE: module, sums of squares and of values, tokens."""
    met = whole_inputs(folder, models.some_ids(SAMPLES, TOKENS))
    name = f"model.layers.{layer}.mlp.experts"
    module = models.load_whole(folder).get_submodule(name)
    x, chosen = torch.cat(met[name][0::2]), torch.cat(met[name][1::2])
    for expert in range(8):
        rows = x if kind == "all" else x[(chosen == expert).any(-1)]
        gate, up = (rows @ module.gate_up_proj[expert].T).chunk(2, -1)
        between = torch.nn.functional.silu(gate) * up
        for leaf, inputs in (("gate_proj", rows), ("up_proj", rows), ("down_proj", between)):
            yield f"{name}.{expert}.{leaf}", squares([inputs]), values([inputs]), len(rows)


@pytest.mark.parametrize("kind", ["all", "routed"])
def test_experts_have_sums_of_their_own(kind: Experts, tmp_path: Path) -> None:
    folder = models.make_model("qwen3_moe", tmp_path / "model")
    found = gather(folder, kind)
    with torch.no_grad():
        for name, expected, expected_values, tokens in expert_sums(folder, 2, kind):
            assert found.modules[name].tokens == tokens
            assert np.allclose(found.modules[name].squares, expected, rtol=1e-5), name
            assert np.allclose(found.modules[name].values, expected_values, rtol=1e-4, atol=1e-5), name
    routed = found.routed["model.layers.2.mlp.experts"]
    assert sum(routed) == SAMPLES * TOKENS * 2
    assert found.never_hit["model.layers.2.mlp.experts"] == tuple(i for i, n in enumerate(routed) if n == 0) != ()


def linear(folder: Path) -> Mapping[str, tuple[int, int]]:
    """Modules that `quantize` may ask the file for."""
    checkpoint = read_checkpoint(open_source(str(folder)))
    weights = find_weights(checkpoint, make_recipe("W4A16", quant_lm_head=True))
    roles = assign_roles(weights.tensors.values(), checkpoint.config)
    chosen = (t for t in weights.tensors.values() if roles[t.name].role in (Role.LINEAR, Role.HEAD))
    return {t.module: (t.shape[0], t.shape[1]) for t in chosen if t.shape}


@pytest.mark.parametrize("kind", ["all", "routed"])
@pytest.mark.parametrize("name", ["tied", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_both_files_have_what_quantize_asks_for(name: str, kind: Experts, tmp_path: Path) -> None:
    folder = models.make_model(name, tmp_path / "model")
    found = gather(folder, kind)
    assert write_importance(found, tmp_path / "own.safetensors") == ()
    assert write_imatrix(found, tmp_path / "peer.gguf", TOKENS) == ()
    own, peer = load_importance(tmp_path / "own.safetensors"), load_importance(tmp_path / "peer.gguf")
    assert (own.format, peer.format) == ("shardq", "imatrix")
    assert (own.provenance.data, own.provenance.tokens, own.provenance.seed) == ("random ids", 48, 1)
    assert peer.provenance.tokens == SAMPLES * TOKENS
    wanted = linear(folder)
    ours, theirs = match(own, wanted), match(peer, wanted)
    for module in wanted:
        moment = found.modules[module]
        if moment.tokens:
            expected = moment.squares / moment.tokens
            assert np.allclose(read_vector(ours[module]), expected, rtol=1e-6), module
            assert has_means(ours[module])
            assert not has_means(theirs[module])
            assert np.allclose(read_vector(theirs[module]), expected, rtol=1e-5), module


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5"])
def test_llama_cpp_gets_linear_attention_under_its_names_and_in_its_order(name: str, tmp_path: Path) -> None:
    """Some matrices go into two tensors, and heads of values are dealt out: the input of the last one with them."""
    pytest.importorskip("gguf", reason="the package gguf has the names: pip install shardq[gguf]")
    folder = models.make_model(name, tmp_path / "model")
    found = gather(folder)
    assert write_importance(found, tmp_path / "own.safetensors") == ()
    left = write_imatrix(found, tmp_path / "peer.gguf", TOKENS)
    own, peer = load_importance(tmp_path / "own.safetensors"), load_importance(tmp_path / "peer.gguf")
    checkpoint = read_checkpoint(open_source(str(folder)))
    weights = find_weights(checkpoint, make_recipe("Q8_0"))
    origins, orders = Origins(checkpoint, weights), []
    for t in find_tensors(model_files(checkpoint), origins.shards()):
        if t.type == "F32" or not any(part in t.name for part in ("attn_", "ssm_")):
            continue
        module = weights.tensors[origins.find(t.parts[0]).weight].module
        order = t.parts[0].column_order
        (ours,), (theirs,) = (find_weighing(x, t.name, (module,), t.shape[-1], order) for x in (own, peer))
        assert ours, t.name
        assert theirs, t.name
        assert np.allclose(read_vector(theirs), read_vector(ours), rtol=1e-5), t.name
        orders.append(order)
    assert len(orders) >= 2 * 4 + 4  # of two layers of linear attention and one with heads
    assert any(orders) == (name == "qwen3_5")
    assert not [m for m in left if "linear_attn" in m]


def test_quantize_takes_them(tmp_path: Path) -> None:
    folder = models.make_model("qwen3_moe", tmp_path / "model")
    found = gather(folder)
    write_importance(found, tmp_path / "own.safetensors")
    write_imatrix(found, tmp_path / "peer.gguf", TOKENS)
    errors = []
    for importance in (None, load_importance(tmp_path / "own.safetensors"), load_importance(tmp_path / "peer.gguf")):
        recipe = make_recipe("W4A16", group_size=32, importance=importance)
        out = tmp_path / f"out{len(errors)}"
        quantize(folder, recipe, output_dir=out, limits=Limits(parallel=1))
        errors.append({p.name: p.read_bytes() for p in out.glob("*.safetensors")})
    assert errors[1] == errors[2] != errors[0]


def test_an_expert_that_no_token_reached_has_the_mean_of_the_others(tmp_path: Path) -> None:
    folder = models.make_model("qwen3_moe", tmp_path / "model")
    found = gather(folder, "routed")
    prefix = "model.layers.2.mlp.experts"
    (missed, *_) = found.never_hit[prefix]
    write_importance(found, tmp_path / "own.safetensors")
    (ref,) = match(load_importance(tmp_path / "own.safetensors"), {f"{prefix}.{missed}.down_proj": (64, 32)}).values()
    members = [found.modules[f"{prefix}.{i}.down_proj"] for i in range(8)]
    mean = sum(m.squares for m in members) / sum(m.tokens for m in members)
    assert np.allclose(read_vector(ref), mean, rtol=1e-6)


def test_random_ids_are_no_special_ones_and_the_same_for_a_seed(tmp_path: Path) -> None:
    folder = models.make_model("llama", tmp_path / "model")
    first, again, other = (collect_statistics(folder, seed=seed) for seed in (0, 0, 1))
    assert first.provenance.tokens == 64
    name = "model.layers.0.self_attn.q_proj"
    assert np.array_equal(first.modules[name].squares, again.modules[name].squares)
    assert not np.array_equal(first.modules[name].squares, other.modules[name].squares)


def test_statistics_of_texts_tell_the_file(tmp_path: Path) -> None:
    folder = models.make_model("llama", tmp_path / "model")
    lines = (json.dumps({"text": " ".join(str((i * j) % 90) for i in range(40))}) for j in range(1, 9))
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    found = collect_statistics(folder, data=str(tmp_path / "texts.jsonl"), tokens=64, seqlen=16)
    assert (found.provenance.data, found.provenance.text, found.provenance.seed) == ("text", "texts.jsonl", None)
    assert found.provenance.tokens == 64


def test_statistics_of_the_models_own_tokens(tmp_path: Path) -> None:
    folder = models.make_model("llama", tmp_path / "model")
    found = collect_statistics(folder, data="self", tokens=24, seqlen=6)
    assert (found.provenance.data, found.provenance.tokens, found.provenance.seed) == ("self-generated", 24, 0)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    folder = models.make_model("opt", tmp_path / "model")
    with pytest.raises(BadOption, match="at least one token"):
        collect_statistics(folder, tokens=0)
    with pytest.raises(BadOption, match="--dtype"):
        collect_statistics(folder, dtype="int8")
    with pytest.raises(BadImportance, match=r"llama\.cpp has no names"):
        write_imatrix(gather(folder), tmp_path / "peer.gguf", TOKENS)


def test_experts_of_an_unknown_form_are_refused() -> None:
    module = torch.nn.Module()
    module.stack = torch.nn.Parameter(torch.zeros(4, 2, 2))
    with pytest.raises(UnsupportedSource, match="in a form that is not known"):
        is_stacks(module, "model.layers.0.experts")
