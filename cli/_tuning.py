"""Words of `shardq tune` that decide codes, what they stand for, and what is done with them in a process apart."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from shardq.cli._apart import run_apart
from shardq.cli._console import Console
from shardq.cli._kept import add_options, dashed_option, kept_option, take_kept
from shardq.cli._progress import block_progress, tenths_progress
from shardq.cli._spool import SPOOL, SPOOL_HELP

if TYPE_CHECKING:
    from shardq.limits import Limits, SpoolAs
    from shardq.measured import Measured
    from shardq.recipe import Recipe
    from shardq.tune.options import TuneOptions
    from shardq.tune.result import TuneResult

F = TypeVar("F", bound=Callable[..., Any])
SUFFIX: Final = ".tuned"  # of the folder beside an output folder
DAMAGES: Final = ".damages.json"  # of the file beside it
LESS_TUNING: Final = "a lower --max-ram, fewer --nsamples and --batch-size 1 take less"
LESS_MEASURING: Final = "torch, a block and its gradients need room, and hidden states as much as --max-ram allows"
CALIBRATION_SEED: Final = 0  # of `quantize --calibrate`
_KEY: Final = "shardq.tune"  # in the context: values of `tuning_options`


def _option(name: str, *others: str, **settings: Any) -> Callable[[F], F]:
    return dashed_option(_KEY, name, *others, **settings)


def tuning_options(function: F) -> F:
    """Options under AutoRound's names; a command finds them with `take_options`."""
    options = (
        _option(
            "--algorithm", metavar="[awq,]CODES",
            help="How codes are found: signround (rounding learned by gradients), gptq (errors made up for by later "
            "columns), opt-rtn (searched scales), rtn (the nearest codes). With awq before it, columns are scaled "
            "first; awq alone is awq,opt-rtn. Default: signround.",
        ),
        _option(
            "--recipe", type=click.Choice(["default", "light", "best", "opt-rtn", "rtn"]),
            help="AutoRound's: 200 steps with 128 samples; 50 larger steps; 1000 steps with 512 samples; these "
            "algorithms with 128 samples, and with one.",
        ),
        _option(
            "--dataset", metavar="DATASET",
            help="random, self (sampled by the model), a file, or as AutoRound's. Default: NeelNanda/pile-10k.",
        ),
        _option("--nsamples", "--nsample", type=int, metavar="N", help="Samples. Default: the recipe's."),
        _option("--seqlen", "--seq_len", type=int, metavar="N", help="Tokens of a sample. Default: 2048."),
        _option("--seed", type=int, metavar="N", help="Of the choice of samples, and their order. Default: 42."),
        _option("--iters", "--iter", type=int, metavar="N", help="Steps for a block (signround)."),
        _option("--nblocks", type=int, metavar="N", help="Blocks that are learned together. Default: 1 (signround)."),
        _option(
            "--batch-size", "--train_bs", "--bs", type=int, metavar="N",
            help="Samples of a step. Default: 8 (signround).",
        ),
        _option(
            "--gradient-accumulate-steps", type=int, metavar="N", help="Batches of a step. Default: 1 (signround)."
        ),
        _option("--lr", type=float, metavar="X", help="First step of the rounding. Default: 1/iters (signround)."),
        _option("--minmax-lr", type=float, metavar="X", help="First step of the ranges. Default: --lr (signround)."),
        kept_option(
            _KEY, "--enable_minmax_tuning/--disable_minmax_tuning", default=None,
            help="Learn ranges, too. Default: yes (signround).",
        ),
        _option("--not-use-best-mse", is_flag=True, default=None, help="Keep the last step, not the best (signround)."),
        _option("--momentum", type=float, metavar="X", help="Of gradients before signs. Default: 0 (signround)."),
        _option("--enable-adam", is_flag=True, default=None, help="Steps of AdamW instead of signs (signround)."),
        _option(
            "--enable-norm-bias-tuning", is_flag=True, default=None,
            help="Learn weights of norms, and biases, too: those of the output are others then (signround).",
        ),
        kept_option(
            _KEY, "--enable_torch_compile/--disable_torch_compile", default=None,
            help="Compile what each step computes of rounding, which needs a C++ compiler. Default: no (signround).",
        ),
        _option(
            "--dynamic-max-gap", type=int, metavar="N", help="End after so many steps without a better (signround)."
        ),
        kept_option(
            _KEY, "--enable_quanted_input/--disable_quanted_input", default=None,
            help="Tune a block with what those before it give with their codes. Default: yes.",
        ),
        kept_option(
            _KEY, "--enable_act_quant/--disable_act_quant", default=None,
            help="Quantize inputs of matrices as the scheme's server will, while tuning and for the next block. "
            "Default: yes.",
        ),
        _option("--damping", type=float, metavar="X", help="Of the mean diagonal, added to H. Default: 0.01 (gptq)."),
        _option(
            "--shrinkage", type=float, metavar="X",
            help="How much of what columns of the inputs have in common does not count, 0 to 1. Default: 0.4 (gptq).",
        ),
        _option("--awq-n-grid", type=int, metavar="N", help="Strengths of scaling that are tried. Default: 20 (awq)."),
        _option(
            "--awq-duo-scaling", type=click.Choice(["true", "false", "both"]),
            help="Scale by weights, too, not by what comes in alone, or as is better. AutoRound's: true. Default: "
            "false (awq).",
        ),
        _option(
            "--awq-loss", type=click.Choice(["inputs", "output"]),
            help="What scales are searched for: the least change of weights, as their inputs count, or of what "
            "attention and MLP give, as AutoRound. Default: inputs (awq).",
        ),
        _option(
            "--awq-codes", type=click.Choice(["nearest", "searched"]),
            help="The codes under which scales are judged: the nearest, as AutoRound, or those of opt-rtn. Default: "
            "searched before opt-rtn and gptq, else nearest (awq).",
        ),
        _option(
            "--awq-seqlen", type=int, metavar="N",
            help="Tokens of a sample that the search for scales sees, 0 for all. Default: 512 (awq).",
        ),
        _option("--awq-apply-clip", is_flag=True, default=None, help="Clip ranges of groups, too (awq)."),
        _option(
            "--awq-clip-as-init", is_flag=True, default=None,
            help="Begin to learn with clipped ranges, in place of clipping weights (awq,signround).",
        ),
        _option(
            "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            help="What is computed with; auto: the model's own. Default: auto for signround, else float32.",
        ),
        _option(
            "--device", "--devices", "--device-map", "--device_map", metavar="DEVICE",
            help="What a block is computed on: auto (as many GPUs as it needs), cpu, cuda, cuda:N, or several GPUs, as "
            "0,1, which have its matrices between them. One block at a time lies there. Default: cpu.",
        ),
        _option(
            "--low-gpu-mem-usage", is_flag=True, default=None,
            help="Hidden states stay in main memory, and go to the device batch by batch.",
        ),
        _option("--spool", type=SPOOL, help=SPOOL_HELP),
        _option("--disable-amp", is_flag=True, default=None, help="The same as --dtype float32."),
        _option(
            "--enable-deterministic-algorithms", is_flag=True, default=None,
            help="Let torch refuse what a GPU does not compute twice alike; the CPU always does.",
        ),
        _option("--trust-remote-code", is_flag=True, default=None, help="Run code that the checkpoint brings along."),
    )  # fmt: skip
    return add_options(function, options)


