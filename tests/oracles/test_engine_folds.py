"""Folds in transformers 5.23.0: a model whose scales were moved computes what it did before, bit for bit where they are
powers of two. Every row of folds.toml, with the variants that its model types have."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

from shardq import Limits, make_recipe, plan, quantize
from shardq.errors import BadFold
from shardq.fold import Fold, source_digest
from shardq.fold_sites import WEIGHT, find_sites
from shardq.folding import find_fold
from shardq.headers import read_checkpoint
from shardq.kernels import load
from shardq.source_rows import SourceRows
from shardq.sources import open_source
from shardq.weights import find_weights

pytestmark = pytest.mark.oracle

COMMON: Final[Mapping[str, Any]] = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 96, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS: Final = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
LATENT: Final = {
    **COMMON, "num_key_value_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "moe_intermediate_size": 64, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
ROPE: Final = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
SEEING: Final = {
    "text_config": {**COMMON, "rope_scaling": ROPE, "rope_parameters": ROPE}, "tie_word_embeddings": False,
    "vision_config": {
        "depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128,
        "deepstack_visual_indexes": [0],
    },
}  # fmt: skip
MODELS: Final[Mapping[str, Mapping[str, Any]]] = {  # name -> config; the model type is what stands before a dash
    "llama": COMMON,
    "llama-biases": {**COMMON, "attention_bias": True, "mlp_bias": True},
    "llama-alike": {**COMMON, "num_key_value_heads": 4},
    "mistral": {**COMMON, "sliding_window": None},
    "smollm3": {**COMMON, "use_sliding_window": False},
    "qwen2": COMMON,
    "qwen2_moe": {**COMMON, **EXPERTS, "shared_expert_intermediate_size": 128},
    "qwen3": COMMON,
    "qwen3_moe": {**COMMON, **EXPERTS},
    "qwen2_vl": {**SEEING, "vision_config": {"depth": 1, "embed_dim": 64, "hidden_size": 128, "num_heads": 2}},
    "qwen2_5_vl": SEEING,
    "qwen3_vl": SEEING,
    "mixtral": {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "glm4_moe": {
        **COMMON, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 64,
        "first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True, "n_group": 1, "topk_group": 1,
    },
    "deepseek_v2": {**LATENT, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "deepseek_v3-no_q_lora": {**LATENT, "q_lora_rank": None},
    "gemma": COMMON,
    "gemma2": {**COMMON, "query_pre_attn_scalar": 32},
    "gemma3_text": {**COMMON, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
}  # fmt: skip
CLOSE: Final = 2e-5  # relative error where a norm adds one: factors of fp32, each rounded once


def make_model(name: str, folder: Path, dtype: torch.dtype) -> Path:
    """A model of random weights with unequal columns, and of norms that matter, as transformers saves it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed here")
    kind = name.partition("-")[0]
    config = transformers.AutoConfig.for_model(kind, **MODELS[name])
    torch.manual_seed(5)
    kinds = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    model = kinds["vision_config" in MODELS[name]].from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, value in model.named_parameters():
            around = 1.0 if "norm" in key and "gemma" not in kind else 0.0
            spread = 0.3 if value.ndim == 1 else torch.exp2(torch.randn(value.shape[-1])) * value.shape[-1] ** -0.5
            value.copy_(around + torch.randn_like(value) * spread)
    model.to(dtype).save_pretrained(folder)
    return folder


def run(folder: Path) -> torch.Tensor:
    """The last hidden states, in fp32."""
    import transformers

    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        states: torch.Tensor = model(torch.arange(3, 51)[None] % 96, use_cache=False).last_hidden_state
    return states


