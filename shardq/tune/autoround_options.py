"""Every option of `auto-round quantize` (auto-round 0.16.1) and what it is in `shardq tune`: the same word, another, or
nothing, with the reason. The command refuses by this table what it does not have, and docs/autoround_options.md is made
of it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

SAME: Final = "the same"
EVALUATION: Final = "`shardq eval --tasks` runs lm-eval with few words; its own command takes all on the output folder"
DIFFUSION: Final = "block mode reads causal language models; diffusion models are quantized without data"
ROTATION: Final = "a rotated model needs hooks at inference, and no common server has them"
SVDQUANT: Final = "a low-rank branch beside the codes needs a server of its own; there is no layout for it here"
STATIC: Final = "no scales of caches or attention are written: a server that wants them finds its own"


@dataclass(frozen=True, slots=True)
class Row:
    """One option of auto-round, under all its names."""

    words: tuple[str, ...]
    ours: str  # SAME, or what is written here in its place; empty where nothing is
    why: str  # what differs, or the reason for nothing


def _row(words: str, ours: str, why: str = "") -> Row:
    return Row(tuple(words.split()), ours, why)


PARTS: Final[Mapping[str, tuple[Row, ...]]] = MappingProxyType({
    "Model and data": (
        _row("--model_name --model --model_name_or_path", "SOURCE", "the first argument"),
        _row("--model_dtype", "--dtype", "what a block is computed with"),
        _row("--platform", "", "sources are folders and the Hugging Face Hub"),
        _row("--num_hidden_layers --debug_layer_num", "", "an output is the whole model or not there"),
        _row("--dataset", SAME, "also `random` and `self`, which need no data"),
        _row("--nsamples --nsample", SAME),
        _row("--seqlen --seq_len", SAME),
        _row("--seed", SAME),
        _row("--disable_trust_remote_code", "--trust-remote-code", "code of a checkpoint runs only if that is said"),
        _row("--mllm", "", "the text part of a model with images is found by itself"),
        _row("--quant_nontext_module", "--quant-nontext", "without data: towers are not run in block mode"),
        _row("--extra_data_dir", "", "samples are texts: images and sounds are not read"),
        _row("--template", "", "a dataset of chats takes the tokenizer's own template"),
    ),
    "Memory and devices": (
        _row(
            "--device_map --device --devices", SAME,
            "`auto`, or devices, as `0,1`, which matrices are dealt out to by their bytes; no mapping of modules; "
            "default `cpu`",
        ),
        _row("--low_gpu_mem_usage", SAME, "hidden states stay in main memory"),
        _row(
            "--low_cpu_mem_usage", "the only way",
            "one block is in memory; --max-ram limits hidden states, and --spool says how more of them lie in files",
        ),
        _row("--disable_low_cpu_mem_usage", "", "a model is never in memory as a whole"),
        _row("--disable_amp", SAME, "`--dtype float32`; without it blocks are computed in the model's own type"),
        _row("--enable_torch_compile", SAME, "what SignRound computes of rounding; off by default"),
        _row("--disable_torch_compile", SAME, "the default"),
        _row("--enable_deterministic_algorithms", SAME, "on a CPU a run is repeatable without it"),
    ),
    "What is quantized": (
        _row("--scheme", SAME),
        _row("--bits --bit", "--bits", "for an average of several schemes `--target-bits`"),
        _row("--group_size", SAME),
        _row("--asym", SAME),
        _row("--data_type --dtype", "--scheme", "a scheme names the kind of codes; `--dtype` is what is computed with"),
        _row("--act_bits", "--scheme", "as in W8A8, FP8_STATIC, NVFP4"),
        _row("--act_group_size", "--scheme"),
        _row("--act_asym", "", "no scheme here has inputs with zero points"),
        _row("--act_data_type --act_dtype", "--scheme"),
        _row("--disable_act_dynamic", "--scheme", "FP8_STATIC and W8A8_STATIC have scales of inputs in the output"),
        _row("--super_bits", "--scheme", "blocks of GGUF files have their own; these are not tuned"),
        _row("--super_group_size", "--scheme", "blocks of GGUF files have their own; these are not tuned"),
        _row("--scale_dtype", "--format", "a layout has one type of scales, that which its readers expect"),
        _row("--ignore_layers --fp_layers", "--ignore", "with `--ignore-dialect auto-round` for parts of names"),
        _row("--layer_config", SAME),
        _row("--shared_layers", "", "what servers run as one matrix shares a scheme by itself"),
        _row("--quant_lm_head", "--quant-lm-head", "tuned, too"),
        _row("--no-quant_lm_head", "the default"),
        _row("--to_quant_block_names", "--ignore", "what is not to be quantized"),
        _row("--schemes", "--options", "with `--target-bits`"),
        _row("--options --option", "--options", "with `--target-bits`"),
        _row("--avg_bits --target_bits", "--target-bits"),
        _row("--ignore_scale_zp_bits", "--ignore-scale-bits"),
        _row("--static_kv_dtype", "", STATIC),
        _row("--static_kv_granularity", "", STATIC),
        _row("--static_attention_dtype", "", STATIC),
        _row("--static_attention_granularity", "", STATIC),
    ),
    "Output": (
        _row("--format --formats", "--format", "one layout; others by `shardq quantize --tuned`"),
        _row("--output_dir", "--output-dir"),
        _row("--max_shard_size", "", "an output has the shards of its source"),
        _row("--model_free", "`shardq quantize`"),
        _row("--disable_model_free", "the only way", "`tune` is never without a model"),
    ),
    "Algorithms": (
        _row(
            "--algorithm --algorithms --alg --algs --alg_config --alg_configs", "--algorithm",
            "signround, gptq, opt-rtn, rtn; with `awq,` before it",
        ),
        _row("--disable_opt_rtn", "--algorithm rtn"),
        _row("--enable_opt_rtn", "--algorithm opt-rtn"),
        _row("--enable_neuqi", "", "`--algorithm opt-rtn` searches scales and zero points by its own grid"),
    ),
    "SignRound": (
        _row("--iters --iter", SAME, "at least 1: for none `--algorithm opt-rtn` or `rtn`"),
        _row("--lr", SAME),
        _row("--minmax_lr", SAME),
        _row("--momentum", SAME),
        _row("--nblocks", SAME, "a stopped run goes on behind the last whole group"),
        _row("--batch_size --train_bs --bs", SAME),
        _row("--gradient_accumulate_steps", SAME),
        _row("--enable_minmax_tuning", SAME),
        _row("--disable_minmax_tuning", SAME),
        _row("--no-enable_minmax_tuning", "--disable_minmax_tuning"),
        _row("--enable_norm_bias_tuning", SAME),
        _row("--no-enable_norm_bias_tuning", "the default"),
        _row("--enable_alg_ext", "", "ranges are learned from the extremes; `--algorithm opt-rtn` searches scales"),
        _row("--no-enable_alg_ext", "the default"),
        _row("--not_use_best_mse", SAME),
        _row("--no-not_use_best_mse", "the default"),
        _row("--enable_quanted_input", SAME),
        _row("--disable_quanted_input", SAME),
        _row("--no-enable_quanted_input", "--disable_quanted_input"),
        _row("--enable_adam", SAME),
        _row("--no-enable_adam", "the default"),
        _row("--enable_lfq", "", "the last block is learned like the others: the head is not in memory then"),
        _row("--no-enable_lfq", "the default"),
    ),
    "AWQ": (
        _row(
            "--awq_duo_scaling --awq-duo-scaling", SAME,
            "default `false`; AutoRound's way is `true`, with `--awq-loss output --awq-codes nearest`",
        ),
        _row("--awq_n_grid --awq-n-grid", SAME),
        _row("--awq_seqlen", SAME),
        _row("--awq_smooth_batch_size", "", "a block runs sample by sample"),
        _row("--awq_apply_clip --awq-apply-clip", SAME),
        _row("--awq_clip_as_init --awq-clip-as-init", SAME),
    ),
    "SVDQuant": tuple(
        _row(f"--{word}", "", SVDQUANT)
        for word in (
            "svdquant-rank", "enable-svdquant-smooth", "svdquant-smooth-num-grids",
            "svdquant-smooth-max-calibration-calls", "svdquant-residual-iters", "enable-svdquant-residual-early-stop",
            "svdquant-low-rank-dtype", "svdquant-target-modules", "svdquant-exclude-modules", "svdquant-model-adapter",
        )
    ),
    "Rotations": (
        *(
            _row(words, "", ROTATION)
            for words in (
                "--rotation_type --rotation-hadamard-type", "--rotation_backend", "--rotation_block_size",
                "--rotation_size", "--smooth_lr", "--loss_type", "--kl_top_k",
            )
        ),
        *(
            _row(f"--{word} --no-{word}", "", ROTATION)
            for word in (
                "fuse_online_to_weight", "allow_online_rotation", "layerwise", "r1", "r2", "r3", "r4", "random_r1",
                "random_r2", "random_r3", "random_r4", "trainable_rotation", "trainable_smooth", "online_r1_rotation",
                "fuse_rmsnorm", "untie_embeddings",
            )
        ),
    ),
    "Diffusion": tuple(
        _row(words, "", DIFFUSION)
        for words in (
            "--prompt_file", "--prompt", "--metrics --metric", "--image_save_dir", "--guidance_scale",
            "--calib_num_inference_steps", "--num_inference_steps", "--generator_seed", "--diffusion_tuning_cache_size",
        )
    ),
    "Evaluation": (
        _row("--tasks --task", "`shardq eval OUT --tasks`", "by lm-eval"),
        _row("--eval_bs", "`shardq eval --batch-size`"),
        _row("--limit", "`shardq eval --limit`"),
        _row("--num_fewshot --num-fewshot", "`shardq eval --num-fewshot`"),
        _row("--eval_backend", "`shardq eval --backend`"),
        *(
            _row(words, "", EVALUATION)
            for words in (
                "--eval_gen_kwargs --eval-gen-kwargs", "--fewshot_as_multiturn --fewshot-as-multiturn",
                "--eval_task_by_task", "--vllm_args", "--eval_model_dtype", "--add_bos_token",
            )
        ),
    ),
})  # fmt: skip


def all_rows() -> Iterator[Row]:
    """In the order of the table."""
    for rows in PARTS.values():
        yield from rows


def explain(word: str) -> str | None:
    """What to say to who has written an option of auto-round that `tune` does not have; None for any other word."""
    row = next((r for r in all_rows() if word in r.words), None)
    if row is None or row.ours == SAME:
        return None
    said = [f"{word} of auto-round", *([f"is {row.ours} here"] if row.ours else [])]
    return " ".join(said) + (f": {row.why}" if row.why else "")


def as_markdown() -> str:
    """The table, as docs/autoround_options.md has it."""
    lines = [
        "# Options of auto-round in `shardq tune`",
        "",
        "Every option of `auto-round quantize` (0.16.1), and what is written here in its place. What is refused says",
        "why on the command line, too. This file is made of `shardq/tune/autoround_options.py`.",
    ]
    for part, rows in PARTS.items():
        lines += ["", f"## {part}", "", "| auto-round | here | |", "| --- | --- | --- |"]
        for r in rows:
            lines.append(f"| {', '.join(f'`{w}`' for w in r.words)} | {_cell(r.ours)} | {r.why} |")
    return "\n".join(lines) + "\n"


def _cell(ours: str) -> str:
    return f"`{ours}`" if ours.startswith("--") else ours or "refused"