def take_options() -> "tuple[TuneOptions, bool]":
    """What `tuning_options` stand for, and whether the checkpoint's code may run. Raises BadOption."""
    from shardq.tune.options import build_options

    words = take_kept(_KEY) or {}
    trust = bool(words.pop("trust_remote_code", False))
    return build_options(words), trust


def run_tuning(
    console: Console, source: str, recipe: "Recipe", options: "TuneOptions", folder: Path, subfolder: str | None,
    limits: "Limits", trust_remote_code: bool,
) -> "TuneResult":  # fmt: skip
    """Tune, in a process of its own."""
    given = source, recipe, options, str(folder), subfolder, limits, trust_remote_code
    return run_apart(console, "tuning", LESS_TUNING, _tune, *given)


def run_measuring(
    console: Console, source: str, recipe: "Recipe", path: Path, schemes: str, options: "TuneOptions",
    subfolder: str | None, limits: "Limits", trust_remote_code: bool,
) -> "Measured":  # fmt: skip
    """Measure the damage of schemes, in a process of its own."""
    given = source, recipe, str(path), schemes, options, subfolder, limits, trust_remote_code
    return run_apart(console, "measuring damage", LESS_MEASURING, _measure, *given)


def run_measuring_for_scales(
    console: Console, source: str, recipe: "Recipe", path: Path, schemes: str, data: str, subfolder: str | None,
    limits: "Limits", spool: "SpoolAs",
) -> "Measured":  # fmt: skip
    """Measure for `quantize`: the damage of the scales that it finds, with `data` of --calibrate."""
    from shardq.tune.options import DataOptions, TuneOptions
    from shardq.tune.settings import ComputeOptions

    data_options, compute = DataOptions(data, seed=CALIBRATION_SEED), ComputeOptions(spool=spool)
    options = TuneOptions("opt-rtn", data_options, compute=compute)
    return run_measuring(console, source, recipe, path, schemes, options, subfolder, limits, False)


def _tune(
    console: Console, source: str, recipe: "Recipe", options: "TuneOptions", folder: str, subfolder: str | None,
    limits: "Limits", trust_remote_code: bool,
) -> "TuneResult":  # fmt: skip
    from shardq import quality

    with block_progress(console, "tuning") as report:
        return quality.tune_model(
            source, recipe, folder, options=options, subfolder=subfolder, max_ram_bytes=limits.max_ram_bytes,
            max_disk_bytes=limits.max_disk_bytes, trust_remote_code=trust_remote_code, report=report,
        )  # fmt: skip


def _measure(
    console: Console, source: str, recipe: "Recipe", path: str, schemes: str, options: "TuneOptions",
    subfolder: str | None, limits: "Limits", trust_remote_code: bool,
) -> "Measured":  # fmt: skip
    from shardq import quality

    with tenths_progress(console, lambda done, steps: f"measuring: step {done} of {steps}") as report:
        return quality.measure_damages(
            source, recipe, path, options=schemes, tuning=options, subfolder=subfolder,
            max_ram_bytes=limits.max_ram_bytes, max_disk_bytes=limits.max_disk_bytes,
            trust_remote_code=trust_remote_code, report=report,
        )  # fmt: skip