def random_fold(folder: Path) -> Fold:
    """Any exponents, for every site: that nothing changes must not depend on which."""
    rng = np.random.default_rng(3)
    checkpoint = read_checkpoint(open_source(str(folder)))
    tensors = find_weights(checkpoint, make_recipe("W8A16")).tensors
    sites = find_sites(tensors, checkpoint.config)
    assert not sites.left
    owners = [s.norm for s in sites.norms] + [p.rows for p in sites.pairs]
    shapes = {name: tensors[name].shape for name in owners}
    drawn = {name: rng.integers(-3, 4, shape[0]).astype(np.int8) for name, shape in shapes.items() if shape}
    for pair in sites.pairs:  # keys of latent heads have no columns
        drawn[pair.rows][np.setdiff1d(np.arange(len(drawn[pair.rows])), pair.owners)] = 0
    exponents = {name.removesuffix(WEIGHT): values.tobytes() for name, values in drawn.items()}
    return Fold(exponents, {}, {}, 1, source_digest(checkpoint))


def fold_model(folder: Path, out: Path, fold: Fold) -> Path:
    """The model with its scales moved and all of its layers kept: only its head, which no state depends on, is not."""
    recipe = make_recipe("W8A16@fake", fold=fold, ignore=("re:.*layers[.].*",), quant_lm_head=True)
    return Path(quantize(folder, recipe, output_dir=out, limits=Limits(parallel=1)).output)


@pytest.mark.parametrize("name", [n for n in MODELS if not n.startswith("gemma")])
def test_a_model_computes_the_same_bits_after_a_fold(name: str, tmp_path: Path) -> None:
    source = make_model(name, tmp_path / "source", torch.bfloat16)
    folded = fold_model(source, tmp_path / "folded", random_fold(source))
    before, after = run(source), run(folded)
    assert torch.isfinite(before).all()
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith("gemma")])
def test_a_model_whose_norms_add_one_computes_the_same_but_for_the_rounding_of_fp32(name: str, tmp_path: Path) -> None:
    source = make_model(name, tmp_path / "source", torch.bfloat16)
    import transformers

    found = find_fold(open_source(str(source)), make_recipe("W8A16@fake"))
    assert not found.left
    assert len(found.fold.factors) == found.norms == 4
    assert all(len(set(x)) > 1 for x in found.fold.factors.values())
    model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    own = model.state_dict()
    for key, rows in folded_rows(source, found.fold).items():
        own[key.removeprefix("model.")].copy_(rows)
    ids = torch.arange(3, 51)[None] % 96
    with torch.no_grad():
        after = model(ids, use_cache=False).last_hidden_state
    before = run(source)
    assert not torch.equal(before, after)
    assert (before - after).norm() <= CLOSE * before.norm()


def test_kept_columns_behind_a_norm_that_adds_one_are_refused(tmp_path: Path) -> None:
    source = make_model("gemma", tmp_path / "source", torch.bfloat16)
    fold = find_fold(open_source(str(source)), make_recipe("W8A16@fake")).fold
    with pytest.raises(BadFold, match=r"k_proj.weight is kept"):
        plan(source, make_recipe("W8A16@fake", fold=fold, ignore=("re:.*k_proj",)))


def folded_rows(folder: Path, fold: Fold) -> dict[str, torch.Tensor]:
    """What a fold makes of each tensor that it changes: as quantizers see it in fp32, vectors as they are kept."""
    source, kernels, found = open_source(str(folder)), load(), {}
    checkpoint = read_checkpoint(source)
    for t in find_weights(checkpoint, make_recipe("W8A16", fold=fold)).tensors.values():
        if t.encoded and t.shape:
            rows = SourceRows(t, t.encoded[0], False, source, kernels)
            if len(t.shape) == 1:
                kept = torch.from_numpy(np.ascontiguousarray(rows.kept(0, t.shape[0])).view(np.int16))
                found[t.name] = kept.view(torch.bfloat16).float().reshape(t.shape)
            else:
                values, dtype = rows.taken(0, t.shape[0])
                wide = np.empty(values.shape, np.float32)
                kernels.widen(values, dtype, wide)
                found[t.name] = torch.from_numpy(wide)
    return found
