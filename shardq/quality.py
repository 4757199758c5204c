"""The functions that scripts call about quality: what makes an output better, and how good one is. Like those of api.py
they return typed values, print nothing, and raise ShardqError."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from shardq.limits import SpoolAs
from shardq.recipe import Recipe, as_recipe
from shardq.sources import open_source

if TYPE_CHECKING:
    from shardq.folding import Found
    from shardq.measured import Measured
    from shardq.mixing import Mixed
    from shardq.scored import Score
    from shardq.tune.evaluation import Evaluation
    from shardq.tune.inputs import Experts
    from shardq.tune.options import TuneOptions
    from shardq.tune.result import TuneResult
    from shardq.tune.stats import Statistics


def mix(
    source: str | Path,
    recipe: str | Recipe = "W4A16",
    *,
    options: str,
    target_bits: float,
    ignore_scale_bits: bool = False,
    measured: "Measured | None" = None,
    subfolder: str | None = None,
) -> "Mixed":
    """The mixture of `options` ("W2A16G64,W4A16,W8A16") that does the least harm with `target_bits` for each weight.

    Each group of modules that a server runs as one, and all experts of a layer, get one of them; scores are taken from
    sampled rows of the source, with the recipe's importance. What `measure_damages` found for all of `options` goes
    into `measured`: by text it replaces scores, to the power of 1.5 unless scales are round-to-nearest's; by random ids
    or the model's own tokens the geometric mean of both decides. Where one option for all has that size, a mixture has
    to promise 5 % less harm. The result's `text` is a layer config for `make_recipe`. Raises BadOption for a target
    that the options cannot reach, and what planning raises.
    """
    from shardq.mixing import mix as mix_source

    opened = open_source(str(source), subfolder)
    return mix_source(opened, as_recipe(recipe), options, target_bits, ignore_scale_bits, measured=measured)


def measure_damages(
    source: str | Path,
    recipe: str | Recipe,
    path: str | Path,
    *,
    options: str,
    tuning: "TuneOptions | None" = None,
    subfolder: str | None = None,
    max_ram_bytes: int | None = None,
    max_disk_bytes: int | None = None,
    trust_remote_code: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> "Measured":
    """How much each of `options` ("W2A16G64,W4A16") would change the predictions, for every matrix that `recipe`
    quantizes in a block, by gradients of the whole model with one block in memory: for the `measured` of `mix`.

    Figures are written to `path`; a file that has them already answers. Codes are the nearest ones, with scales
    searched by the recipe's importance, or else by what comes in, unless the algorithm of `tuning` is rtn. Of its data
    at most 16 samples of 256 tokens are used, and its `dtype`, else fp32. Hidden states beyond `max_ram_bytes` go into
    files beside `path`, of at most `max_disk_bytes`. `report` is called with steps done, and all: two for each block.
    Needs shardq[tune]. Raises RecipeChanged for a file of other figures, and what `tune_model` does.
    """
    from shardq.tune.library import check_packages

    check_packages()
    from shardq.tune.options import TuneOptions
    from shardq.tune.sensitivity import Measuring, measure_damages

    opened, measuring = open_source(str(source), subfolder), Measuring.of(options, tuning or TuneOptions())
    return measure_damages(
        opened, as_recipe(recipe), measuring, Path(path), max_ram_bytes=max_ram_bytes, max_disk_bytes=max_disk_bytes,
        trust_remote_code=trust_remote_code, report=report,
    )  # fmt: skip


def find_fold(
    source: str | Path,
    recipe: str | Recipe = "W4A16",
    *,
    subfolder: str | None = None,
    report: Callable[[int, int], None] | None = None,
) -> "Found":
    """Scales that are better moved between neighbours before quantizing, so that the model computes the same with
    weights of more equal sizes: for the `fold` of `make_recipe`. Reads rows of some weights; `report` is called with
    bytes done, and all.

    Raises BadOption for a model whose layers are not known, and what planning raises.
    """
    from shardq.folding import find_fold as find

    return find(open_source(str(source), subfolder), as_recipe(recipe), report=report)


def collect_statistics(
    source: str | Path,
    *,
    data: str = "random",
    tokens: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    experts: "Experts" = "all",
    dtype: str = "float32",
    subfolder: str | None = None,
    folder: str | Path = ".",
    max_ram_bytes: int | None = None,
    max_disk_bytes: int | None = None,
    spool: SpoolAs = "auto",
    trust_remote_code: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> "Statistics":
    """Run `data` through a model, one block in memory, and count how large the inputs of its matrices are: for the
    `importance` of `make_recipe`, once `shardq.tune.stats.write_importance` has written it to a file.

    `data`: "random", "self" for tokens that the model samples, or what AutoRound calls a dataset. `tokens` in all, by
    default 64 random ones, 2048 of its own, 8192 others, in samples of `seqlen`, by default 512, 64 of its own, or all.
    `experts`: see `shardq.tune.stats.collect`. `dtype`: what is computed with, "auto" for the model's own. Hidden
    states beyond `max_ram_bytes` go into a file of `folder` without a name, of at most `max_disk_bytes`; `spool`:
    "plain", "zstd", or "auto", compressed where the disk has no room else. `report` is called with blocks done, and
    all. Needs shardq[tune]. Raises MissingPackage, BadOption, UnsupportedSource for models that transformers does not
    know, BudgetTooSmall, DiskFull, and what reading raises.
    """
    from shardq.tune.library import check_packages

    check_packages()
    from shardq.tune.calls import collect_from
    from shardq.tune.spool import Spooling

    opened, spooling = open_source(str(source), subfolder), Spooling(Path(folder), max_ram_bytes, max_disk_bytes, spool)
    return collect_from(opened, data, tokens, seqlen, seed, experts, dtype, trust_remote_code, report, spooling)


def tune_model(
    source: str | Path,
    recipe: str | Recipe,
    folder: str | Path,
    *,
    options: "TuneOptions | None" = None,
    subfolder: str | None = None,
    max_ram_bytes: int | None = None,
    max_disk_bytes: int | None = None,
    trust_remote_code: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> "TuneResult":
    """Tune the codes of what `recipe` quantizes, one block in memory, into `folder`, for the `tuned` of `make_recipe`.

    What a stopped call has finished stays, and the same call goes on. `options`: how and with which data, by default
    SignRound as AutoRound does it. Hidden states beyond `max_ram_bytes` go into files of the folder; with codes, these
    must not need more than `max_disk_bytes`. `report` is called with blocks done, and all. Needs shardq[tune].
    Raises MissingPackage, BadOption for what cannot be tuned, RecipeChanged for a folder that was begun otherwise,
    UnsupportedSource for models that transformers does not know, and what planning and reading raise.
    """
    from shardq.tune.library import check_packages

    check_packages()
    from shardq.tune.driver import Place, tune_blocks
    from shardq.tune.options import TuneOptions

    opened, place = open_source(str(source), subfolder), Place(Path(folder), max_ram_bytes, max_disk_bytes)
    return tune_blocks(
        opened, as_recipe(recipe), options or TuneOptions(), place, trust_remote_code=trust_remote_code, report=report
    )


def evaluate(
    result: str | Path,
    text: str,
    *,
    reference: str | Path | None = None,
    windows: int = 8,
    seqlen: int = 512,
    dtype: str = "auto",
    subfolder: str | None = None,
    folder: str | Path = ".",
    max_ram_bytes: int | None = None,
    max_disk_bytes: int | None = None,
    spool: SpoolAs = "auto",
    trust_remote_code: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> "Evaluation":
    """Perplexity of a model, quantized or not, on `windows` evenly spaced windows of a text; with a `reference`, its
    source, also how far predictions are from its own. Both go through their blocks one by one, so that models larger
    than memory can be judged. Weights are decoded as the checkpoint has them; activations are not quantized.

    `dtype`: what both are computed with, "auto" for the type of `result`'s configuration. `subfolder` is the
    reference's; `folder`, `max_ram_bytes`, `max_disk_bytes` and `spool` as of `collect_statistics`, for both models
    together. Needs shardq[tune]. Raises as `collect_statistics`; BadOption for a text with too few tokens.
    """
    from shardq.tune.library import check_packages

    check_packages()
    from shardq.tune.calls import evaluate_on
    from shardq.tune.spool import Spooling

    opened, spooling = open_source(str(result)), Spooling(Path(folder), max_ram_bytes, max_disk_bytes, spool)
    other = None if reference is None else open_source(str(reference), subfolder)
    return evaluate_on(opened, other, text, windows, seqlen, dtype, trust_remote_code, report, spooling)


def score(
    result: str | Path,
    source: str | Path,
    *,
    subfolder: str | None = None,
    file: str | None = None,
    source_file: str | None = None,
    sample: int | None = None,
    full: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> "Score":
    """How far anyone's quantized checkpoint, or GGUF file, is from its source, tensor by tensor; both are folders,
    GGUF files or "org/name[@revision]", read by ranges. A GGUF file is compared with a checkpoint, brought into its
    order, or with another GGUF file of the model.

    `file` and `source_file`: which of several GGUF models of a side, by a part of its name. `sample`: so many matrices,
    evenly spread, instead of all; `full`: all rows of each, instead of some 2 million weights. `report`: called with
    the tensors that are done, and all. Raises BadOption, UnsupportedSource for a folded output, for codes without a
    reader and for GGUF of an architecture that is not known, MissingPackage for GGUF without the package gguf, and
    what reading headers and rows raises.
    """
    from shardq.quant_score import score_result

    return score_result(
        open_source(str(result)),
        open_source(str(source), subfolder),
        file=file,
        source_file=source_file,
        sample=sample,
        full=full,
        report=report,
    )
