"""Plans of published models whose headers are not at hand: names, shapes and dtypes as their architecture has them.

The counts are those of issues and pull requests that list the real files (DeepSeek-V3.1: tinker-cookbook #580,
DeepSeek-V4.1-Flash: MoE-Infinity #210, Qwen3.6: mlx-lm #1224, Qwen3.5: llm-compressor #3037), of the published
configuration of a quantized Mistral-Small-4, or follow from config.json (DeepSeek-R1, Granite, Genz). The sizes of the
files of R1, Granite and Genz are known; what is made here is checked against them.
"""

from collections import Counter
from typing import Any

import pytest

import shardq
from shardq.checkpoint import Checkpoint, Shard, TensorRef
from shardq.decide import Decision, decide_weights
from shardq.weights import Weights, find_weights

Spec = tuple[str | None, tuple[int, ...] | None]
Specs = dict[str, Spec]
Matrix = tuple[str, int, int]  # module, rows, columns

E4M3, BF16, F32 = "F8_E4M3", "BF16", "F32"
BLOCK = 128


def plain(*matrices: Matrix) -> Specs:
    return {f"{name}.weight": (BF16, (rows, columns)) for name, rows, columns in matrices}


def fp8(*matrices: Matrix) -> Specs:
    """Blocks of 128 x 128, the last ones cut short."""
    specs: Specs = {}
    for name, rows, columns in matrices:
        specs[f"{name}.weight"] = (E4M3, (rows, columns))
        specs[f"{name}.weight_scale_inv"] = (F32, (-(-rows // BLOCK), -(-columns // BLOCK)))
    return specs


def vectors(size: int, *names: str) -> Specs:
    return {f"{name}.weight": (BF16, (size,)) for name in names}


def mlp(prefix: str, hidden: int, inner: int) -> tuple[Matrix, ...]:
    return (
        (f"{prefix}.gate_proj", inner, hidden),
        (f"{prefix}.up_proj", inner, hidden),
        (f"{prefix}.down_proj", hidden, inner),
    )


def index_of(specs: Specs) -> Specs:
    """The same as an index has it: names only."""
    return dict.fromkeys(specs, (None, None))


def checkpoint(specs: Specs, config: dict[str, Any], make: Any) -> Checkpoint:
    """Everything in one shard."""
    if any(shape is None for _, shape in specs.values()):
        tensors = {n: TensorRef(n, "a", None, None, -1, -1) for n in specs}
        return Checkpoint("made", None, (Shard("a", 0, None, None),), tensors, config, b"{}", None, (), ())
    made: Checkpoint = make({"a.safetensors": specs}, config)
    return made


def decided(source: Checkpoint, **options: Any) -> tuple[Weights, tuple[Decision, ...]]:
    """Weights and decisions, after a look whether every tensor of the source is accounted for."""
    recipe = shardq.make_recipe("W4A16", group_size=32, **options)
    weights = find_weights(source, recipe)
    for name in source.tensors:
        assert name in weights.tensors or name in weights.absorbed, name
    made = {".".join(parts[:k]) for n in weights.tensors for parts in [n.split(".")] for k in range(1, len(parts) + 1)}
    assert all(a.reason and (a.into in made) == (a.fate != "dropped") for a in weights.absorbed.values())
    return weights, decide_weights(weights, source, recipe)


def count(decisions: tuple[Decision, ...], part: str, action: str = "quantize") -> int:
    return sum(part in d.tensor.name and d.action == action for d in decisions)


# --- DeepSeek V3 -------------------------------------------------------------------------------

V3 = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "n_routed_experts": 256,
    "vocab_size": 129280, "first_k_dense_replace": 3, "num_nextn_predict_layers": 1, "moe_intermediate_size": 2048,
    "intermediate_size": 18432, "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}  # fmt: skip
MLA = (("q_a_proj", 1536, 7168), ("q_b_proj", 24576, 1536), ("kv_a_proj_with_mqa", 576, 7168),
       ("kv_b_proj", 32768, 512), ("o_proj", 7168, 16384))  # fmt: skip


def deepseek_v3(others: Any, layers: int) -> Specs:
    """`others`: how all but the routed experts are stored; `layers`: 62 with the one for prediction."""
    specs = plain(("model.embed_tokens", 129280, 7168), ("lm_head", 129280, 7168)) | vectors(7168, "model.norm")
    for n in range(layers):
        p = f"model.layers.{n}"
        specs |= vectors(7168, f"{p}.input_layernorm", f"{p}.post_attention_layernorm")
        specs |= vectors(1536, f"{p}.self_attn.q_a_layernorm") | vectors(512, f"{p}.self_attn.kv_a_layernorm")
        specs |= others(*((f"{p}.self_attn.{name}", *shape) for name, *shape in MLA))
        if n < 3:
            specs |= others(*mlp(f"{p}.mlp", 7168, 18432))
            continue
        specs |= plain((f"{p}.mlp.gate", 256, 7168)) | others(*mlp(f"{p}.mlp.shared_experts", 7168, 2048))
        for e in range(256):
            specs |= fp8(*mlp(f"{p}.mlp.experts.{e}", 7168, 2048))
        if n == 61:
            specs |= plain((f"{p}.eh_proj", 7168, 14336), (f"{p}.embed_tokens", 129280, 7168))
            specs |= plain((f"{p}.shared_head.head", 129280, 7168))
            specs |= vectors(7168, f"{p}.enorm", f"{p}.hnorm", f"{p}.shared_head.norm")
    return specs


def biases(specs: Specs) -> Specs:
    """What balances the experts."""
    gates = [n.removesuffix("weight") for n in specs if n.endswith(".mlp.gate.weight")]
    return specs | {f"{g}e_score_correction_bias": (F32, (256,)) for g in gates}


def test_deepseek_r1(make_checkpoint: Any) -> None:
    specs = biases(deepseek_v3(fp8, 62))
    source = checkpoint(specs, V3, make_checkpoint)
    assert 0 < 688_586_727_753 - sum(t.size_bytes for t in source.tensors.values()) < 140 * len(specs)  # headers
    weights, decisions = decided(source)
    assert sum(n.endswith(".weight_scale_inv") for n in specs) == 45_808 == 45_312 + 310 + 9 + 177
    assert Counter((a.fate, a.reason) for a in weights.absorbed.values()) == {("decoded", "fp8_block"): 45_808}
    assert count(decisions, "") == 44_544 + 305 + 9 + 174
    assert count(decisions, ".layers.61.") == 0
    assert count(decisions, ".layers.61.", "copy") == sum(n.startswith("model.layers.61.") for n in specs) - 776


def test_deepseek_v3_1_with_quantized_experts(make_checkpoint: Any) -> None:
    specs = deepseek_v3(plain, 61)
    assert sum(n.endswith(".weight") for n in specs) == 44_544 + 793
    weights, decisions = decided(checkpoint(specs, V3, make_checkpoint))
    assert Counter(a.reason for a in weights.absorbed.values()) == {"fp8_block": 44_544}
    assert count(decisions, ".mlp.experts.") == 44_544
    assert count(decisions, "") == 44_544 + 305 + 9 + 174
    assert count(decisions, "", "copy") == 58 + 247


# --- DeepSeek V4.1 -----------------------------------------------------------------------------


def test_deepseek_v4_1_flash(make_checkpoint: Any) -> None:
    """An index: 384 experts in 40 layers and in the one for prediction. Only the experts' names are known for sure."""
    specs: Specs = {}
    for p, inner in [(f"layers.{n}", "ffn") for n in range(40)] + [("mtp.0", "ffn")]:
        experts = [f"experts.{e}" for e in range(384)] + ["shared_experts"] * (p != "mtp.0")
        for name in (f"{p}.{inner}.{e}.w{k}" for e in experts for k in (1, 2, 3)):
            specs |= {f"{name}.weight": (None, None), f"{name}.scale": (None, None)}
    weights, decisions = decided(
        checkpoint(specs, {"model_type": "deepseek_v4", "n_routed_experts": 384}, make_checkpoint)
    )
    assert len(weights.absorbed) == 46_080 + 1_152 + 120
    assert count(decisions, ".ffn.experts.") == 46_080
    assert count(decisions, ".ffn.shared_experts.") == 120
    assert count(decisions, "mtp.", "copy") == 1_152
    assert len(decisions) == 46_080 + 1_152 + 120


# --- Qwen 3.5 and 3.6 --------------------------------------------------------------------------

QWEN = {
    "model_type": "qwen3_5_moe", "tie_word_embeddings": False, "vision_config": {"depth": 27},
    "text_config": {"model_type": "qwen3_5_moe_text", "hidden_size": 2048, "num_hidden_layers": 40, "num_experts": 256,
                    "moe_intermediate_size": 512, "vocab_size": 248320},
}  # fmt: skip


def stacked(prefix: str) -> Specs:
    return {f"{prefix}.gate_up_proj": (BF16, (256, 1024, 2048)), f"{prefix}.down_proj": (BF16, (256, 2048, 512))}


def separate(store: Any, prefix: str) -> Specs:
    return {k: v for e in range(256) for k, v in store(*mlp(f"{prefix}.{e}", 2048, 512)).items()}


def qwen(store: Any, experts: Any, mtp_experts: Any) -> Specs:
    text = "model.language_model"
    specs = plain((f"{text}.embed_tokens", 248320, 2048), ("lm_head", 248320, 2048)) | vectors(2048, f"{text}.norm")
    for n in range(40):
        p = f"{text}.layers.{n}"
        specs |= vectors(2048, f"{p}.input_layernorm", f"{p}.post_attention_layernorm")
        specs |= attention(store, f"{p}.self_attn") if n % 4 == 3 else delta_net(store, f"{p}.linear_attn")
        specs |= plain((f"{p}.mlp.gate", 256, 2048), (f"{p}.mlp.shared_expert_gate", 1, 2048))
        specs |= store(*mlp(f"{p}.mlp.shared_expert", 2048, 512)) | experts(f"{p}.mlp.experts")
    for n in range(27):
        p = f"model.visual.blocks.{n}"
        specs |= plain((f"{p}.attn.qkv", 3456, 1152), (f"{p}.attn.proj", 1152, 1152))
        specs |= plain((f"{p}.mlp.linear_fc1", 4304, 1152), (f"{p}.mlp.linear_fc2", 1152, 4304))
        specs |= vectors(1152, f"{p}.norm1", f"{p}.norm2")
    specs |= plain(("model.visual.merger.linear_fc1", 4608, 4608), ("mtp.fc", 2048, 4096))
    specs |= attention(plain, "mtp.layers.0.self_attn") | plain(("mtp.layers.0.mlp.gate", 256, 2048))
    return specs | vectors(2048, "mtp.norm") | mtp_experts("mtp.layers.0.mlp.experts")


def attention(store: Any, p: str) -> Specs:
    shapes = (("q_proj", 8192, 2048), ("k_proj", 512, 2048), ("v_proj", 512, 2048), ("o_proj", 2048, 4096))
    return store(*((f"{p}.{name}", *shape) for name, *shape in shapes)) | vectors(256, f"{p}.q_norm", f"{p}.k_norm")


def delta_net(store: Any, p: str) -> Specs:
    shapes = (("in_proj_qkv", 8192, 2048), ("in_proj_z", 4096, 2048), ("out_proj", 2048, 4096))
    specs: Specs = store(*((f"{p}.{name}", *shape) for name, *shape in shapes))
    specs |= plain((f"{p}.in_proj_a", 32, 2048), (f"{p}.in_proj_b", 32, 2048)) | vectors(128, f"{p}.norm")
    return specs | {
        f"{p}.conv1d.weight": (BF16, (8192, 1, 4)),
        f"{p}.A_log": (F32, (32,)),
        f"{p}.dt_bias": (BF16, (32,)),
    }


def test_qwen3_6_fp8(make_checkpoint: Any) -> None:
    specs = qwen(fp8, lambda p: separate(fp8, p), stacked)
    assert sum(n.endswith("_scale_inv") for n in specs) == 30_720 + 250
    weights, decisions = decided(checkpoint(specs, QWEN, make_checkpoint))
    assert Counter(a.reason for a in weights.absorbed.values()) == {"fp8_block": 30_970}
    assert count(decisions, ".mlp.experts.") == 30_720
    assert count(decisions, "") == 30_720 + 40 + 90 + 120
    assert count(decisions, "in_proj_a", "copy") == count(decisions, "in_proj_b", "copy") == 30
    assert count(decisions, "visual", "copy") == sum("visual" in n for n in specs)
    assert count(decisions, "mtp.", "copy") == sum(n.startswith("mtp.") for n in specs)


@pytest.mark.parametrize("known", [True, False])
def test_qwen3_5_stacks(make_checkpoint: Any, known: bool) -> None:
    """Stacks in the text layers, single experts in the layer for prediction."""
    specs = qwen(plain, stacked, lambda p: separate(plain, p))
    source = checkpoint(specs if known else index_of(specs), QWEN, make_checkpoint)
    weights, decisions = decided(source)
    if known:
        assert Counter(a.fate for a in weights.absorbed.values()) == {"split": 80}
        assert count(decisions, ".mlp.experts.") == 30_720
    else:
        assert count(decisions, ".mlp.experts.gate_up_proj") == count(decisions, ".mlp.experts.down_proj") == 40
    assert count(decisions, "mtp.layers.0.mlp.experts.", "copy") == 256 * 3
    assert count(decisions, "") == 250 + (30_720 if known else 80)
    _, taken = decided(source, mtp="quantize")
    assert count(taken, "mtp.") == 256 * 3 + 4
    _, dropped = decided(source, mtp="drop")
    assert count(dropped, "mtp.", "drop") == sum(n.startswith("mtp.") for n in specs)


# --- Mistral-Small-4 ---------------------------------------------------------------------------

MISTRAL4 = {
    "model_type": "mistral3", "tie_word_embeddings": False,
    "text_config": {"model_type": "mistral4", "hidden_size": 4096, "num_hidden_layers": 36, "n_routed_experts": 128,
                    "moe_intermediate_size": 2048, "intermediate_size": 12288, "vocab_size": 131072},
    "vision_config": {"model_type": "pixtral", "num_hidden_layers": 24},
}  # fmt: skip


def static(*matrices: Matrix) -> Specs:
    """FP8 with one scale, and one of the activations."""
    specs: Specs = {}
    for name, rows, columns in matrices:
        specs[f"{name}.weight"] = (E4M3, (rows, columns))
        specs |= {f"{name}.weight_scale_inv": (BF16, ()), f"{name}.activation_scale": (BF16, ())}
    return specs


def mistral_small_4() -> Specs:
    text, vision = "model.language_model", "model.vision_tower.transformer"
    specs = plain((f"{text}.embed_tokens", 131072, 4096), ("lm_head", 131072, 4096)) | vectors(4096, f"{text}.norm")
    for n in range(36):
        p = f"{text}.layers.{n}"
        specs |= vectors(4096, f"{p}.input_layernorm", f"{p}.post_attention_layernorm")
        specs |= vectors(1024, f"{p}.self_attn.q_a_layernorm") | vectors(256, f"{p}.self_attn.kv_a_layernorm")
        shapes = (("q_a_proj", 1024, 4096), ("q_b_proj", 4096, 1024), ("kv_a_proj_with_mqa", 320, 4096),
                  ("kv_b_proj", 6144, 256), ("o_proj", 4096, 4096))  # fmt: skip
        specs |= static(*((f"{p}.self_attn.{name}", *shape) for name, *shape in shapes))
        specs |= plain((f"{p}.mlp.gate", 128, 4096)) | static(*mlp(f"{p}.mlp.shared_experts", 4096, 2048))
        for name, shape in (("gate_up_proj", (128, 4096, 4096)), ("down_proj", (128, 4096, 2048))):
            stack = f"{p}.mlp.experts.{name}"
            specs |= {stack: (E4M3, shape), f"{stack}_scale_inv": (BF16, (128, 1, 1))}
            specs |= {f"{stack}_activation_scale": (BF16, ())}
    for n in range(24):
        p = f"{vision}.layers.{n}"
        specs |= plain(*((f"{p}.attention.{x}_proj", 1024, 1024) for x in "qkvo")) | plain(
            *mlp(f"{p}.feed_forward", 1024, 4096)
        )
        specs |= vectors(1024, f"{p}.attention_norm", f"{p}.ffn_norm")
    return specs | plain(
        ("model.multi_modal_projector.linear_1", 4096, 1024), ("model.multi_modal_projector.linear_2", 4096, 4096),
        ("model.multi_modal_projector.patch_merger.merging_layer", 1024, 4096),
    )  # fmt: skip


def test_mistral_small_4(make_checkpoint: Any) -> None:
    """What its published W4A16 has quantized is what --policy published takes."""
    source = checkpoint(mistral_small_4(), MISTRAL4, make_checkpoint)
    weights, decisions = decided(source, policy="published")
    assert count(decisions, "") == 36 * 3 + 36 * 128 * 3 == 13_932
    fates = Counter((a.fate, a.reason) for a in weights.absorbed.values() if a.fate != "dropped")
    assert fates == {("decoded", "fp8_static"): 36 * 8, ("decoded", "fp8_3d"): 72, ("split", "gate_up"): 72}
    assert sum(a.fate == "dropped" for a in weights.absorbed.values()) == 36 * 10
    kept = Counter(d.role.value for d in decisions if d.action == "copy" and len(d.tensor.shape or ()) == 2)
    assert kept == {"nontext": 168 + 3, "linear": 180, "head": 1, "embedding": 1, "router": 36}
    assert count(decided(source)[1], "") == 13_932 + 180


def test_an_index_of_mistral_small_4(make_checkpoint: Any) -> None:
    """Stacks are counted as such, and their scales have names of their own."""
    weights, decisions = decided(checkpoint(index_of(mistral_small_4()), MISTRAL4, make_checkpoint))
    fates = Counter((a.fate, a.reason) for a in weights.absorbed.values() if a.fate != "dropped")
    assert fates == {("decoded", "fp8_block"): 36 * 8, ("decoded", "fp8_3d"): 72}
    assert count(decisions, "") == 72 + 36 * 8
    assert count(decisions, ".experts.") == 72


# --- one file --------------------------------------------------------------------------------


def test_granite(make_checkpoint: Any) -> None:
    """granite-3.1-1b-a400m: gate and up of 32 experts in one weight of three dimensions; tied."""
    specs = plain(("model.embed_tokens", 49155, 1024)) | vectors(1024, "model.norm")
    for n in range(24):
        p = f"model.layers.{n}"
        specs |= vectors(1024, f"{p}.input_layernorm", f"{p}.post_attention_layernorm")
        specs |= plain(*((f"{p}.self_attn.{x}_proj", 1024 if x in "qo" else 512, 1024) for x in "qkvo"))
        specs |= plain((f"{p}.block_sparse_moe.router.layer", 32, 1024))
        specs[f"{p}.block_sparse_moe.input_linear.weight"] = (BF16, (32, 1024, 1024))
        specs[f"{p}.block_sparse_moe.output_linear.weight"] = (BF16, (32, 1024, 512))
    config = {"model_type": "granitemoe", "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 24,
              "num_local_experts": 32, "vocab_size": 49155, "tie_word_embeddings": True}  # fmt: skip
    source = checkpoint(specs, config, make_checkpoint)
    assert source.shards[0].size_bytes == 2_669_283_096
    _, decisions = decided(source)
    assert count(decisions, "") == 24 * 4 + 24 * 32 * 3
    assert Counter(d.role.value for d in decisions if d.action == "copy") == {"embedding": 1, "norm": 49, "router": 24}


def gptq3(*matrices: Matrix) -> Specs:
    """Three bits, whole rows, and a bias everywhere, as AutoGPTQ wrote it."""
    specs: Specs = {}
    for name, rows, columns in matrices:
        specs[f"{name}.qweight"] = ("I32", (columns * 3 // 32, rows))
        specs[f"{name}.qzeros"] = ("I32", (1, rows * 3 // 32))
        specs |= {f"{name}.scales": ("F16", (1, rows)), f"{name}.g_idx": ("I32", (columns,))}
        specs[f"{name}.bias"] = ("F16", (rows,))
    return specs


def test_genz_70b(make_checkpoint: Any) -> None:
    specs = plain(("model.embed_tokens", 32000, 8192), ("lm_head", 32000, 8192)) | vectors(8192, "model.norm")
    for n in range(80):
        p = f"model.layers.{n}"
        specs |= vectors(8192, f"{p}.input_layernorm", f"{p}.post_attention_layernorm")
        specs |= gptq3(*((f"{p}.self_attn.{x}_proj", 8192 if x in "qo" else 1024, 8192) for x in "qkvo"))
        specs |= gptq3(*mlp(f"{p}.mlp", 8192, 28672))
    said = {"bits": 3, "group_size": -1, "desc_act": True, "sym": True, "quant_method": "gptq"}
    config = {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "vocab_size": 32000,
              "tie_word_embeddings": False, "quantization_config": said}  # fmt: skip
    source = checkpoint(specs, config, make_checkpoint)
    assert 0 < 26_774_982_616 - source.shards[0].size_bytes < 400  # AutoGPTQ repeats its settings in the header
    weights, decisions = decided(source)
    assert Counter(a.reason for a in weights.absorbed.values()) == {"gptq": 560 * 4}
    assert count(decisions, "") == 560
